"""Bundles put back: whole or not at all, what they say and nothing else, wherever that is allowed."""

from __future__ import annotations

import base64
import dataclasses
import os
import resource
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.capture import take_cut
from daemon.errors import (
    BusyError,
    IntegrityError,
    LocalWriteError,
    MalformedBundle,
    RefusedError,
    SiblingMismatch,
    SiblingMissing,
)
from daemon.locate import LocalBundle
from daemon.model import (
    AgentSpec,
    ArtifactKind,
    Directory,
    Failure,
    GitFacts,
    StateHome,
    Symlink,
)
from daemon.restore import restore_agent, restore_to_directory
from daemon.snapshots import Sealing, Store, take_snapshot
from tests.e2e.trees import Entry, listing
from tests.harness.sample_agent.builder import run_git
from tests.property.honest import Piece, place, seal


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "room" / "back"


@pytest.fixture(autouse=True)
def room(target: Path) -> Path:
    """Where the target is to be; whatever happens, nothing but the target is ever left in it."""
    target.parent.mkdir()
    return target.parent


def bundle_of(tmp_path: Path, *pieces: Piece, **facts: Any) -> LocalBundle:
    return place(tmp_path, seal(pieces, **facts).data)


def link(path: str, to: str | bytes) -> Symlink:
    return Symlink(path=path, target_b64=base64.b64encode(os.fsencode(to)).decode())


def snapshot_of(root: Path, tmp_path: Path, **fields: Any) -> LocalBundle:
    """A bundle as it is really made."""
    store = Store(tmp_path / "state")
    spec = spec_of(root, **fields)
    record = take_snapshot(store, spec, sealing=Sealing())
    assert record.complete, record.failures
    return LocalBundle(store.path_of(record.key), record.key)


def spec_of(root: Path, **fields: Any) -> AgentSpec:
    return AgentSpec("default", "ana", root, **{"include": ("**",), **fields})


NOTE = Piece("files/note.md", b"a note\n")


# --- where it may go --------------------------------------------------------------------------------------


def test_a_target_that_is_not_there_is_made(tmp_path: Path, target: Path) -> None:
    report = restore_to_directory(bundle_of(tmp_path, NOTE), target)
    assert (target / "files/note.md").read_bytes() == b"a note\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o700  # memory is nobody else's business
    assert (report.target, report.artifacts, report.content_bytes) == (target, 1, 7)


def test_missing_parents_are_made(tmp_path: Path, target: Path) -> None:
    restore_to_directory(bundle_of(tmp_path, NOTE), target / "deep/er")
    assert (target / "deep/er/files/note.md").read_bytes() == b"a note\n"


def test_an_empty_directory_is_filled_and_keeps_its_mode(tmp_path: Path, target: Path) -> None:
    target.mkdir()
    target.chmod(0o750)
    restore_to_directory(bundle_of(tmp_path, NOTE), target)
    assert (target / "files/note.md").read_bytes() == b"a note\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


def test_a_relative_target_is_taken_from_where_one_is(
    tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path, NOTE)
    monkeypatch.chdir(room)
    assert restore_to_directory(bundle, Path("back")).target == room / "back"
    assert (room / "back/files/note.md").exists()


def occupy_with_a_file(target: Path) -> None:
    target.mkdir()
    (target / "precious.md").write_text("do not touch\n")


def occupy_with_a_hidden_file(target: Path) -> None:
    target.mkdir()
    (target / ".precious").write_text("do not touch\n")


def occupy_with_an_empty_directory(target: Path) -> None:
    (target / "empty").mkdir(parents=True)


def be_a_file(target: Path) -> None:
    target.write_text("do not touch\n")


def be_a_symlink_to_an_empty_directory(target: Path) -> None:
    target.with_name("empty").mkdir()
    target.symlink_to("empty")


def be_a_dangling_symlink(target: Path) -> None:
    target.symlink_to("nowhere")


@pytest.mark.parametrize(
    "occupy",
    [
        occupy_with_a_file,
        occupy_with_a_hidden_file,
        occupy_with_an_empty_directory,
        be_a_file,
        be_a_symlink_to_an_empty_directory,
        be_a_dangling_symlink,
    ],
)
def test_a_target_that_is_something_already_is_refused_untouched(
    tmp_path: Path, room: Path, target: Path, occupy: Callable[[Path], None]
) -> None:
    occupy(target)
    before = listing(room)
    with pytest.raises(RefusedError) as raised:
        restore_to_directory(bundle_of(tmp_path, NOTE), target)
    assert raised.value.exit_code == 77
    assert raised.value.hint
    assert listing(room) == before


def test_a_target_that_is_being_restored_to_is_busy(tmp_path: Path, target: Path, room: Path) -> None:
    """Another restore that is under way holds the scratch beside the target."""
    other = bundle_of(tmp_path, NOTE)
    raised: list[Exception] = []

    def meanwhile(_bytes: int) -> None:
        if not raised:
            with pytest.raises(BusyError) as busy:
                restore_to_directory(other, target)
            raised.append(busy.value)

    restore_to_directory(bundle_of(tmp_path, NOTE), target, progress=meanwhile)
    assert raised
    assert (target / "files/note.md").exists()
    assert [path.name for path in room.iterdir()] == ["back"]


def test_a_target_that_is_filled_meanwhile_is_left_alone(tmp_path: Path, target: Path, room: Path) -> None:
    def meanwhile(_bytes: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "precious.md").write_text("do not touch\n")

    with pytest.raises(LocalWriteError, match="filled") as raised:
        restore_to_directory(bundle_of(tmp_path, NOTE), target, progress=meanwhile)
    assert raised.value.exit_code == 73
    assert [path.name for path in target.iterdir()] == ["precious.md"]
    assert [path.name for path in room.iterdir()] == ["back"]


def test_what_a_killed_restore_left_is_tidied_by_the_next(tmp_path: Path, target: Path, room: Path) -> None:
    left = room / ".agentkeep-restore-back"
    left.mkdir(mode=0o700)
    (left / "tree/closed").mkdir(parents=True)
    (left / "tree/closed/x").write_text("half a restore")
    (left / "tree/closed").chmod(0o500)
    restore_to_directory(bundle_of(tmp_path, NOTE), target)
    assert [path.name for path in room.iterdir()] == ["back"]


# --- what is not to be trusted ----------------------------------------------------------------------------


def without_sibling(bundle: LocalBundle) -> None:
    bundle.path.with_name(f"{bundle.path.name}.sha256").unlink()


def with_a_sibling_in_disorder(bundle: LocalBundle) -> None:
    sibling = bundle.path.with_name(f"{bundle.path.name}.sha256")
    sibling.write_bytes(sibling.read_bytes().replace(b"  ", b" *"))


def with_the_sibling_of_another(bundle: LocalBundle) -> None:
    sibling = bundle.path.with_name(f"{bundle.path.name}.sha256")
    sibling.write_bytes(b"0" * 64 + sibling.read_bytes()[64:])


def cut_short(bundle: LocalBundle) -> None:
    os.truncate(bundle.path, bundle.path.stat().st_size - 1)


def emptied(bundle: LocalBundle) -> None:
    os.truncate(bundle.path, 0)


def with_one_bit_changed(bundle: LocalBundle) -> None:
    data = bytearray(bundle.path.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.path.write_bytes(data)


def with_something_added(bundle: LocalBundle) -> None:
    bundle.path.write_bytes(bundle.path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("tamper", "error"),
    [
        (without_sibling, SiblingMissing),
        (with_a_sibling_in_disorder, SiblingMismatch),
        (with_the_sibling_of_another, SiblingMismatch),
        (cut_short, IntegrityError),
        (emptied, IntegrityError),
        (with_one_bit_changed, IntegrityError),
        (with_something_added, IntegrityError),
    ],
)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_bundle_that_is_not_proven_leaves_nothing(
    tmp_path: Path,
    room: Path,
    target: Path,
    tamper: Callable[[LocalBundle], None],
    error: type[Exception],
    existing: bool,
) -> None:
    if existing:
        target.mkdir()
    before = listing(room)
    bundle = bundle_of(tmp_path, NOTE, Piece("files/big", os.urandom(300_000)))
    tamper(bundle)
    with pytest.raises(error) as raised:
        restore_to_directory(bundle, target if existing else target / "deep/er")
    assert isinstance(raised.value, IntegrityError)
    assert raised.value.exit_code == 65
    assert listing(room) == before


def test_a_database_that_was_damaged_when_it_was_captured_comes_back_as_it_was_and_is_named(
    tmp_path: Path, target: Path
) -> None:
    """Its bytes are proven; to refuse it would keep everything else of the agent from coming back."""
    with closing(sqlite3.connect(tmp_path / "made.sqlite")) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [("word " * 50,)] * 500)
        connection.commit()
    data = bytearray((tmp_path / "made.sqlite").read_bytes())
    data[8192:8300] = bytes(108)
    bundle = bundle_of(tmp_path, Piece("sqlite/memory.sqlite", bytes(data), ArtifactKind.SQLITE))
    report = restore_to_directory(bundle, target)
    assert (target / "sqlite/memory.sqlite").read_bytes() == bytes(data)
    (problem,) = report.unsound
    assert problem.startswith("sqlite/memory.sqlite: ")
    assert not report.is_whole


def test_a_state_value_that_is_no_json_inside_a_sound_bundle_is_refused(
    tmp_path: Path, room: Path, target: Path
) -> None:
    bundle = bundle_of(tmp_path, Piece("state/cursor.json", b"{", ArtifactKind.STATE))
    with pytest.raises(IntegrityError, match="not valid JSON"):
        restore_to_directory(bundle, target)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    ["memory_files/.git/config", "memory_files/.git", "elsewhere/x", "files", "manifest.json/x"],
)
def test_a_member_where_none_may_be_is_refused(tmp_path: Path, room: Path, target: Path, path: str) -> None:
    with pytest.raises(MalformedBundle):
        restore_to_directory(bundle_of(tmp_path, Piece(path, b"x"), memdir="."), target)
    assert list(room.iterdir()) == []


def test_a_member_that_wants_the_place_of_anothers_directory_is_refused(tmp_path: Path, target: Path) -> None:
    for pieces in (
        [Piece("files/a", b"x"), Piece("files/a/b", b"y")],
        [Piece("files/a/b", b"y"), Piece("files/a", b"x")],
    ):
        with pytest.raises(MalformedBundle):
            restore_to_directory(bundle_of(tmp_path, *pieces), target)


def test_the_bundle_of_another_agent_is_refused_before_anything_is_unpacked(
    tmp_path: Path, target: Path
) -> None:
    for whose in ({"agent_id": "bob"}, {"tenant": "other"}):
        sealed = seal([Piece("files/large", os.urandom(8 << 20))], **whose)
        data = sealed.data[: len(sealed.data) // 2]  # what would be unpacked is not even there
        with pytest.raises(RefusedError, match=r"bob|other") as raised:
            restore_agent(place(tmp_path, data), spec_of(target))
        assert raised.value.exit_code == 77
        assert not target.exists()


def test_a_bundle_under_the_key_of_another_is_refused(tmp_path: Path, target: Path) -> None:
    sealed, other = seal([NOTE]), seal([NOTE])
    bundle = place(tmp_path, sealed.data)
    moved = LocalBundle(bundle.path, other.key)
    with pytest.raises(MalformedBundle, match="says that it is"):
        restore_to_directory(moved, target)
    assert not target.exists()


# --- symlinks ---------------------------------------------------------------------------------------------

HOSTILE = {
    "absolute": [link("files/a", "/etc/passwd")],
    "escaping": [link("files/a", "../../x")],
    "escaping from the depth": [link("files/d/e/a", "../../../../x")],
    "through the middle": [link("files/a", "b/../../../x")],
    "the root's parent": [link("files/a", "../..")],
}


@pytest.mark.parametrize("links", HOSTILE.values(), ids=HOSTILE.keys())
def test_symlinks_that_lead_out_are_not_made(tmp_path: Path, target: Path, links: list[Symlink]) -> None:
    restore_to_directory(bundle_of(tmp_path, NOTE, symlinks=links), target)
    assert [path for path in target.rglob("*") if path.is_symlink()] == []
    assert (target / "files/note.md").exists()


def test_a_symlink_below_a_symlink_is_refused(tmp_path: Path, room: Path, target: Path) -> None:
    """Where it would really lie, `..` means something else."""
    links = [link("files/d/e/a", "../.."), link("files/d/e/a/c", "../../../x")]
    with pytest.raises(MalformedBundle):
        restore_to_directory(bundle_of(tmp_path, NOTE, symlinks=links), target)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("encoded", ["", "!", "YQ", "YQBh", base64.b64encode(b"x" * 5000).decode()])
def test_a_symlink_whose_target_is_none_is_refused(tmp_path: Path, target: Path, encoded: str) -> None:
    broken = Symlink.model_construct(path="files/a", target_b64=encoded)  # as somebody else would write it
    with pytest.raises(MalformedBundle):
        restore_to_directory(bundle_of(tmp_path, NOTE, symlinks=[broken]), target)
    assert not target.exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"symlinks": [link("files/note.md/below", "x")]},
        {"directories": [Directory(path="files/note.md", mode=0o755)]},
        {"directories": [Directory(path="files/note.md/below", mode=0o755)]},
        {"symlinks": [link("memory_files/.git", "../files")]},
        {"directories": [Directory(path="elsewhere/x", mode=0o755)]},
    ],
)
def test_links_and_directories_where_none_may_be_are_refused(
    tmp_path: Path, room: Path, target: Path, facts: dict[str, Any]
) -> None:
    with pytest.raises(MalformedBundle):
        restore_to_directory(bundle_of(tmp_path, NOTE, **facts), target)
    assert list(room.iterdir()) == []


def test_symlinks_that_stay_inside_come_back_as_they_were(tmp_path: Path, target: Path) -> None:
    links = {
        "files/sub/up": b"../note.md",
        "files/dangling": b"nowhere",
        "files/odd": b"latin1-\xe9",
        "files/d": b"sub",
    }
    restore_to_directory(
        bundle_of(tmp_path, NOTE, symlinks=[link(path, to) for path, to in links.items()]), target
    )
    found = {
        str(p.relative_to(target)): os.fsencode(p.readlink()) for p in target.rglob("*") if p.is_symlink()
    }
    assert found == links
    assert (target / "files/sub/up").read_bytes() == b"a note\n"


def test_a_symlink_that_wants_the_place_of_a_file_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(MalformedBundle):
        restore_to_directory(bundle_of(tmp_path, NOTE, symlinks=[link("files/note.md", "x")]), target)
    assert not target.exists()


# --- repositories -----------------------------------------------------------------------------------------

REPOSITORY = {"memdir": "memory", "git": GitFacts(head="refs/heads/main", head_oid=None, refs={})}
EVIL = b"#!/bin/sh\ntouch /tmp/executed\n"
INTRUSIONS: dict[str, dict[str, Any]] = {
    "a hook as a file": {"pieces": [Piece("files/memory/.git/hooks/post-checkout", EVIL, mode=0o755)]},
    "a config as a file": {"pieces": [Piece("files/memory/.git/config", b"[core]\n\tfsmonitor = evil\n")]},
    "a hook as a state value": {
        "pieces": [Piece("state/x.json", b"1", ArtifactKind.STATE, mode=0o755)],
        "states": {"x": StateHome(kind="file", path="memory/.git/hooks/post-checkout")},
    },
    "a hook as a symlink": {
        "pieces": [Piece("memory_files/evil.sh", EVIL, ArtifactKind.MEMORY_FILE, mode=0o755)],
        "symlinks": [link("memory_files/.git/hooks/post-checkout", "../../evil.sh")],
    },
    "a hook through a symlinked directory": {
        "pieces": [Piece("files/evil/post-checkout", EVIL, mode=0o755)],
        "symlinks": [link("files/memory/.git/hooks", "../../evil")],
    },
    "a directory": {"pieces": [NOTE], "directories": [Directory(path="memory_files/.git/x", mode=0o755)]},
}


@pytest.mark.parametrize("intrusion", INTRUSIONS.values(), ids=INTRUSIONS.keys())
def test_nothing_gets_into_the_repository_that_is_made_for_an_agent(
    tmp_path: Path, room: Path, target: Path, intrusion: dict[str, Any]
) -> None:
    facts = {**REPOSITORY, **intrusion}
    bundle = bundle_of(tmp_path, *facts.pop("pieces"), **facts)
    with pytest.raises(MalformedBundle):
        restore_agent(bundle, spec_of(target))
    assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    "facts",
    [
        GitFacts(head="refs/heads/main", head_oid="1" * 40, refs={"refs/heads/main": "1" * 40}),
        GitFacts(head="refs/../x", head_oid=None, refs={}),
        GitFacts(head="HEAD", head_oid=None, refs={}),
        GitFacts(head=None, head_oid="not an id", refs={}),
        GitFacts(head="refs/heads/main", head_oid=None, refs={"../../escaped": "1" * 40}),
    ],
    ids=["no objects", "bad head", "head on itself", "no id", "escaping ref"],
)
def test_a_repository_whose_facts_are_not_borne_out_is_refused(
    tmp_path: Path, room: Path, target: Path, facts: GitFacts
) -> None:
    with pytest.raises(IntegrityError):
        restore_to_directory(bundle_of(tmp_path, NOTE, memdir="memory", git=facts), target)
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("spoiled", ["git/memory.bundle", "git/memory.idx"])
def test_a_repository_with_a_spoiled_part_is_refused(
    tmp_path: Path, room: Path, target: Path, spoiled: str
) -> None:
    """Sealed as such: by whoever could make a bundle, or by a disk that lied when it was made."""
    root = tmp_path / "ana"
    (root / "memory").mkdir(parents=True)
    run_git(root / "memory", "init", "--quiet", "--initial-branch=main")
    (root / "memory/note.md").write_text("a note\n" * 99)
    run_git(root / "memory", "add", ".")
    run_git(root / "memory", "commit", "--quiet", "--message=first")
    (tmp_path / "scratch").mkdir()
    capture = take_cut(spec_of(root, memdir=root / "memory"), tmp_path / "scratch")
    for position in (0.05, 0.3, 0.5, 0.7, 0.95):
        pieces = []
        for artifact in capture.artifacts:
            with artifact.open() as stream:
                data = bytearray(stream.read(artifact.size_bytes))
            if artifact.path_in_bundle == spoiled:
                data[int(len(data) * position)] ^= 0x20
            pieces.append(Piece(artifact.path_in_bundle, bytes(data), artifact.kind))
        bundle = bundle_of(tmp_path, *pieces, memdir="memory", git=capture.git)
        with pytest.raises(IntegrityError):
            restore_to_directory(bundle, target)
        assert list(room.iterdir()) == []


def test_a_directory_that_is_called_almost_like_a_repositorys_comes_back(
    tmp_path: Path, target: Path
) -> None:
    root = tmp_path / "ana"
    (root / "memory/.GIT").mkdir(parents=True)
    (root / "memory/.GIT/note.md").write_text("odd, and the agent's own\n")
    run_git(root / "memory", "init", "--quiet", "--initial-branch=main")
    restore_to_directory(snapshot_of(root, tmp_path, memdir=root / "memory"), target)
    assert (target / "memdir/.GIT/note.md").read_text() == "odd, and the agent's own\n"
    assert run_git(target / "memdir", "status", "--porcelain") == "?? .GIT/\n"


# --- what comes back --------------------------------------------------------------------------------------


DATABASES = ("db/one.sqlite", "latin1-\udce9/two.db")


def agent_with_everything(root: Path) -> None:
    """Every kind of source, name, mode and time that there is."""
    for raw in (
        b"plain.md",
        b"sub/deep/er.md",
        b"new\nline",
        b"back\\slash",
        b"latin1-\xe9/x",
        b"x" * 255,
        b"\xff" * 255,
        "\U0001f9e0".encode(),
        b"memory/note.md",
        b"memory/\xe9\n.md",
    ):
        path = root / os.fsdecode(raw)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    (root / "run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "run.sh").chmod(0o751)
    (root / "read-only").write_bytes(b"x")
    (root / "read-only").chmod(0o400)
    (root / "empty/dir").mkdir(parents=True)
    (root / "sub").chmod(0o711)
    (root / "sub/up").symlink_to("../plain.md")
    (root / "memory/link").symlink_to("note.md")
    (root / "cursor.json").write_bytes(b'{"at": 1}\n')
    for name in DATABASES:
        (root / name).parent.mkdir(exist_ok=True)
        with closing(sqlite3.connect(root / "made")) as connection:
            connection.execute("CREATE TABLE t (x)")
            connection.execute("INSERT INTO t VALUES (7)")
            connection.commit()
        (root / "made").rename(root / name)
    for number, path in enumerate(sorted(root.rglob("*"))):
        if path.is_file() and not path.is_symlink():
            os.utime(path, ns=(0, (number - 5) * 123_456_789_012_345))


def without_databases(found: dict[bytes, Entry]) -> dict[bytes, Entry]:
    """A copy of a database is the same database and has not the same bytes."""
    return {
        name: dataclasses.replace(entry, content=b"")
        if entry.content.startswith(b"SQLite format 3")
        else entry
        for name, entry in found.items()
    }


def test_an_agent_comes_back_in_place_as_it_was(tmp_path: Path, target: Path) -> None:
    root = target
    agent_with_everything(root)
    (root / "memory").chmod(0o750)
    root.chmod(0o710)
    before = listing(root)
    bundle = snapshot_of(root, tmp_path, memdir=root / "memory")
    assert listing(root) == before
    root.rename(tmp_path / "lost")
    report = restore_agent(bundle, spec_of(root, memdir=root / "memory"))
    assert report.not_put_back == ()
    assert without_databases(listing(root)) == without_databases(before)
    assert stat.S_IMODE(root.stat().st_mode) == 0o710
    for name in DATABASES:
        with closing(sqlite3.connect(root / name)) as restored:
            assert restored.execute("SELECT x FROM t").fetchall() == [(7,)]


def test_a_directory_gets_every_room_with_modes_times_and_links(tmp_path: Path, target: Path) -> None:
    root = tmp_path / "ana"
    agent_with_everything(root)
    restore_to_directory(snapshot_of(root, tmp_path, memdir=root / "memory"), target)
    original, found = without_databases(listing(root)), without_databases(listing(target))
    for name, entry in original.items():
        if entry.kind == "directory":
            continue
        room, inner = (b"files", name)
        if name.startswith(b"memory/"):
            room, inner = b"memdir", name.removeprefix(b"memory/")
        elif os.fsdecode(name) in DATABASES:
            room = b"sqlite"
        assert found[room + b"/" + inner] == entry, name
    assert found[b"files/sub"].mode == 0o711
    assert found[b"files/empty/dir"].kind == "directory"


def test_set_user_id_does_not_come_back(tmp_path: Path, target: Path) -> None:
    bundle = bundle_of(tmp_path, dataclasses.replace(NOTE, mode=0o6755))
    restore_to_directory(bundle, target)
    assert stat.S_IMODE((target / "files/note.md").stat().st_mode) == 0o755


def test_restored_databases_have_no_wal_of_others_beside_them(tmp_path: Path, target: Path) -> None:
    root = tmp_path / "ana"
    root.mkdir()
    with closing(sqlite3.connect(root / "memory.sqlite", isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE t (x)")
        writer.execute("INSERT INTO t VALUES ('in the WAL')")
        bundle = snapshot_of(root, tmp_path)
    restore_to_directory(bundle, target)
    assert [path.name for path in (target / "sqlite").iterdir()] == ["memory.sqlite"]
    with closing(sqlite3.connect(target / "sqlite/memory.sqlite")) as restored:
        assert restored.execute("SELECT x FROM t").fetchall() == [("in the WAL",)]
        assert restored.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_state_file_goes_back_to_where_it_was_and_rows_come_back_with_their_database(
    tmp_path: Path, target: Path
) -> None:
    bundle = bundle_of(
        tmp_path,
        Piece("state/cursor.json", b'{"at": 1}\n', ArtifactKind.STATE, mode=0o640),
        Piece("state/outside.json", b"2", ArtifactKind.STATE),
        states={
            "cursor": StateHome(kind="file", path="run/cursor.json"),
            "outside": StateHome(kind="file", path="/etc/outside.json"),
        },
    )
    report = restore_agent(bundle, spec_of(target))
    assert (target / "run/cursor.json").read_bytes() == b'{"at": 1}\n'
    assert report.not_put_back == ("state/outside.json",)
    assert not Path("/etc/outside.json").exists()


def test_an_incomplete_bundle_comes_back_with_its_raw_bytes_apart_and_says_so(
    tmp_path: Path, target: Path
) -> None:
    opaque = Piece("opaque/db/memory.sqlite", b"broken", ArtifactKind.OPAQUE, mode=0o777)
    failure = Failure(source="memory.sqlite", reason="broken", kept_as=("opaque/db/memory.sqlite",))
    bundle = bundle_of(tmp_path, NOTE, opaque, complete=False, failures=(failure,))
    report = restore_to_directory(bundle, target)
    assert report.manifest.failures == (failure,)
    assert (target / "opaque/db/memory.sqlite").read_bytes() == b"broken"
    assert stat.S_IMODE((target / "opaque/db/memory.sqlite").stat().st_mode) == 0o600
    in_place = restore_agent(bundle, spec_of(target.with_name("ana")))
    assert in_place.not_put_back == ("opaque/db/memory.sqlite",)
    assert not (target.with_name("ana") / "db").exists()


def test_an_empty_bundle_comes_back_as_an_empty_directory(tmp_path: Path, target: Path) -> None:
    restore_to_directory(bundle_of(tmp_path), target)
    assert list(target.iterdir()) == []


# --- no room ----------------------------------------------------------------------------------------------


def test_what_is_too_large_for_the_disk_is_refused_before_it_is_unpacked(
    tmp_path: Path, room: Path, target: Path
) -> None:
    """The header says how much is to come; what follows it here is not even whole."""

    class Endless(Piece):
        @property
        def size_bytes(self) -> int:
            return 1 << 50

    sealed = seal_header_of([Endless("files/endless", b"")])
    with pytest.raises(LocalWriteError, match="not enough room") as raised:
        restore_to_directory(place(tmp_path, sealed), target)
    assert raised.value.exit_code == 73
    assert raised.value.hint
    assert list(room.iterdir()) == []


def seal_header_of(pieces: list[Piece]) -> bytes:
    """A bundle that announces `pieces` and then breaks off."""
    import io

    from daemon.bundle import tar
    from daemon.bundle.frames import FrameWriter
    from daemon.model import HEADER_NAME, Ceilings, Header, new_snapshot_id

    ceilings = Ceilings(members=len(pieces), total_bytes=sum(piece.size_bytes for piece in pieces))
    header = Header(snapshot_id=new_snapshot_id(), tenant="default", agent_id="ana", ceilings=ceilings)
    data = header.model_dump_json().encode()
    sink = io.BytesIO()
    frames = FrameWriter(sink, level=3)
    frames.write(tar.header(HEADER_NAME, size_bytes=len(data), mode=0o600, mtime_seconds=0))
    frames.write(data + bytes(tar.padding_bytes(len(data))))
    frames.close()
    return sink.getvalue()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    tmp_path: Path, room: Path, target: Path, existing: bool
) -> None:
    if existing:
        target.mkdir()
    before = listing(room)
    bundle = bundle_of(tmp_path, NOTE, Piece("files/big", os.urandom(400_000)))
    with files_not_larger_than(200_000), pytest.raises(LocalWriteError) as raised:
        restore_to_directory(bundle, target)
    assert raised.value.exit_code == 73
    assert listing(room) == before


@contextmanager
def files_not_larger_than(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_tools_find_nothing_wrong_with_what_was_restored(tmp_path: Path, target: Path) -> None:
    root = tmp_path / "ana"
    agent_with_everything(root)
    run_git(root / "memory", "init", "--quiet", "--initial-branch=main")
    run_git(root / "memory", "add", ".")
    run_git(root / "memory", "commit", "--quiet", "--message=odd names and all")
    restore_to_directory(snapshot_of(root, tmp_path, memdir=root / "memory"), target)
    run_git(target / "memdir", "fsck", "--full", "--strict")
    assert run_git(target / "memdir", "status", "--porcelain") == ""
    for path in (target / "sqlite").rglob("*"):
        if path.is_file():
            said = subprocess.run(
                ["sqlite3", path, "PRAGMA integrity_check"], capture_output=True, check=True
            )
            assert said.stdout == b"ok\n"


def test_a_link_that_led_out_of_the_agent_is_named_in_a_directory_of_rooms_too(tmp_path: Path) -> None:
    """There the agent's root is one level deeper, and `..` would lead to another room."""
    bundle = bundle_of(
        tmp_path, NOTE, symlinks=(link("files/out", "../elsewhere"), link("files/in", "note.md"))
    )
    report = restore_to_directory(bundle, tmp_path / "out")
    assert report.not_put_back == ("files/out (a symlink that leads out of the agent, to ../elsewhere)",)
    assert [path.name for path in (tmp_path / "out/files").iterdir() if path.is_symlink()] == ["in"]
