"""How a proof fails. Each message names the store and what was expected of it."""

from __future__ import annotations


class ProofError(AssertionError):
    """What came back is not what was written."""


class MissingContent(ProofError):
    """A store, a file, a ref or a row that was written is not there."""


class ChangedContent(ProofError):
    """Something came back that was never written so."""


class TornTransaction(ProofError):
    """Part of a transaction (or of a log line) is there without the rest."""


class NotOneInstant(ProofError):
    """Every store is sound, and no moment of the agent's life had all of them like this."""
