"""The seal: a digest in the manifest over everything else that the manifest says.

It is SHA-256 over the manifest without `seal`, in the canonical form of RFC 8785 (JCS). A manifest holds
strings, whole numbers below 2^53, booleans and null only, for which that form is easy to make anywhere.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from daemon.errors import MalformedBundle

MAX_MANIFEST_BYTES = 64 << 20
"""What a reader takes into memory, so no more is written."""
_PREFIX = "sha256:"


def seal_of(manifest: dict[str, Any]) -> str:
    """`sha256:<hex>` over `manifest`, its own `seal` aside. Raises ValueError for what JCS cannot hold."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return _PREFIX + hashlib.sha256(canonical(rest)).hexdigest()


def canonical(value: Any) -> bytes:
    """RFC 8785 for the values that a manifest may hold. Raises ValueError (a lone surrogate)."""
    return json.dumps(_sorted(value), ensure_ascii=False, separators=(",", ":")).encode()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        # JCS sorts by UTF-16 code units, which is not the order of code points.
        return {key: _sorted(value[key]) for key in sorted(value, key=lambda key: key.encode("utf-16-be"))}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    if isinstance(value, int) and abs(value) >= 1 << 53:
        raise ValueError("a number that JSON readers do not hold exactly")
    return value


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object from outside: UTF-8, no duplicate keys, no fractions, no depth that hurts.

    Raises MalformedBundle.
    """
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise MalformedBundle(f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise MalformedBundle(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"a number that is not whole: {text[:20]}")
