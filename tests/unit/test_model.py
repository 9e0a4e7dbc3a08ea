"""Ids that sort by time, keys with one spelling, names that become no other file's."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from daemon.model import (
    MAX_MEMBER_NAME_CHARS,
    BundleKey,
    Consistency,
    Failure,
    Manifest,
    SnapshotRecord,
    encode_bytes,
    fixed_head,
    from_member_name,
    has_wildcard,
    is_safe_member_name,
    is_snapshot_id,
    is_valid_name,
    mtime_ns_of,
    mtime_text,
    new_snapshot_id,
    snapshot_time,
    to_member_name,
)

ID = "019ab1b5-7e00-7abc-8def-0123456789ab"


# --- ids ------------------------------------------------------------------------------------------


def test_ids_sort_as_their_times_do() -> None:
    times = [0, 1, 999, 1000, 1 << 16, 1 << 32, 1_764_000_000_123, 1_764_000_000_124, (1 << 47) + 5]
    ids = [new_snapshot_id(at_ms=ms) for ms in times]
    assert sorted(ids) == ids


def test_an_id_tells_its_millisecond() -> None:
    moment = datetime(2026, 11, 1, 10, 0, 0, 123_000, tzinfo=UTC)
    snapshot_id = new_snapshot_id(at_ms=int(moment.timestamp() * 1000))
    assert snapshot_time(snapshot_id) == moment
    assert snapshot_time(new_snapshot_id(at_ms=0)) == datetime(1970, 1, 1, tzinfo=UTC)


def test_an_id_is_of_now_if_nobody_says_otherwise() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    assert before <= snapshot_time(new_snapshot_id()) <= datetime.now(UTC)


def test_ids_of_one_millisecond_differ() -> None:
    assert len({new_snapshot_id(at_ms=7) for _ in range(1000)}) == 1000


def test_every_new_id_is_one() -> None:
    assert all(is_snapshot_id(new_snapshot_id(at_ms=ms)) for ms in range(0, 10**12, 10**9 + 7))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "latest",
        ID.upper(),
        ID[:-1],
        ID + "0",
        ID + "\n",
        " " + ID,
        ID.replace("-", ""),
        ID.replace("-7abc", "-4abc"),
        ID.replace("-8def", "-cdef"),
        f"{{{ID}}}",
        "ffffffff-ffff-7fff-bfff-ffffffffffff",
    ],
    ids=ascii,
)
def test_what_is_no_id_is_none(text: str) -> None:
    assert not is_snapshot_id(text)


def test_every_id_has_a_date() -> None:
    last = "e677d21f-dbff-7000-8000-000000000000"
    assert is_snapshot_id(last)
    assert snapshot_time(last).year == 9999
    assert not is_snapshot_id("e677d21f-dc00-7000-8000-000000000000")


# --- names and keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "ana", "ana-2", "a_b", "a--b", "x" * 64, "agent-01_eu"])
def test_names_that_are_allowed(name: str) -> None:
    assert is_valid_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Ana",
        "-a",
        "a-",
        "_a",
        "a_",
        "-",
        "a b",
        "a.b",
        "a/b",
        "..",
        "é",
        "a\n",
        "\na",
        "x" * 65,
        "a\0",
    ],
    ids=ascii,
)
def test_names_that_are_not(name: str) -> None:
    assert not is_valid_name(name)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_key_and_its_text_are_one(encrypted: bool) -> None:
    key = BundleKey("default", "ana", ID, encrypted)
    suffix = ".tar.zst.age" if encrypted else ".tar.zst"
    assert str(key) == f"tenants/default/snapshots/ana/{ID}{suffix}"
    assert key.sibling == f"{key}.sha256"
    assert key.file_name == ID + suffix
    assert BundleKey.parse(str(key)) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"tenants/default/snapshots/ana/{ID}",
        f"tenants/default/snapshots/ana/{ID}.tar",
        f"tenants/default/snapshots/ana/{ID}.tar.zst.age.age",
        f"tenants/default/snapshots/ana/{ID}.tar.zst.sha256",
        f"tenants/default/snapshots/ana/{ID}.tar.zst\n",
        f"/tenants/default/snapshots/ana/{ID}.tar.zst",
        f"x/tenants/default/snapshots/ana/{ID}.tar.zst",
        f"tenants/default/snapshots/ana/more/{ID}.tar.zst",
        f"tenants//snapshots/ana/{ID}.tar.zst",
        f"tenants/../snapshots/ana/{ID}.tar.zst",
        f"tenants/default/snapshots/Ana/{ID}.tar.zst",
        f"tenants/default/snapshots/ana/{ID.upper()}.tar.zst",
        "tenants/default/snapshots/ana/latest.tar.zst",
    ],
)
def test_what_is_no_key_is_none(text: str) -> None:
    assert BundleKey.parse(text) is None


# --- names inside a bundle ------------------------------------------------------------------------

SPELLINGS = {
    b"plain/notes.md": "plain/notes.md",
    "caf\u00e9 \U0001f9e0".encode(): "caf\u00e9 \U0001f9e0",
    b"latin-1 caf\xe9": r"latin-1 caf\xe9",
    b"new\nline": r"new\x0aline",
    b"tab\tand\x7f": r"tab\x09and\x7f",
    b"back\\slash": r"back\x5cslash",
    b"\\x41": r"\x5cx41",
    "caf\u00e9\n".encode(): "caf\u00e9\\x0a",
    b"\xff\xfe": r"\xff\xfe",
    b"\xc3": r"\xc3",
    b"e\xcc\x81": "e\u0301",
    b"spaces  ": "spaces  ",
    b"-rf": "-rf",
}


@pytest.mark.parametrize(("raw", "name"), SPELLINGS.items(), ids=[ascii(raw) for raw in SPELLINGS])
def test_a_path_has_one_name_and_a_name_one_path(raw: bytes, name: str) -> None:
    assert to_member_name(os.fsdecode(raw)) == name
    assert os.fsencode(from_member_name(name)) == raw
    assert is_safe_member_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "new\nline",
        "\x00",
        "\x7f",
        "back\\slash",
        "\\",
        r"\x4",
        r"\xZZ",
        r"\x41",
        r"\xFF",
        r"\X0a",
        r"\xc3\xa9",
        r"\xc3\xa9\x0a",
        "\udcff",
        "\udcc3\udca9",
    ],
    ids=ascii,
)
def test_another_spelling_is_no_name(name: str) -> None:
    with pytest.raises(ValueError):
        from_member_name(name)
    assert not is_safe_member_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/a", "a/", "a//b", "a/./b", "a/../b", "../a", "a/..", "./a", r"a\x00b"],
    ids=ascii,
)
def test_a_name_that_leads_elsewhere_is_not_safe(name: str) -> None:
    assert not is_safe_member_name(name)


@pytest.mark.parametrize("name", ["...", "..a", "a..", ".hidden", "a/..b/c", " ", "~", "a:b", "C:"])
def test_a_name_that_only_looks_odd_is_safe(name: str) -> None:
    assert is_safe_member_name(name)


def test_a_name_may_be_long_and_not_endless() -> None:
    assert is_safe_member_name("x" * MAX_MEMBER_NAME_CHARS)
    assert not is_safe_member_name("x" * (MAX_MEMBER_NAME_CHARS + 1))


def test_any_bytes_of_a_link_s_target_can_be_told() -> None:
    assert encode_bytes(os.fsdecode(b"../caf\xe9\n")) == "Li4vY2Fm6Qo="


# --- times, globs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mtime_ns", "text"),
    [
        (0, "0.000000000"),
        (1, "0.000000001"),
        (1_732_370_400_000_000_001, "1732370400.000000001"),
        (-1, "-1.999999999"),
        (-5_000_000_001, "-6.999999999"),
        ((1 << 63) - 1, "9223372036.854775807"),
    ],
)
def test_a_time_is_kept_to_the_nanosecond(mtime_ns: int, text: str) -> None:
    assert mtime_text(mtime_ns) == text
    assert mtime_ns_of(text) == mtime_ns


@pytest.mark.parametrize(
    ("pattern", "head"),
    [
        ("**", "."),
        ("*.sqlite", "."),
        ("notes.md", "."),
        ("db/*.sqlite", "db"),
        ("db/main.sqlite", "db"),
        ("a/b/**/c/d", "a/b"),
        ("a/[bc]/d", "a"),
        ("a/b?/c", "a"),
        ("/srv/ana/**", "/srv/ana"),
        ("/srv/ana/x.db", "/srv/ana"),
        ("/*.db", "/"),
        ("/x", "/"),
    ],
)
def test_a_glob_s_head_is_the_directory_before_its_first_wildcard(pattern: str, head: str) -> None:
    assert fixed_head(pattern) == head


def test_wildcards_are_known() -> None:
    assert [has_wildcard(pattern) for pattern in ("a/b", "a*", "a?", "[a]", "**")] == [False, *[True] * 4]


# --- documents ------------------------------------------------------------------------------------


def manifest(**fields: object) -> Manifest:
    sound: dict[str, object] = {
        "snapshot_id": ID,
        "agent_id": "ana",
        "tenant": "default",
        "created_at_ms": 0,
        "created_by": "test",
        "complete": True,
        "consistency": Consistency(level="point_in_time", window_ms=0, attempts=1),
        "artifacts": (),
        "seal": "",
    }
    return Manifest.model_validate(sound | fields)


def test_whoever_names_failures_is_not_complete() -> None:
    failure = Failure(source="x.sqlite", reason="corrupt")
    assert not manifest(complete=False, failures=(failure,)).complete
    with pytest.raises(ValidationError, match="cannot be complete"):
        manifest(failures=(failure,))


@pytest.mark.parametrize("memdir", [None, ".", "memory", "a/b", "caf\u00e9"])
def test_the_memdir_is_the_root_or_below(memdir: str | None) -> None:
    assert manifest(memdir=memdir).memdir == memdir


@pytest.mark.parametrize("memdir", ["", "..", "../x", "/x", "a/../..", "./x", "x/"])
def test_the_memdir_is_nowhere_else(memdir: str) -> None:
    with pytest.raises(ValidationError, match="memdir"):
        manifest(memdir=memdir)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        manifest().complete = False


def test_a_record_knows_its_instant_in_utc() -> None:
    record = SnapshotRecord(
        key=BundleKey("default", "ana", ID, encrypted=False),
        created_at_ms=1_764_000_000_500,
        label=None,
        complete=True,
        consistency=Consistency(level="point_in_time", window_ms=0, attempts=1),
        size_bytes=1,
        sha256="0" * 64,
        content_bytes=1,
    )
    assert record.snapshot_id == ID
    assert record.created_at == datetime(2025, 11, 24, 16, 0, 0, 500_000, tzinfo=UTC)
