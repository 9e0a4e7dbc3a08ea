"""Bundles whose git part was made to do harm: refused, or harmless, and nothing outside of the target."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daemon.capture.git import LiveRepository
from daemon.errors import IntegrityError, MalformedBundle
from daemon.model import ArtifactKind, GitFacts
from daemon.restore import restore_to_directory
from tests.harness.sample_agent.builder import run_git
from tests.property.honest import Piece, place, seal

OID = "1" * 40
STASH = {
    "oid": OID,
    "message": "WIP",
    "committer_name": "Ana",
    "committer_email": "ana@example.invalid",
    "committed_at": 1,
    "utc_offset": "+0000",
}
EVIL_LINE = f"x\n{OID} {OID} evil <e> 1 +0000\tinjected"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "room" / "back"


@pytest.fixture(autouse=True)
def room(target: Path) -> Path:
    target.parent.mkdir()
    return target.parent


# --- what the manifest may say --------------------------------------------------------------------

HOSTILE: dict[str, dict[str, Any]] = {
    "a message of two lines": {"stash": [STASH | {"message": EVIL_LINE}]},
    "a message with a NUL": {"stash": [STASH | {"message": "a\0b"}]},
    "a message without end": {"stash": [STASH | {"message": "x" * 4097}]},
    "a message that is no text": {"stash": [STASH | {"message": "\ud800"}]},
    "a name of two lines": {"stash": [STASH | {"committer_name": EVIL_LINE}]},
    "a name with an address in it": {"stash": [STASH | {"committer_name": "x <y> 1 +0000"}]},
    "an address that ends early": {"stash": [STASH | {"committer_email": "x> 1 +0000\tevil"}]},
    "a time before time": {"stash": [STASH | {"committed_at": -1}]},
    "a time beyond numbers": {"stash": [STASH | {"committed_at": 1 << 60}]},
    "a time that is text": {"stash": [STASH | {"committed_at": "1"}]},
    "a zone that is a line": {"stash": [STASH | {"utc_offset": "+0000\n"}]},
    "a stash that is no id": {"stash": [STASH | {"oid": "HEAD"}]},
    "an id with a line end": {"stash": [STASH | {"oid": OID + "\n"}]},
    "stashes without end": {"stash": [STASH] * 100_001},
    "a head in the hooks": {"heads": {"hooks/post-checkout": [OID]}},
    "a head outside": {"heads": {"../../MERGE_HEAD": [OID]}},
    "a head that is the configuration": {"heads": {"config": [OID]}},
    "a head that is HEAD": {"heads": {"HEAD": [OID]}},
    "a todo list": {"heads": {"rebase-merge/git-rebase-todo": [OID]}},
    "a head that is no id": {"heads": {"MERGE_HEAD": ["exec touch executed"]}},
    "heads without end": {"heads": {"MERGE_HEAD": [OID] * 100_001}},
    "an unknown operation": {"operations": [{"kind": "exec"}]},
    "an operation on no branch": {"operations": [{"kind": "rebase", "branch": "../x"}]},
    "operations without end": {"operations": [{"kind": "merge"}] * 17},
    "a prefix among branches": {"kept_under": "refs/heads"},
    "a prefix that leads out": {"kept_under": "refs/agentkeep/../.."},
    "a prefix with a line end": {"kept_under": "refs/agentkeep\n"},
    "a symbolic ref that is none": {"symbolic_refs": {"HEAD": "refs/heads/main"}},
    "a symbolic ref to the outside": {"symbolic_refs": {"refs/heads/x": "/etc/passwd"}},
    "a symbolic ref of two lines": {"symbolic_refs": {"refs/heads/x": "refs/heads/y\nevil"}},
    "a work tree of two lines": {"worktrees": [{"path": "a\nb"}]},
    "a work tree at no id": {"worktrees": [{"path": "a", "head_oid": "x"}]},
    "a submodule outside": {"submodules": [{"path": "../../x", "commit": OID}]},
    "a submodule at the root": {"submodules": [{"path": "/etc", "commit": OID}]},
    "a submodule at no commit": {"submodules": [{"path": "x", "commit": "y"}]},
    "a URL of two lines": {"submodules": [{"path": "x", "commit": OID, "url": "a\nb"}]},
    "a remote of two lines": {"remotes": {"a\nb": "c"}},
    "a remote's URL of two lines": {"remotes": {"a": "b\nc"}},
    "a remote's URL without end": {"remotes": {"a": "b" * 4097}},
    "an end of history that is none": {"shallow": ["../../config"]},
    "ends of history without end": {"shallow": [OID] * 100_001},
    "less than nothing missing": {"partial": True, "missing_objects": -1},
    "a partial clone, perhaps": {"partial": "yes"},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
def test_a_manifest_may_not_say_that(
    tmp_path: Path, room: Path, target: Path, fields: dict[str, Any]
) -> None:
    facts = GitFacts.model_construct(head="refs/heads/main", head_oid=None, refs={}, **fields)
    try:
        bundle = place(tmp_path, seal([Piece("files/note", b"")], memdir="memory", git=facts).data)
    except ValueError:
        return  # the JSON of a bundle cannot even say it
    with pytest.raises(MalformedBundle):
        restore_to_directory(bundle, target)
    assert list(room.iterdir()) == []


# --- what a git bundle may hold -------------------------------------------------------------------


@dataclass
class Forgery:
    """A real bundle of a real repository, to be spoiled before it is sealed."""

    memdir: Path
    facts: GitFacts
    head: str
    refs: dict[str, str]

    def object(self, kind: str, data: bytes) -> str:
        arguments = ["git", "hash-object", "--literally", "-w", "-t", kind, "--stdin"]
        done = subprocess.run(arguments, cwd=self.memdir, input=data, capture_output=True, check=True)
        return done.stdout.decode().strip()

    def tree(self, *entries: tuple[bytes, str, str]) -> str:
        data = b"".join(b"%s %s\0%s" % (m.encode(), name, bytes.fromhex(oid)) for name, m, oid in entries)
        return self.object("tree", data)

    def say(self, **fields: Any) -> None:
        self.facts = GitFacts.model_validate(self.facts.model_dump(mode="json") | fields)

    def restore(self, tmp_path: Path, target: Path) -> tuple[str, ...]:
        pack = tmp_path / "forged"
        pack.mkdir()
        reached = sorted({*self.refs.values(), *self.facts.refs.values()})
        objects = run_git(self.memdir, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)")
        subprocess.run(
            ["git", "-C", self.memdir, "pack-objects", "--quiet", pack / "p"],
            input=objects,
            text=True,
            check=True,
            capture_output=True,
        )
        assert reached
        (data,) = pack.glob("*.pack")
        (index,) = pack.glob("*.idx")
        listed = {**self.facts.refs, **self.refs, "HEAD": self.head}
        lines = "".join(f"{oid} {name}\n" for name, oid in sorted(listed.items()))
        header = f"# v2 git bundle\n{lines}\n".encode()
        pieces = [
            Piece("git/memory.bundle", header + data.read_bytes(), ArtifactKind.GIT_BUNDLE),
            Piece("git/memory.idx", index.read_bytes(), ArtifactKind.GIT_INDEX),
        ]
        report = restore_to_directory(
            place(tmp_path, seal(pieces, memdir="memory", git=self.facts).data), target
        )
        return report.not_put_back


@pytest.fixture
def forgery(tmp_path: Path) -> Forgery:
    memdir = tmp_path / "memory"
    memdir.mkdir()
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    (memdir / "note").write_text("a note\n")
    run_git(memdir, "add", ".")
    run_git(memdir, "commit", "--quiet", "--message=first")
    with closing(LiveRepository(memdir)) as repository:
        facts = GitFacts.model_validate(repository.reading().model_dump(mode="json"))
    head = run_git(memdir, "rev-parse", "HEAD").strip()
    tree = run_git(memdir, "rev-parse", "HEAD^{tree}").strip()
    return Forgery(memdir, facts, head, {"refs/agentkeep/index/staged": tree})


def test_an_honest_forgery_is_restored(forgery: Forgery, tmp_path: Path, target: Path) -> None:
    assert forgery.restore(tmp_path, target) == ()
    assert run_git(target / "memdir", "status", "--porcelain") == " D note\n"


STAGED = "refs/agentkeep/index/staged"


def staged_in_git_directory(forgery: Forgery, name: bytes = b".git") -> None:
    hooks = forgery.tree((b"post-checkout", "100755", forgery.object("blob", b"#!/bin/sh\n")))
    forgery.refs[STAGED] = forgery.tree((name, "40000", forgery.tree((b"hooks", "40000", hooks))))


def staged_in_git_directory_in_capitals(forgery: Forgery) -> None:
    staged_in_git_directory(forgery, b".GIT")


def staged_above(forgery: Forgery) -> None:
    staged_in_git_directory(forgery, b"..")


def staged_nowhere(forgery: Forgery) -> None:
    staged_in_git_directory(forgery, b"")


def staged_as_nothing_known(forgery: Forgery) -> None:
    forgery.refs[STAGED] = forgery.tree((b"x", "10644", forgery.object("blob", b"")))


def staged_with_a_slash(forgery: Forgery) -> None:
    forgery.refs[STAGED] = forgery.tree((b"../../x", "100644", forgery.object("blob", b"")))


def staged_without_end(forgery: Forgery) -> None:
    """Eight levels of sixteen: 4 billion files in eight trees."""
    oid, mode = forgery.object("blob", b""), "100644"
    for _ in range(8):
        oid, mode = forgery.tree(*((b"%02d" % number, mode, oid) for number in range(16))), "40000"
    forgery.refs[STAGED] = oid


def staged_without_bottom(forgery: Forgery) -> None:
    oid, mode = forgery.object("blob", b""), "100644"
    for _ in range(30):
        oid, mode = forgery.tree((b"x" * 200, mode, oid)), "40000"
    forgery.refs[STAGED] = oid


def staged_as_a_blob(forgery: Forgery) -> None:
    forgery.refs[STAGED] = forgery.object("blob", b"no tree")


def a_part_of_the_index_that_is_unknown(forgery: Forgery) -> None:
    forgery.refs["refs/agentkeep/index/hooks"] = forgery.head


def a_ref_that_the_manifest_does_not_know(forgery: Forgery) -> None:
    forgery.refs["refs/agentkeep/worktree/0"] = forgery.head


def a_ref_outside_of_refs(forgery: Forgery) -> None:
    forgery.refs["config"] = forgery.head


def a_message_that_is_a_commit(forgery: Forgery) -> None:
    forgery.refs["refs/agentkeep/MERGE_MSG"] = forgery.head


def a_message_too_long(forgery: Forgery) -> None:
    forgery.refs["refs/agentkeep/MERGE_MSG"] = forgery.object("blob", bytes((1 << 20) + 1))


def a_stash_that_is_not_there(forgery: Forgery) -> None:
    forgery.say(stash=[STASH | {"oid": forgery.head}])


def a_head_that_is_another_than_it_says(forgery: Forgery) -> None:
    forgery.say(heads={"MERGE_HEAD": [OID]})
    forgery.refs["refs/agentkeep/MERGE_HEAD/0"] = forgery.head


def a_symbolic_ref_that_leads_out(forgery: Forgery) -> None:
    forgery.say(symbolic_refs={"refs/heads/x": "refs/../../../config"})


def a_symbolic_ref_that_is_a_ref(forgery: Forgery) -> None:
    forgery.say(symbolic_refs={"refs/heads/main": "refs/heads/other"})


def a_symbolic_ref_below_a_ref(forgery: Forgery) -> None:
    forgery.say(symbolic_refs={"refs/heads/main/below": "refs/heads/main"})


def symbolic_refs_under_our_prefix(forgery: Forgery) -> None:
    forgery.say(symbolic_refs={"refs/agentkeep/index/staged": "refs/heads/main"})


def a_partial_clone_that_lacks_more_than_it_says(forgery: Forgery) -> None:
    forgery.refs[STAGED] = forgery.tree((b"x", "100644", "2" * 40))
    forgery.say(partial=True)


REFUSED = (
    staged_in_git_directory,
    staged_in_git_directory_in_capitals,
    staged_above,
    staged_nowhere,
    staged_as_nothing_known,
    staged_with_a_slash,
    staged_without_end,
    staged_without_bottom,
    staged_as_a_blob,
    a_part_of_the_index_that_is_unknown,
    a_ref_that_the_manifest_does_not_know,
    a_ref_outside_of_refs,
    a_message_that_is_a_commit,
    a_message_too_long,
    a_stash_that_is_not_there,
    a_head_that_is_another_than_it_says,
    a_symbolic_ref_that_leads_out,
    a_symbolic_ref_that_is_a_ref,
    a_symbolic_ref_below_a_ref,
    symbolic_refs_under_our_prefix,
    a_partial_clone_that_lacks_more_than_it_says,
)


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_repository_like_that_is_refused(
    forgery: Forgery, tmp_path: Path, room: Path, target: Path, spoil: Callable[[Forgery], None]
) -> None:
    spoil(forgery)
    with pytest.raises(IntegrityError):
        forgery.restore(tmp_path, target)
    assert list(room.iterdir()) == []


def symbolic_refs_in_a_circle(forgery: Forgery) -> None:
    forgery.say(symbolic_refs={"refs/heads/x": "refs/heads/y", "refs/heads/y": "refs/heads/x"})


def a_shallow_end_that_is_not_here(forgery: Forgery) -> None:
    forgery.say(shallow=[OID])


def a_remote_that_would_execute(forgery: Forgery) -> None:
    forgery.say(remotes={"origin": "ext::sh -c touch% executed"})


def a_submodule_in_the_git_directory(forgery: Forgery) -> None:
    forgery.say(submodules=[{"path": ".git/hooks", "commit": OID, "url": "ext::sh -c evil"}])


def a_message_that_looks_like_a_script(forgery: Forgery) -> None:
    forgery.refs["refs/agentkeep/MERGE_MSG"] = forgery.object("blob", b"#!/bin/sh\ntouch executed\n")
    forgery.say(heads={"MERGE_HEAD": [forgery.head]})
    forgery.refs["refs/agentkeep/MERGE_HEAD/0"] = forgery.head


HARMLESS = (
    symbolic_refs_in_a_circle,
    a_shallow_end_that_is_not_here,
    a_remote_that_would_execute,
    a_submodule_in_the_git_directory,
    a_message_that_looks_like_a_script,
)


@pytest.mark.parametrize("spoil", HARMLESS, ids=lambda spoil: spoil.__name__)
def test_a_repository_like_that_does_nothing(
    forgery: Forgery, tmp_path: Path, room: Path, target: Path, spoil: Callable[[Forgery], None]
) -> None:
    spoil(forgery)
    forgery.restore(tmp_path, target)
    run_git(target / "memdir", "status")
    run_git(target / "memdir", "log", "--oneline")
    assert "ext::" not in (target / "memdir/.git/config").read_text()
    hooks = {path.name for path in (target / "memdir/.git/hooks").iterdir()}
    assert hooks == {"README.sample"}  # libgit2's, and never run
    assert not list(room.rglob("executed"))
