"""The application: from live agents to verified bundles and back. `docs/ARCHITECTURE.md` is its map."""

__version__ = "0.1.0"
