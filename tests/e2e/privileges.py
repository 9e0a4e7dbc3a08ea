"""A user whom file modes bind, whoever runs the tests: another one for root, oneself for everybody else."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNPRIVILEGED: int | None = 65534 if os.geteuid() == 0 else None
"""The user id to become; None: we are that already."""


@contextmanager
def public_directory() -> Iterator[Path]:
    """A directory of that user, on a way that it may walk (which pytest's own directories are not)."""
    with tempfile.TemporaryDirectory(prefix="agentkeep-test-") as name:
        home = Path(name)
        home.chmod(0o755)
        try:
            yield home
        finally:
            subprocess.run(["chmod", "-R", "u+rwX", home], check=True)
