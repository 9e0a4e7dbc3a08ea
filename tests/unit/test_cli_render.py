"""What is shown says all of it, breaks no machine that reads it, and controls no terminal."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.check import Finding
from daemon.cli import render
from daemon.errors import ConfigError, SiblingMismatch
from daemon.model import (
    ArtifactKind,
    BundleKey,
    Consistency,
    Excluded,
    Failure,
    Manifest,
    SnapshotRecord,
    Symlink,
    Upload,
    UploadState,
)
from daemon.restore import RestoreReport
from tests.property.honest import Piece, seal

ID = "019ab1b5-7e00-7abc-8def-0123456789ab"
RECORD = SnapshotRecord(
    key=BundleKey("default", "ana", ID, encrypted=True),
    created_at_ms=1_764_000_000_000,
    label="before the move",
    complete=True,
    consistency=Consistency(level="point_in_time", window_ms=12, attempts=2),
    size_bytes=2048,
    sha256="a" * 64,
    content_bytes=5 << 20,
    uploads={"nas": Upload(UploadState.CONFIRMED), "offsite": Upload(UploadState.PENDING, 1, "timed out")},
)
INCOMPLETE = replace(
    RECORD,
    complete=False,
    consistency=Consistency(level="per_source", window_ms=12, attempts=5, moved=("db/x.sqlite",)),
    failures=(Failure(source="y.sqlite", reason="is corrupt", hint="mend it", kept_as=("opaque/y.sqlite",)),),
)
HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/red] :smile: \x9b31m\u202egnp.exe\r\x00"


@pytest.fixture(autouse=True)
def _no_colours_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)


def manifest(**facts: Any) -> Manifest:
    return seal([Piece("files/notes.txt", b"x", ArtifactKind.FILE)], **facts).manifest


def assert_harmless(shown: str) -> None:
    """Nothing in it but what can be seen, and none of it taken for markup or a code."""
    assert not [char for char in shown if not char.isprintable() and char != "\n"]
    assert "\\x1b]0;owned\\x07" in shown
    assert "[red]x[/red] :smile:" in shown
    assert "\\u202egnp.exe" in shown


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (2 << 40, "2.0 TiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_a_size_is_shown_in_the_unit_that_fits(size_bytes: int, shown: str) -> None:
    assert render.human_bytes(size_bytes) == shown


# --- documents ------------------------------------------------------------------------------------


def test_a_document_is_one_line_of_json_s_worth_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """Also with bytes in it that are no text, as a path may have."""
    render.print_json({"path": "caf\u00e9 \udcff", "hostile": HOSTILE})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert shown.endswith("}\n")
    assert json.loads(shown) == {"path": "caf\u00e9 \udcff", "hostile": HOSTILE}


def test_a_snapshot_as_a_document_says_all_that_is_known() -> None:
    document = json.loads(json.dumps(render.snapshot_document(INCOMPLETE)))
    assert document["snapshot_id"] == ID
    assert document["key"] == f"tenants/default/snapshots/ana/{ID}.tar.zst.age"
    assert document["complete"] is False
    assert document["consistency"]["moved"] == ["db/x.sqlite"]
    assert document["failures"][0]["kept_as"] == ["opaque/y.sqlite"]
    assert document["uploads"] == {"nas": "confirmed", "offsite": "pending"}
    assert document["upload_errors"] == {"offsite": "timed out"}
    assert document["size_bytes"] == 2048


def test_an_error_as_a_document_has_its_kind_code_message_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_error(SiblingMismatch("not the same", hint="try again"), as_json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "error": {"kind": "SiblingMismatch", "exit_code": 65, "message": "not the same", "hint": "try again"}
    }
    assert "not the same" in shown.err


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_goes_to_stderr_with_its_fix_on_its_own_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render.print_error(ConfigError("line 1 is wrong\nline 2 too", hint="mend them"), as_json=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: line 1 is wrong\nline 2 too\n  fix: mend them\n"


def test_an_error_without_a_fix_has_no_line_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_error(ConfigError("wrong"), as_json=False)
    assert capsys.readouterr().err == "error: wrong\n"


def test_a_long_error_is_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_error(ConfigError("x" * 50 + " " + "y" * 500), as_json=False)
    assert capsys.readouterr().err.splitlines() == ["error: " + "x" * 50 + " " + "y" * 500]


# --- snapshots ------------------------------------------------------------------------------------


def test_a_list_has_a_line_for_each_snapshot_that_nothing_is_cut_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = replace(INCOMPLETE, key=BundleKey("team", "bob", ID, encrypted=False), uploads={})
    render.stdout().print(render.snapshots_table([RECORD, other]))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["snapshot", "agent"]
    for expected in (ID, "ana", "2025-11-24 16:00:00", " complete", "point_in_time", "2.0 KiB"):
        assert expected in first
    assert first.rstrip().endswith("nas: confirmed, offsite: pending")
    for expected in ("team/bob", "incomplete", "per_source"):
        assert expected in second


def test_an_incomplete_snapshot_says_what_is_missing_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    render.print_snapshot(INCOMPLETE)
    shown = capsys.readouterr().out
    for expected in (
        f"snapshot {ID} of agent ana: incomplete",
        "moved        db/x.sqlite",
        "5.0 MiB in a bundle of 2.0 KiB, encrypted",
        f"tenants/default/snapshots/ana/{ID}.tar.zst.age",
        "nas: confirmed",
        "offsite: pending",
        "not captured y.sqlite: is corrupt",
        "fix mend it",
        "kept opaque/y.sqlite (raw bytes)",
    ):
        assert expected in shown


def test_each_destination_s_newest_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    newer = replace(RECORD, uploads={"offsite": Upload(UploadState.FAILED, 2, "forbidden")})
    render.print_upload_errors([RECORD, newer])
    shown = capsys.readouterr().out
    assert "forbidden" in shown
    assert "timed out" not in shown
    done = Upload(UploadState.CONFIRMED, 2, "timed out")
    render.print_upload_errors([replace(RECORD, uploads={"offsite": done})])
    assert capsys.readouterr().out == ""


def test_a_complete_snapshot_says_nothing_of_failures(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_snapshot(RECORD)
    shown = capsys.readouterr().out
    assert "of agent ana: complete" in shown
    assert "not captured" not in shown


def test_a_manifest_shows_what_is_in_it_and_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    excluded = (Excluded(reason="secret", pattern="*.pem", count=2),)
    shown_one = manifest(label="before the move", excluded=excluded, tool_versions={"agentkeep": "0.1.0"})
    render.print_manifest(shown_one)
    shown = capsys.readouterr().out
    for expected in (
        "before the move",
        "2 x *.pem (secret)",
        "files/notes.txt",
        shown_one.seal,
        "agentkeep 0.1.0",
    ):
        assert expected in shown
    assert "complete     yes" in shown


def test_levels_are_shown_with_their_status(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_levels([("sibling", "ok", "SHA-256 aa"), ("container", "failed", "cut")])
    render.print_levels([("seal", "not checked", "")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["sibling", "ok", "SHA-256", "aa"],
        ["container", "failed", "cut"],
        ["seal", "not", "checked"],
    ]


def test_a_restore_says_what_was_not_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    failures = (Failure(source="y.sqlite", reason="is corrupt"),)
    restored = manifest(snapshot_id=ID, complete=False, failures=failures)
    render.print_restored(RestoreReport(restored, Path("/srv/ana"), 1, 7, ("state/run.json",)))
    shown = capsys.readouterr().out
    for expected in (
        f"restored {ID} of agent ana to /srv/ana",
        "1 artifacts, 7 B, every one verified",
        "the snapshot is incomplete",
        "y.sqlite: is corrupt",
        "not put back: state/run.json",
    ):
        assert expected in shown


# --- what came from outside -----------------------------------------------------------------------


def test_a_hostile_error_controls_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_error(ConfigError(HOSTILE, hint=HOSTILE), as_json=False)
    shown = capsys.readouterr().err
    assert_harmless(shown.splitlines()[0])
    assert_harmless(shown.splitlines()[1])


def test_a_hostile_manifest_controls_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = manifest(
        label=HOSTILE,
        created_by=HOSTILE,
        complete=False,
        failures=(Failure(source=HOSTILE, reason=HOSTILE),),
        excluded=(Excluded(reason=HOSTILE, pattern=HOSTILE, count=1),),
        symlinks=(Symlink(path="files/link", target_b64=b64encode(b"\x1b]0;owned\x07").decode()),),
        tool_versions={"agentkeep": HOSTILE},
    )
    render.print_manifest(hostile)
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert shown.count("owned") == 8


def test_a_hostile_snapshot_or_restore_controls_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failures = (Failure(source=HOSTILE, reason=HOSTILE, hint=HOSTILE),)
    render.print_snapshot(
        replace(
            INCOMPLETE,
            failures=failures,
            consistency=Consistency(level="per_source", window_ms=1, attempts=1, moved=(HOSTILE,)),
        )
    )
    assert_harmless(capsys.readouterr().out)
    render.print_upload_errors([replace(RECORD, uploads={"x": Upload(UploadState.FAILED, 1, HOSTILE)})])
    assert_harmless(capsys.readouterr().out)
    restored = manifest(complete=False, failures=failures)
    render.print_restored(RestoreReport(restored, Path(f"/srv/{HOSTILE}"), 1, 7, (HOSTILE,)))
    assert_harmless(capsys.readouterr().out)


def test_hostile_levels_and_findings_control_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_levels([("seal", "failed", HOSTILE)])
    assert_harmless(capsys.readouterr().out)
    render.print_findings([Finding(HOSTILE, "failure", HOSTILE, hint=HOSTILE)])
    assert_harmless(capsys.readouterr().out)


def test_a_path_that_is_no_text_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_error(ConfigError("no such path: /srv/caf\udce9"), as_json=False)
    assert capsys.readouterr().err == "error: no such path: /srv/caf\\udce9\n"
