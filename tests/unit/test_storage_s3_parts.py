"""Part sizes, resume tokens, and the key order of servers that keep a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_backends import BytesSource
from storage_backends.s3.bucket import Page
from storage_backends.s3.listing import walk
from storage_backends.s3.traits import Traits
from storage_backends.s3.upload import MAX_PARTS, ResumeToken, part_size_for

MIB = 1 << 20
NOW = datetime.now(UTC)


@settings(deadline=None)
@given(st.integers(1, 5 << 40), st.sampled_from([5 * MIB, 16 * MIB, 100 * MIB]))
def test_parts_are_never_too_many(size_bytes: int, wanted_bytes: int) -> None:
    part_bytes = part_size_for(size_bytes, wanted_bytes=wanted_bytes)
    assert part_bytes >= wanted_bytes
    assert -(-size_bytes // part_bytes) <= MAX_PARTS
    if part_bytes > wanted_bytes:
        assert part_bytes % MIB == 0
        assert part_bytes - MIB < -(-size_bytes // MAX_PARTS)


def test_a_token_fits_only_its_own_put() -> None:
    source = BytesSource(b"x" * 100)
    traits = Traits(refuses_taken=True, verifies_sha256=True, etag_is_md5=True)
    token = ResumeToken("id", "a", 100, source.sha256, 5 * MIB, True)
    assert ResumeToken.parse(token.text()) == token
    assert token.text().isprintable()
    assert token.fits("a", source, traits=traits)
    assert not token.fits("b", source, traits=traits)
    assert not token.fits("a", BytesSource(b"y" * 100), traits=traits)
    assert not token.fits("a", source, traits=replace(traits, verifies_sha256=False))
    assert not replace(token, size_bytes=MAX_PARTS * 5 * MIB + 1).fits("a", source, traits=traits)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        "{}",
        '{"upload_id":"i","key":"a","size_bytes":0,"sha256":"s","part_size_bytes":1,"checksums":true}',
        '{"upload_id":"i","key":"a","size_bytes":1,"sha256":"s","part_size_bytes":true,"checksums":true}',
        '{"upload_id":"","key":"a","size_bytes":1,"sha256":"s","part_size_bytes":1,"checksums":true}',
        '{"upload_id":7,"key":"a","size_bytes":1,"sha256":"s","part_size_bytes":1,"checksums":true}',
        '{"upload_id":"i","key":"a","size_bytes":1,"sha256":"s","part_size_bytes":1,"checksums":1}',
        '{"upload_id":"i","key":"a","size_bytes":1,"sha256":"s","part_size_bytes":1,"checksums":true,"x":1}',
    ],
)
def test_strange_tokens_are_none(text: str) -> None:
    assert ResumeToken.parse(text) is None


@dataclass
class Listing:
    """A bucket that lists like S3 (by bytes) or like a tree (a directory at its name without a slash)."""

    keys: Sequence[str]
    like_a_tree: bool

    def list_level(self, prefix: str, *, start_after: str, token: str | None, max_keys: int) -> Page:
        place = (lambda name: name.rstrip("/")) if self.like_a_tree else (lambda name: name)
        names = {self._name(key, prefix) for key in self.keys if key.startswith(prefix)}
        ordered = sorted(names, key=lambda name: (place(name), name))
        if token is not None:
            ordered = ordered[ordered.index(token) + 1 :]
        elif self.like_a_tree:
            ordered = [name for name in ordered if place(name) > start_after]
        else:
            ordered = [name for name in ordered if name > start_after or start_after.startswith(name)]
        page, rest = ordered[:max_keys], ordered[max_keys:]
        return Page(
            {name: (1, NOW) for name in page if not name.endswith("/")},
            [name for name in page if name.endswith("/")],
            page[-1] if rest else None,
        )

    @staticmethod
    def _name(key: str, prefix: str) -> str:
        end = key.find("/", len(prefix))
        return key if end < 0 else key[: end + 1]


KEY = st.text(alphabet="a-.0", min_size=1, max_size=3).filter(lambda name: not name.startswith("."))
KEYS = st.lists(st.lists(KEY, min_size=1, max_size=3).map("/".join), max_size=25, unique=True)


@settings(max_examples=300, deadline=None)
@given(KEYS, st.booleans(), st.integers(1, 4), st.text("a-.0/", max_size=4), st.text("a-.0/", max_size=5))
def test_keys_come_in_order_whatever_the_servers(
    keys: list[str], like_a_tree: bool, page_keys: int, prefix: str, start_after: str
) -> None:
    bucket = Listing(keys, like_a_tree)
    walked = walk(bucket, prefix=prefix, start_after=start_after, page_keys=page_keys)  # type: ignore[arg-type]
    expected = sorted(key for key in keys if key.startswith(prefix) and key > start_after)
    assert [info.key for info in walked] == expected
