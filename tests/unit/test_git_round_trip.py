"""Whatever state a repository is in comes back as that state, as git itself judges it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon.capture.git import LiveRepository
from daemon.model import GitFacts
from daemon.restore.git import rebuild_repository
from tests.harness.sample_agent.builder import GitCommandError, run_git

QUESTIONS = (
    ("for-each-ref", "--format=%(refname) %(objecttype) %(objectname) %(symref)"),
    ("status", "--porcelain=v2", "--ignored"),
    ("ls-files", "--stage", "-t", "-v"),
    ("diff",),
    ("diff", "--cached"),
    ("stash", "list", "--format=%gd %H %gn %ge %gs %cd", "--date=raw"),
    ("log", "--all", "--format=%H %an %ae %at %cn %ce %ct %B"),
)
HEAD_FILES = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "ORIG_HEAD", "REBASE_HEAD", "MERGE_MSG")


@dataclass(frozen=True)
class Back:
    """What was captured, and the repository made of it."""

    memdir: Path
    facts: GitFacts
    told: tuple[str, ...]
    bundle: Path | None


def bring_back(memdir: Path, room: Path) -> Back:
    room.mkdir()
    with closing(LiveRepository(memdir)) as repository:
        written = repository.write_bundle(repository.reading(), room)
        assert repository.captured is not None
        facts = GitFacts.model_validate(json.loads(repository.captured.model_dump_json()))
    back = room / "back"
    shutil.copytree(memdir, back, symlinks=True, ignore=lambda at, _: [".git"] if Path(at) == memdir else [])
    bundle, index = written or (None, None)
    told = rebuild_repository(back, facts, bundle=bundle, index=index)
    if not facts.partial:
        run_git(back, "fsck", "--full", "--strict", "--no-dangling")
    return Back(back, facts, told, bundle)


def answers(memdir: Path) -> dict[str, str]:
    said = {" ".join(question): run_git(memdir, *question) for question in QUESTIONS}
    own = Path(run_git(memdir, "rev-parse", "--absolute-git-dir").strip())
    return said | {name: (own / name).read_text() for name in HEAD_FILES if (own / name).exists()}


def git_fails(memdir: Path, *arguments: str) -> None:
    with pytest.raises(GitCommandError):
        run_git(memdir, *arguments)


def commit(memdir: Path, message: str, **files: str) -> str:
    for name, text in files.items():
        (memdir / name).write_text(text)
    run_git(memdir, "add", "--all")
    run_git(memdir, "commit", "--quiet", "--allow-empty", f"--message={message}")
    return run_git(memdir, "rev-parse", "HEAD").strip()


@pytest.fixture
def memdir(tmp_path: Path) -> Path:
    """Three branches, of which each says something else of one file."""
    memdir = tmp_path / "memory"
    (memdir / "deep/er").mkdir(parents=True)
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    (memdir / "deep/er/note").write_text("deep\n")
    commit(memdir, "first", note="one\n", other="other\n", gone="gone\n")
    for branch in ("left", "right"):
        run_git(memdir, "checkout", "--quiet", "-b", branch, "main")
        commit(memdir, branch, note=f"{branch}\n", **{branch: f"{branch}\n"})
    run_git(memdir, "checkout", "--quiet", "main")
    return memdir


# --- states that come back whole ------------------------------------------------------------------


def clean(memdir: Path) -> None:
    pass


def packed(memdir: Path) -> None:
    commit(memdir, "second", note="two\n")
    run_git(memdir, "gc", "--quiet")
    run_git(memdir, "tag", "loose")


def detached(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--detach", "left")


def detached_off_every_branch(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--detach", "left")
    commit(memdir, "on no branch", note="nowhere else\n")


def staged_and_changed_again(memdir: Path) -> None:
    (memdir / "note").write_text("only staged\n")
    (memdir / "new").write_text("new, only staged\n")
    (memdir / "tool").write_text("#!/bin/sh\n")
    (memdir / "tool").chmod(0o755)
    (memdir / "link").symlink_to("note")
    run_git(memdir, "add", ".")
    run_git(memdir, "rm", "--quiet", "--cached", "gone")
    run_git(memdir, "mv", "other", "renamed")
    (memdir / "note").write_text("in the work tree\n")
    (memdir / "new").unlink()


def nothing_staged_at_all(memdir: Path) -> None:
    (memdir / ".git/index").unlink()


def unborn_with_staged_files(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--orphan", "fresh")
    (memdir / "note").write_text("staged on no commit\n")
    run_git(memdir, "add", ".")


def first_commit_still_to_come(memdir: Path) -> None:
    shutil.rmtree(memdir / ".git")
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    run_git(memdir, "add", ".")


def intent_to_add(memdir: Path) -> None:
    (memdir / "coming").write_text("not added yet\n")
    (memdir / "empty").write_text("")
    run_git(memdir, "add", "--intent-to-add", "coming")
    run_git(memdir, "add", "empty")


def flagged(memdir: Path) -> None:
    run_git(memdir, "update-index", "--skip-worktree", "other")
    (memdir / "other").unlink()
    run_git(memdir, "update-index", "--assume-unchanged", "gone")
    (memdir / "gone").unlink()


def index_of_version_4(memdir: Path) -> None:
    staged_and_changed_again(memdir)
    run_git(memdir, "update-index", "--index-version", "4")
    run_git(memdir, "update-index", "--untracked-cache")


def sparse(memdir: Path) -> None:
    run_git(memdir, "sparse-checkout", "set", "--cone", "--sparse-index", "elsewhere")
    assert "040000" in run_git(memdir, "ls-files", "--sparse", "--stage")


def merging(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "left")
    git_fails(memdir, "merge", "right")


def merging_with_deletion(memdir: Path) -> None:
    run_git(memdir, "rm", "--quiet", "note")
    commit(memdir, "without the note")
    git_fails(memdir, "merge", "right")


def merging_more_than_one(memdir: Path) -> None:
    for name in ("a", "b"):
        run_git(memdir, "checkout", "--quiet", "-b", name, "main")
        commit(memdir, name, **{name: name})
    run_git(memdir, "checkout", "--quiet", "main")
    commit(memdir, "so that it is no fast-forward", c="c")
    run_git(memdir, "merge", "--quiet", "--no-commit", "a", "b")


def picking(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "left")
    git_fails(memdir, "cherry-pick", "right")


def reverting(memdir: Path) -> None:
    first = commit(memdir, "second", note="two\n")
    commit(memdir, "third", note="three\n")
    git_fails(memdir, "revert", "--no-edit", first)


def stashed(memdir: Path) -> None:
    (memdir / "note").write_text("stashed first\n")
    run_git(memdir, "stash", "push", "--quiet", "--message=the first, with: some\tpunctuation <odd>")
    (memdir / "note").write_text("staged, and stashed second\n")
    run_git(memdir, "add", ".")
    (memdir / "untracked").write_text("stashed too\n")
    run_git(memdir, "stash", "push", "--quiet", "--include-untracked")
    (memdir / "note").write_text("stashed third\n")
    run_git(memdir, "stash", "push", "--quiet", "--message=ünïcode")
    run_git(memdir, "stash", "drop", "--quiet", "stash@{1}")
    (memdir / "note").write_text("stashed fourth\n")
    run_git(memdir, "stash", "push", "--quiet")


def symbolic(memdir: Path) -> None:
    run_git(memdir, "update-ref", "refs/remotes/origin/main", "main")
    run_git(memdir, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    run_git(memdir, "symbolic-ref", "refs/heads/alias", "refs/heads/left")


def head_by_way_of_an_alias(memdir: Path) -> None:
    symbolic(memdir)
    run_git(memdir, "checkout", "--quiet", "left")
    run_git(memdir, "symbolic-ref", "HEAD", "refs/heads/alias")


def reset_away(memdir: Path) -> None:
    commit(memdir, "soon on no branch", note="let go\n")
    run_git(memdir, "reset", "--quiet", "--hard", "HEAD~1")


def notes_and_replacements(memdir: Path) -> None:
    run_git(memdir, "notes", "add", "--message=a note")
    run_git(memdir, "replace", "left", "right")
    (memdir / ".git/info").mkdir(exist_ok=True)
    left = run_git(memdir, "rev-parse", "left").strip()
    (memdir / ".git/info/grafts").write_text(f"{left}\n")  # which says that it has no parents


WHOLE = (
    clean,
    packed,
    detached,
    detached_off_every_branch,
    staged_and_changed_again,
    nothing_staged_at_all,
    unborn_with_staged_files,
    intent_to_add,
    flagged,
    index_of_version_4,
    sparse,
    merging,
    merging_with_deletion,
    merging_more_than_one,
    picking,
    reverting,
    stashed,
    symbolic,
    head_by_way_of_an_alias,
    reset_away,
    first_commit_still_to_come,
    notes_and_replacements,
)


@pytest.mark.parametrize("prepare", WHOLE, ids=lambda prepare: prepare.__name__)
def test_a_repository_comes_back_in_the_state_it_was_in(
    memdir: Path, tmp_path: Path, prepare: Callable[[Path], None]
) -> None:
    prepare(memdir)
    before = answers(memdir)
    listing = contents(memdir / ".git")
    back = bring_back(memdir, tmp_path / "room")
    assert contents(memdir / ".git") == listing
    assert answers(back.memdir) == before
    assert run_git(back.memdir, "for-each-ref", "refs/agentkeep") == ""
    assert back.told == ()
    if back.bundle is not None:
        run_git(tmp_path, "clone", "--quiet", "--mirror", str(back.bundle), "mirror.git")
        run_git(tmp_path / "mirror.git", "fsck", "--full", "--strict")


def contents(directory: Path) -> dict[Path, tuple[object, ...]]:
    """Everything but access times, of every file and directory."""
    found: dict[Path, tuple[object, ...]] = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[path] = (status.st_ino, status.st_mode, status.st_mtime_ns, status.st_ctime_ns, data)
    return found


# --- what has no place of its own -----------------------------------------------------------------


def kept_refs(memdir: Path) -> dict[str, str]:
    """What a restore left under a prefix of ours, without it."""
    said = run_git(memdir, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", "refs/agentkeep")
    return dict(line.split() for line in said.splitlines())


def test_a_rebase_under_way_leaves_its_commits_as_refs_and_is_told_of(memdir: Path, tmp_path: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "left")
    commit(memdir, "after left", after="after\n")
    (memdir / "other").write_text("put aside by --autostash\n")
    git_fails(memdir, "rebase", "--autostash", "--exec", "touch executed", "right")
    state = memdir / ".git/rebase-merge"
    assert "exec" in (state / "git-rebase-todo").read_text()
    named = {
        f"rebase-merge/{name}/0": (state / name).read_text().strip()
        for name in ("onto", "orig-head", "autostash")
    }
    before = answers(memdir)

    back = bring_back(memdir, tmp_path / "room")

    assert kept_refs(back.memdir) == named
    after = answers(back.memdir)
    for question in ("status --porcelain=v2 --ignored", "ls-files --stage -t -v", "REBASE_HEAD"):
        assert after[question] == before[question]
    assert not (back.memdir / ".git/rebase-merge").exists()
    (operation,) = back.facts.operations
    assert (operation.kind, operation.branch) == ("rebase", "refs/heads/left")
    assert "rebase of refs/heads/left" in "".join(back.told)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("am", "patch"), "am"),
        (("cherry-pick", "right", "right~1"), "sequence"),
        (("rebase", "--apply", "right", "left"), "rebase"),
    ],
    ids=["am", "cherry-pick", "rebase --apply"],
)
def test_what_goes_on_after_a_conflict_is_told_of(
    memdir: Path, tmp_path: Path, command: tuple[str, ...], kind: str
) -> None:
    run_git(memdir, "checkout", "--quiet", "left")
    (memdir / ".git/info/exclude").write_text("patch\n")
    (memdir / "patch").write_text(run_git(memdir, "format-patch", "--stdout", "main..right"))
    git_fails(memdir, *command)
    back = bring_back(memdir, tmp_path / "room")
    assert kind in [operation.kind for operation in back.facts.operations]
    assert f"the {kind}" in "".join(back.told)
    assert not list((back.memdir / ".git").glob("*/*todo*"))


def test_a_bisection_is_told_of_and_its_verdicts_are_refs(memdir: Path, tmp_path: Path) -> None:
    commit(memdir, "middle")
    commit(memdir, "last")
    run_git(memdir, "bisect", "start", "HEAD", "HEAD~2")
    back = bring_back(memdir, tmp_path / "room")
    assert {"refs/bisect/bad"} < back.facts.refs.keys()
    assert run_git(back.memdir, "show-ref") == run_git(memdir, "show-ref")
    assert "bisect" in "".join(back.told)


def test_other_work_trees_are_named_and_their_detached_heads_are_kept(memdir: Path, tmp_path: Path) -> None:
    run_git(memdir, "worktree", "add", "--quiet", str(tmp_path / "on-a-branch"), "left")
    run_git(memdir, "worktree", "add", "--quiet", "--detach", str(tmp_path / "on-none"), "right")
    only_there = commit(tmp_path / "on-none", "known to that work tree alone", note="there\n")
    back = bring_back(memdir, tmp_path / "room")
    assert [(tree.path, tree.head, tree.head_oid) for tree in back.facts.worktrees] == [
        (str(tmp_path / "on-a-branch"), "refs/heads/left", None),
        (str(tmp_path / "on-none"), None, only_there),
    ]
    assert kept_refs(back.memdir) == {"worktree/1": only_there}
    assert len(back.told) == 2


def test_a_linked_work_tree_comes_back_as_a_repository_of_its_own(memdir: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    run_git(memdir, "worktree", "add", "--quiet", str(linked), "left")
    git_fails(linked, "merge", "right")
    (memdir / "note").write_text("stashed in the main work tree\n")
    run_git(memdir, "stash", "--quiet")
    before = answers(linked)
    back = bring_back(linked, tmp_path / "room")
    assert answers(back.memdir) == before
    assert (back.memdir / ".git/objects").is_dir()
    assert [tree.head for tree in back.facts.worktrees] == ["refs/heads/main"]


def test_a_repository_whose_git_directory_is_elsewhere_comes_back(memdir: Path, tmp_path: Path) -> None:
    run_git(memdir, "init", "--quiet", "--separate-git-dir", str(tmp_path / "elsewhere.git"))
    assert (memdir / ".git").is_file()
    merging(memdir)
    before = answers(memdir)
    back = bring_back(memdir, tmp_path / "room")
    assert answers(back.memdir) == before
    assert back.told == ()


def test_objects_that_are_only_in_alternates_are_in_the_bundle(memdir: Path, tmp_path: Path) -> None:
    run_git(tmp_path, "clone", "--quiet", "--shared", str(memdir), "middle")
    run_git(tmp_path, "clone", "--quiet", "--shared", str(tmp_path / "middle"), "borrower")
    back = bring_back(tmp_path / "borrower", tmp_path / "room")
    shutil.rmtree(memdir)
    run_git(back.memdir, "fsck", "--full", "--strict")
    assert run_git(back.memdir, "show", "HEAD:note") == "one\n"


def test_submodules_are_named_and_do_not_stop_git(memdir: Path, tmp_path: Path) -> None:
    run_git(tmp_path, "clone", "--quiet", str(memdir), "library")
    run_git(
        memdir,
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "add",
        "--quiet",
        str(tmp_path / "library"),
        "lib",
    )
    at = run_git(memdir / "lib", "rev-parse", "HEAD").strip()
    run_git(
        memdir, "config", "--file", ".gitmodules", "submodule.lib.url", "https://me:secret@example.net/lib"
    )
    run_git(memdir, "add", "--all")
    run_git(memdir, "commit", "--quiet", "--message=with a submodule")
    back = bring_back(memdir, tmp_path / "room")
    (submodule,) = back.facts.submodules
    assert (submodule.path, submodule.commit) == ("lib", at)
    assert submodule.url == "https://example.net/lib"
    assert run_git(back.memdir, "status", "--porcelain") == ""
    assert (back.memdir / "lib/note").read_text() == "one\n"
    assert ["submodule lib" in line for line in back.told] == [True]


def test_what_a_repository_keeps_under_our_prefix_is_its_own(memdir: Path, tmp_path: Path) -> None:
    """As one that was restored does."""
    run_git(memdir, "update-ref", "refs/agentkeep/stash/0", "left")
    run_git(memdir, "update-ref", "refs/agentkeep/index/staged", "right")
    run_git(memdir, "update-ref", "refs/agentkeep-1", "right")
    stashed(memdir)
    before = answers(memdir)
    back = bring_back(memdir, tmp_path / "room")
    assert back.facts.kept_under == "refs/agentkeep-2"
    assert answers(back.memdir) == before


def test_what_a_restore_left_is_captured_and_comes_back_again(memdir: Path, tmp_path: Path) -> None:
    git_fails(memdir, "rebase", "--quiet", "right", "left")
    once = bring_back(memdir, tmp_path / "room")
    (tmp_path / "second").mkdir()
    twice = bring_back(once.memdir, tmp_path / "second/room")
    assert answers(twice.memdir) == answers(once.memdir)
    assert twice.told == ()


# --- not all of a history -------------------------------------------------------------------------


def test_a_shallow_clone_comes_back_shallow(memdir: Path, tmp_path: Path) -> None:
    commit(memdir, "second", note="two\n")
    end = commit(memdir, "third", note="three\n")
    run_git(tmp_path, "clone", "--quiet", "--depth=1", memdir.as_uri(), "shallow")
    staged_and_changed_again(tmp_path / "shallow")
    before = answers(tmp_path / "shallow")
    back = bring_back(tmp_path / "shallow", tmp_path / "room")
    assert back.facts.shallow == (end,)
    assert answers(back.memdir) == before
    assert run_git(back.memdir, "rev-parse", "--is-shallow-repository") == "true\n"
    run_git(back.memdir, "fetch", "--quiet", "--unshallow", str(memdir), "main")
    run_git(back.memdir, "fsck", "--full", "--strict")


@pytest.fixture
def partial(memdir: Path, tmp_path: Path) -> Path:
    """A clone that has the objects of its work tree only."""
    commit(memdir, "second", note="two\n")
    run_git(memdir, "config", "uploadpack.allowFilter", "true")
    run_git(tmp_path, "clone", "--quiet", "--filter=blob:none", memdir.as_uri(), "partial")
    return tmp_path / "partial"


def test_a_partial_clone_is_captured_and_what_it_lacks_is_counted(
    partial: Path, memdir: Path, tmp_path: Path
) -> None:
    lacking = run_git(partial, "rev-list", "--all", "--objects", "--missing=print", "HEAD").count("?")
    back = bring_back(partial, tmp_path / "room")
    assert back.facts.partial
    assert back.facts.missing_objects == lacking > 0
    assert "partial clone" in "".join(back.told)
    for name, value in (("url", memdir.as_uri()), ("promisor", "true"), ("partialCloneFilter", "blob:none")):
        run_git(back.memdir, "config", f"remote.origin.{name}", value)
    run_git(back.memdir, "fsck", "--full", "--strict")
    assert run_git(back.memdir, "show", "HEAD~1:note") == "one\n"  # fetched now


def test_the_extension_of_a_partial_clone_is_understood(partial: Path, tmp_path: Path) -> None:
    run_git(partial, "config", "core.repositoryFormatVersion", "1")
    run_git(partial, "config", "extensions.partialClone", "origin")
    assert bring_back(partial, tmp_path / "room").facts.partial


# --- by hand, as docs/FORMAT.md says --------------------------------------------------------------

BY_HAND = r"""
set -eu
git clone --quiet --mirror "$BUNDLE" .git
git config core.bare false
git config --remove-section remote.origin
kept=refs/agentkeep

git read-tree $kept/index/staged
stage=0
for part in base ours theirs; do
    stage=$((stage + 1))
    if git rev-parse --quiet --verify $kept/index/$part > /dev/null; then
        git ls-tree -r $kept/index/$part |
            sed "s/ blob \([0-9a-f]*\)/ \1 $stage/" | git update-index --index-info
    fi
done

git update-ref -d refs/stash
for number in $(git for-each-ref --format='%(refname:lstrip=3)' $kept/stash | sort -rn); do
    git stash store --message "$(git log -1 --format=%s $kept/stash/$number)" $kept/stash/$number
done

git for-each-ref --format='%(objectname)' $kept/MERGE_HEAD > .git/MERGE_HEAD
git cat-file blob $kept/MERGE_MSG > .git/MERGE_MSG

git for-each-ref --format='delete %(refname)' $kept | git update-ref --stdin
"""


def by_hand(script: str, bundle: Path, at: Path) -> None:
    subprocess.run(["bash", "-c", script], cwd=at, env=os.environ | {"BUNDLE": str(bundle)}, check=True)


def test_stash_and_index_are_recovered_with_git_alone(memdir: Path, tmp_path: Path) -> None:
    for number in range(12):
        (memdir / "note").write_text(f"stashed {number}\n")
        run_git(memdir, "stash", "push", "--quiet", "--message", f"number {number}")
    run_git(memdir, "checkout", "--quiet", "left")
    (memdir / "new").write_text("only staged\n")
    git_fails(memdir, "merge", "right")
    run_git(memdir, "add", "new")
    bundle = bring_back(memdir, tmp_path / "room").bundle
    assert bundle is not None
    desk = tmp_path / "desk"
    shutil.copytree(memdir, desk, ignore=lambda at, _: [".git"] if Path(at) == memdir else [])
    by_hand(BY_HAND, bundle, desk)
    for question in ("status", "--porcelain=v2"), ("diff",), ("stash", "list", "--format=%gd %H %gs"):
        assert run_git(desk, *question) == run_git(memdir, *question)
    assert run_git(desk, "show-ref") == run_git(memdir, "show-ref")
    run_git(desk, "fsck", "--full", "--strict")


SHALLOW_BY_HAND = r"""
set -eu
git init --quiet
echo "$END" > .git/shallow
git fetch --quiet --update-head-ok "$BUNDLE" '+refs/*:refs/*'
"""


def test_a_shallow_clone_is_recovered_with_git_alone(memdir: Path, tmp_path: Path) -> None:
    end = commit(memdir, "second", note="two\n")
    run_git(tmp_path, "clone", "--quiet", "--depth=1", memdir.as_uri(), "shallow")
    bundle = bring_back(tmp_path / "shallow", tmp_path / "room").bundle
    assert bundle is not None
    desk = tmp_path / "desk"
    desk.mkdir()
    by_hand(f"END={end}\n{SHALLOW_BY_HAND}", bundle, desk)
    run_git(desk, "fsck", "--full", "--strict")
    assert run_git(desk, "show", "main:note") == "two\n"


PARTIAL_BY_HAND = r"""
set -eu
git init --quiet
sed '1,/^$/d' "$BUNDLE" | git index-pack --stdin --promisor > /dev/null
sed '/^$/q' "$BUNDLE" | sed -n 's/^\([0-9a-f]\{40\}\) \(refs.*\)/create \2 \1/p' | git update-ref --stdin
git config remote.origin.url "$URL"
git config remote.origin.promisor true
"""


def test_a_partial_clone_is_recovered_with_git_alone(partial: Path, memdir: Path, tmp_path: Path) -> None:
    bundle = bring_back(partial, tmp_path / "room").bundle
    assert bundle is not None
    desk = tmp_path / "desk"
    desk.mkdir()
    by_hand(f"URL={memdir.as_uri()}\n{PARTIAL_BY_HAND}", bundle, desk)
    run_git(desk, "fsck", "--full", "--strict")
    assert run_git(desk, "show", "main~1:note") == "one\n"
