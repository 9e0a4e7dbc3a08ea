"""Where an S3 backend of one test stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class S3Place:
    """A prefix with nothing there yet."""

    url: str
    options: dict[str, str]
