"""A directory as a destination, also on NFS. `FilesystemBackend` is all that others need."""

from storage_backends.filesystem.backend import FilesystemBackend

__all__ = ["FilesystemBackend"]
