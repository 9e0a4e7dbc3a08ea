"""The command line: the only place that prints or exits. `main` is the entry point."""

from daemon.cli.app import main

__all__ = ["main"]
