"""Whatever bytes a path has, it has one name in a bundle, and that name leads back to it and nowhere else."""

from __future__ import annotations

import os

from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.model import (
    BundleKey,
    from_member_name,
    is_safe_member_name,
    is_snapshot_id,
    is_valid_name,
    mtime_ns_of,
    mtime_text,
    new_snapshot_id,
    snapshot_time,
    to_member_name,
)

_SEGMENT = st.binary(min_size=1, max_size=40).filter(
    lambda part: b"/" not in part and b"\0" not in part and part not in (b".", b"..")
)
_AWKWARD = st.text("aé\\x0a\n/€\U0001f9e0.c39 ", min_size=1, max_size=12).map(str.encode)
PATHS = st.one_of(
    st.lists(_SEGMENT, min_size=1, max_size=5).map(b"/".join),
    _AWKWARD.filter(lambda path: b"\0" not in path),
).map(os.fsdecode)
NAMES = st.one_of(
    st.text(max_size=40),
    st.text("\\x0123456789abcdefé€/.", max_size=20),
    st.text("\\xc3a9\\0", max_size=20),
    PATHS,
)


@given(PATHS)
@settings(max_examples=150)
@example(os.fsdecode(b"\xc3\n"))
@example(os.fsdecode("é\n".encode()))
def test_a_name_leads_back_to_its_path(path: str) -> None:
    name = to_member_name(path)
    assert from_member_name(name) == path
    assert name.encode().decode() == name, "text that every tool can hold"
    assert not any(ord(char) < 0x20 or char == "\x7f" for char in name)
    assert name.count("/") == path.count("/")


@given(PATHS, PATHS)
@settings(max_examples=150)
@example(os.fsdecode(b"\xff"), "\\xff")
@example("\n", "\\x0a")
def test_two_paths_have_two_names(one: str, other: str) -> None:
    assert (to_member_name(one) == to_member_name(other)) == (one == other)


@given(NAMES)
@settings(max_examples=250)
@example("\\xc3\\xa9")
@example("\\xc3\\xa9\\x0a")
@example("\udcc3\udca9")
def test_a_path_has_no_second_name(name: str) -> None:
    """Else two members of a hostile bundle could be one file on the disk."""
    try:
        path = from_member_name(name)
    except ValueError:
        return
    assert to_member_name(os.fsdecode(os.fsencode(path))) == name


@given(NAMES)
@settings(max_examples=250)
def test_a_safe_name_is_a_path_below_and_nothing_else(name: str) -> None:
    if not is_safe_member_name(name):
        return
    raw = os.fsencode(from_member_name(name))
    assert raw
    assert b"\0" not in raw
    assert os.path.normpath(raw) == raw
    assert not raw.startswith((b"/", b"../"))
    assert raw not in (b".", b"..")


@given(PATHS)
@settings(max_examples=150)
def test_every_honest_path_has_a_safe_name(path: str) -> None:
    raw = os.fsencode(path)
    assert is_safe_member_name(to_member_name(path)) == (not {b"", b".", b".."} & set(raw.split(b"/")))


_IDS = st.integers(0, 253_402_300_799_999)


@given(_IDS, _IDS)
def test_ids_sort_by_their_time(one_ms: int, other_ms: int) -> None:
    one, other = new_snapshot_id(at_ms=one_ms), new_snapshot_id(at_ms=other_ms)
    assert is_snapshot_id(one)
    if one_ms != other_ms:
        assert (one < other) == (one_ms < other_ms)
        assert snapshot_time(one) != snapshot_time(other)


@given(
    st.from_regex(r"\A[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?\Z"),
    st.from_regex(r"\A[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?\Z"),
    _IDS,
    st.booleans(),
)
def test_a_key_and_its_text_are_one(tenant: str, agent_id: str, at_ms: int, encrypted: bool) -> None:
    key = BundleKey(tenant, agent_id, new_snapshot_id(at_ms=at_ms), encrypted)
    assert BundleKey.parse(str(key)) == key


@given(st.text("abz019-_A./\n ", max_size=12))
@settings(max_examples=150)
def test_a_text_that_parses_as_a_key_is_its_only_spelling(text: str) -> None:
    key = BundleKey.parse(f"tenants/{text}/snapshots/ana/{new_snapshot_id(at_ms=7)}.tar.zst")
    assert (key is not None) == is_valid_name(text)
    if key is not None:
        assert key.tenant == text


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_a_time_is_kept_to_the_nanosecond(mtime_ns: int) -> None:
    assert mtime_ns_of(mtime_text(mtime_ns)) == mtime_ns
