"""S3-compatible storage. `S3Backend` is all that others need; importing it imports boto3."""

from storage_backends.s3.backend import S3Backend

__all__ = ["S3Backend"]
