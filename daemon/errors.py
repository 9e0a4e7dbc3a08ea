"""The one error tree. Every class has an exit code; every error says what happened and what to do.

AgentkeepError                1
├── UsageError               64   the command line asks for something that makes no sense
├── IntegrityError           65   bytes are not what they should be
│   ├── SiblingMissing            a bundle without its .sha256
│   ├── SiblingMismatch           the bytes at rest are not those that the sibling names
│   ├── MalformedBundle           the container or its manifest breaks the format's rules
│   │   ├── BrokenSeal                the manifest was changed after it was sealed
│   │   └── WrongArtifact             an artifact is not the one that the manifest names, or is not there
│   ├── UnsupportedVersion        written by a newer agentkeep
│   └── WrongIdentity             no given identity opens this bundle
├── NotFoundError            66
│   ├── AgentNotFound             no such agent in the configuration, or nothing where it should live
│   └── SnapshotNotFound          no snapshot answers to that name
├── StorageUnavailable       69   a destination cannot be reached or will not do it now
├── LocalWriteError          73   the local disk is full, read-only or forbidden
├── BusyError                75   another agentkeep holds the lock: try again
├── NotOneInstant            75   the agent never held still, and no less will do: try again
├── RefusedError             77   allowed by nobody: policy, permission or safety says no
└── ConfigError              78   the configuration cannot be used

Raise these or return results; never log and raise. Code 3 ("done in part") is a result, not an error:
see `ExitCode.PARTIAL`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    BUG = 1
    PARTIAL = 3
    USAGE = 64
    INTEGRITY = 65
    NOT_FOUND = 66
    UNAVAILABLE = 69
    CANNOT_CREATE = 73
    BUSY = 75
    REFUSED = 77
    CONFIG = 78
    INTERRUPTED = 130
    TERMINATED = 143


class AgentkeepError(Exception):
    """What happened and why (`str(error)`), what to do about it (`hint`), how to exit (`exit_code`)."""

    exit_code: ExitCode = ExitCode.BUG
    usual_hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.usual_hint


class UsageError(AgentkeepError):
    exit_code = ExitCode.USAGE


class IntegrityError(AgentkeepError):
    exit_code = ExitCode.INTEGRITY


class SiblingMissing(IntegrityError): ...


class SiblingMismatch(IntegrityError):
    usual_hint = "take another copy of the bundle, or another snapshot; do not trust this one"


class MalformedBundle(IntegrityError):
    usual_hint = "take another copy of the bundle, or another snapshot; do not trust this one"


class BrokenSeal(MalformedBundle): ...


class WrongArtifact(MalformedBundle): ...


class UnsupportedVersion(IntegrityError): ...


class WrongIdentity(IntegrityError): ...


class NotFoundError(AgentkeepError):
    exit_code = ExitCode.NOT_FOUND


class AgentNotFound(NotFoundError): ...


class SnapshotNotFound(NotFoundError):
    usual_hint = "`agentkeep list` shows what there is; check the name and the permissions"


class StorageUnavailable(AgentkeepError):
    exit_code = ExitCode.UNAVAILABLE


class LocalWriteError(AgentkeepError):
    exit_code = ExitCode.CANNOT_CREATE
    usual_hint = "look at that path: its permissions, what is there already, the state of its disk"


class BusyError(AgentkeepError):
    exit_code = ExitCode.BUSY


class NotOneInstant(AgentkeepError):
    exit_code = ExitCode.BUSY


class RefusedError(AgentkeepError):
    exit_code = ExitCode.REFUSED


class ConfigError(AgentkeepError):
    exit_code = ExitCode.CONFIG
