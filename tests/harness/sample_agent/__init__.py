"""A sample AI agent: something real to back up, that never stops writing and can prove what came back.

`build` makes it, a writer process keeps it busy in rounds and journals each step outside its root, and
`prove` shows that stores brought back are one instant of what was written, row by row.
"""

from tests.harness.sample_agent.builder import build
from tests.harness.sample_agent.journal import Instant, Journal
from tests.harness.sample_agent.layout import DATABASES, DREAM_RUN_QUERY, STEPS, RestoredPaths
from tests.harness.sample_agent.process import RunningWriter, running_writer
from tests.harness.sample_agent.prover import Proof, prove
from tests.harness.sample_agent.verdicts import (
    ChangedContent,
    MissingContent,
    NotOneInstant,
    ProofError,
    TornTransaction,
)
from tests.harness.sample_agent.writer import SampleWriter

__all__ = [
    "DATABASES",
    "DREAM_RUN_QUERY",
    "STEPS",
    "ChangedContent",
    "Instant",
    "Journal",
    "MissingContent",
    "NotOneInstant",
    "Proof",
    "ProofError",
    "RestoredPaths",
    "RunningWriter",
    "SampleWriter",
    "TornTransaction",
    "build",
    "prove",
    "running_writer",
]
