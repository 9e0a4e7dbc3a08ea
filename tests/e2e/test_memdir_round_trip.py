"""A memdir comes back as a working repository, as git itself judges it, whatever state it was in."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.commands import Host, quoted
from tests.harness.sample_agent.builder import GitCommandError, run_git

QUESTIONS = (
    ("for-each-ref", "--format=%(refname) %(objecttype) %(objectname)"),
    ("rev-list", "--all", "--objects"),
    ("status", "--porcelain", "--ignored"),
    ("diff",),
    ("diff", "--cached"),
    ("ls-files", "--stage"),
    ("stash", "list", "--format=%gd %H %gs"),
    ("log", "--format=%H %an %ae %at %cn %ce %ct %B", "--all"),
)


@pytest.fixture
def memdir(host: Host) -> Path:
    """A repository with history, branches, all kinds of tags, and every kind of uncommitted work."""
    memdir = host.home / "ana/memory"
    memdir.mkdir(parents=True)
    run_git(memdir, "init", "--quiet", "--initial-branch=trunk")
    write(memdir / "note.md", "one\n")
    write(memdir / "tool.sh", "#!/bin/sh\n")
    write(memdir / "deep/er/note.md", "deep\n")
    write(memdir / ".gitignore", "*.cache\n")
    (memdir / "link").symlink_to("deep/er/note.md")
    run_git(memdir, "add", ".")
    run_git(memdir, "commit", "--quiet", "--message=first")
    run_git(memdir, "tag", "light")
    run_git(memdir, "tag", "--annotate", "heavy", "--message=a tag with a message")
    run_git(memdir, "tag", "--annotate", "of-a-tag", "heavy", "--message=a tag of a tag")
    run_git(memdir, "tag", "of-a-blob", "HEAD:note.md")
    run_git(memdir, "checkout", "--quiet", "-b", "side/line")
    write(memdir / "side.md", "side\n")
    run_git(memdir, "add", ".")
    run_git(memdir, "commit", "--quiet", "--message=second, on the side")
    run_git(memdir, "notes", "add", "--message=a note on a commit")
    run_git(memdir, "update-ref", "refs/remotes/origin/trunk", "trunk")
    run_git(memdir, "pack-refs", "--all")
    run_git(memdir, "checkout", "--quiet", "trunk")
    write(memdir / "note.md", "one\nand more, not committed\n")
    (memdir / "tool.sh").chmod(0o755)
    (memdir / "deep/er/note.md").unlink()
    write(memdir / "untracked/new.md", "new\n")
    write(memdir / "kept.cache", "ignored by git, not by us\n")
    (memdir / "untracked/link").symlink_to("../note.md")
    return memdir


def as_made(memdir: Path) -> None:
    """On its first branch, with loose and packed refs."""


def detached(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--detach", "side/line~1")


def on_a_branch_of_its_own(memdir: Path) -> None:
    run_git(memdir, "stash", "--quiet")
    run_git(memdir, "checkout", "--quiet", "side/line")
    run_git(memdir, "stash", "pop", "--quiet")


def packed(memdir: Path) -> None:
    run_git(memdir, "gc", "--quiet")


def with_stashes(memdir: Path) -> None:
    for name in ("first", "second"):
        write(memdir / "note.md", f"{name}\n")
        run_git(memdir, "stash", "--quiet", f"--message={name}")


def with_versions_that_are_only_staged(memdir: Path) -> None:
    write(memdir / "note.md", "only staged\n")
    run_git(memdir, "add", "note.md")
    write(memdir / "note.md", "not even staged\n")


def in_a_merge_with_conflicts(memdir: Path) -> None:
    run_git(memdir, "commit", "--quiet", "--all", "--message=what was not committed")
    run_git(memdir, "checkout", "--quiet", "side/line")
    write(memdir / "note.md", "something else\n")
    run_git(memdir, "commit", "--quiet", "--all", "--message=in the way")
    with pytest.raises(GitCommandError):
        run_git(memdir, "merge", "trunk")
    assert "UU note.md" in run_git(memdir, "status", "--porcelain")


@pytest.mark.parametrize(
    "prepare",
    [
        as_made,
        detached,
        on_a_branch_of_its_own,
        packed,
        with_stashes,
        with_versions_that_are_only_staged,
        in_a_merge_with_conflicts,
    ],
)
def test_history_refs_head_and_uncommitted_work_come_back(
    host: Host, memdir: Path, prepare: Callable[[Path], None]
) -> None:
    prepare(memdir)
    before = [run_git(memdir, *question) for question in QUESTIONS]
    restored = snapshot_and_restore(host, memdir)
    run_git(restored, "fsck", "--full", "--strict")
    assert [run_git(restored, *question) for question in QUESTIONS] == before
    assert head(restored) == head(memdir)
    assert work_tree(restored) == work_tree(memdir)


def test_a_merge_goes_on_where_it_was(host: Host, memdir: Path) -> None:
    in_a_merge_with_conflicts(memdir)
    restored = snapshot_and_restore(host, memdir)
    write(restored / "note.md", "resolved\n")
    run_git(restored, "add", "note.md")
    run_git(restored, "commit", "--quiet", "--no-edit")
    assert run_git(restored, "log", "-1", "--format=%s %P").split() == [
        *("Merge", "branch", "'trunk'", "into", "side/line"),
        *run_git(memdir, "rev-parse", "HEAD", "MERGE_HEAD").split(),
    ]


def test_a_rebase_under_way_is_told_of_at_both_ends(host: Host, memdir: Path) -> None:
    in_a_merge_with_conflicts(memdir)
    run_git(memdir, "merge", "--abort")
    with pytest.raises(GitCommandError):
        run_git(memdir, "rebase", "trunk")
    configure(host)
    record = host.document("snapshot")
    assert record["complete"] is True
    assert "rebase" in host.agentkeep("show", record["snapshot_id"]).stdout
    done = host.agentkeep("restore", record["snapshot_id"], "--to", host.home / "back", expecting=3)
    assert "the rebase of refs/heads/side/line that was under way" in " ".join(done.stdout.split())
    onto = run_git(memdir, "rev-parse", "trunk")
    assert run_git(host.home / "back/memdir", "rev-parse", "refs/agentkeep/rebase-merge/onto/0") == onto


def test_a_shallow_clone_comes_back_shallow_and_sound(host: Host, memdir: Path) -> None:
    run_git(memdir, "commit", "--quiet", "--all", "--message=second")
    deep = host.home / "deep"
    memdir.rename(deep)
    run_git(host.home, "clone", "--quiet", "--depth=1", deep.as_uri(), str(memdir))
    restored = snapshot_and_restore(host, memdir)
    run_git(restored, "fsck", "--full", "--strict")
    assert run_git(restored, "log", "--format=%s").splitlines() == ["second"]
    run_git(restored, "fetch", "--quiet", "--unshallow", str(deep), "trunk")
    assert run_git(restored, "log", "--format=%s").splitlines() == ["second", "first"]


def test_a_partial_clone_comes_back_with_what_it_had_and_says_what_it_lacks(host: Host, memdir: Path) -> None:
    write(memdir / "note.md", "second\n")
    run_git(memdir, "commit", "--quiet", "--all", "--message=second")
    run_git(memdir, "config", "uploadpack.allowFilter", "true")
    whole = host.home / "whole"
    memdir.rename(whole)
    run_git(host.home, "clone", "--quiet", "--filter=blob:none", whole.as_uri(), str(memdir))
    configure(host)
    record = host.document("snapshot")
    assert record["complete"] is True
    assert host.manifest(record["snapshot_id"])["git"]["missing_objects"] > 0
    done = host.agentkeep("restore", record["snapshot_id"], "--to", host.home / "back", expecting=3)
    assert "partial clone" in " ".join(done.stdout.split())
    assert run_git(host.home / "back/memdir", "show", "HEAD:note.md") == "second\n"


def test_remotes_are_shown_without_credentials_and_not_configured(host: Host, memdir: Path) -> None:
    run_git(memdir, "remote", "add", "origin", "https://me:secret@example.net/memory.git")
    restored = snapshot_and_restore(host, memdir)
    shown = host.agentkeep("show", "latest").stdout
    assert "https://example.net/memory.git" in shown
    assert "secret" not in shown + host.agentkeep("--json", "show", "latest").stdout
    assert run_git(restored, "remote") == ""


def test_a_restored_repository_goes_on_working(host: Host, memdir: Path) -> None:
    restored = snapshot_and_restore(host, memdir)
    run_git(restored, "add", "--all")
    run_git(restored, "commit", "--quiet", "--message=life goes on")
    run_git(restored, "gc", "--quiet", "--prune=now")
    run_git(restored, "fsck", "--full", "--strict")
    assert run_git(restored, "log", "--format=%s").splitlines() == ["life goes on", "first"]


def test_a_repository_without_a_commit_comes_back_unborn_with_its_work(host: Host) -> None:
    memdir = host.home / "ana/memory"
    memdir.mkdir(parents=True)
    run_git(memdir, "init", "--quiet", "--initial-branch=unborn")
    write(memdir / "first.md", "not committed yet\n")
    restored = snapshot_and_restore(host, memdir)
    run_git(restored, "fsck", "--full", "--strict")
    assert head(restored) == ("refs/heads/unborn", "")
    assert run_git(restored, "status", "--porcelain") == "?? first.md\n"
    assert work_tree(restored) == work_tree(memdir)


def test_an_unborn_branch_beside_others_comes_back_unborn(host: Host, memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--orphan", "fresh")
    restored = snapshot_and_restore(host, memdir)
    assert head(restored) == ("refs/heads/fresh", "")
    refs = ("for-each-ref", "--format=%(refname) %(objectname)")
    assert run_git(restored, *refs) == run_git(memdir, *refs)
    assert work_tree(restored) == work_tree(memdir)


def test_an_empty_repository_comes_back_empty(host: Host) -> None:
    memdir = host.home / "ana/memory"
    memdir.mkdir(parents=True)
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    restored = snapshot_and_restore(host, memdir)
    run_git(restored, "fsck", "--full", "--strict")
    assert head(restored) == ("refs/heads/main", "")
    assert work_tree(restored) == {}


def test_a_memdir_that_is_no_repository_comes_back_as_plain_files(host: Host) -> None:
    memdir = host.home / "ana/memory"
    write(memdir / "deep/note.md", "no history\n")
    restored = snapshot_and_restore(host, memdir)
    assert work_tree(restored) == work_tree(memdir)
    assert not (restored / ".git").exists()


def test_nothing_that_git_would_execute_comes_back(host: Host, memdir: Path) -> None:
    witness = host.home / "executed"
    hook = memdir / ".git/hooks/post-checkout"
    write(hook, f"#!/bin/sh\ntouch {witness}\n")
    hook.chmod(0o755)
    run_git(memdir, "config", "core.fsmonitor", f"touch {witness}; false")
    run_git(memdir, "config", "core.sshCommand", f"touch {witness}")
    restored = snapshot_and_restore(host, memdir)
    config = run_git(restored, "config", "--local", "--list")
    assert "touch" not in config
    run_git(restored, "status", "--porcelain")
    run_git(restored, "checkout", "--quiet", "--force", "trunk")
    assert not witness.exists()


def test_the_agent_gets_its_repository_back_in_place(host: Host, memdir: Path) -> None:
    before = [run_git(memdir, *question) for question in QUESTIONS]
    files = work_tree(memdir)
    configure(host)
    host.agentkeep("snapshot")
    memdir.parent.rename(host.home / "lost")
    host.agentkeep("restore", "latest", "--agent", "ana")
    assert [run_git(memdir, *question) for question in QUESTIONS] == before
    assert work_tree(memdir) == files


def snapshot_and_restore(host: Host, memdir: Path) -> Path:
    configure(host)
    record = host.document("snapshot")
    assert record["complete"] is True
    listing = work_tree(memdir, with_git=True)
    restored = host.home / "back"
    host.agentkeep("restore", record["snapshot_id"], "--to", restored)
    assert work_tree(memdir, with_git=True) == listing  # reading it has changed nothing
    return restored / "memdir"


def configure(host: Host) -> None:
    host.configure({"ana": f'root = {quoted(host.home / "ana")}\nmemdir = "memory"'})


def head(memdir: Path) -> tuple[str, str]:
    """The branch that HEAD is on (or HEAD, if on none) and the commit, if any."""

    def said(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=memdir, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    return said("symbolic-ref", "HEAD") or "HEAD", said("rev-parse", "--verify", "HEAD")


def work_tree(memdir: Path, *, with_git: bool = False) -> dict[str, tuple[int, int, str | bytes]]:
    """Mode, mtime and content of every file; directories by mode."""
    found: dict[str, tuple[int, int, str | bytes]] = {}
    for path in memdir.rglob("*"):
        name = str(path.relative_to(memdir))
        status = path.lstat()
        if name.split("/")[0] == ".git" and not with_git:
            continue
        if path.is_symlink():
            found[name] = (0, 0, str(path.readlink()))
        elif path.is_dir():
            found[name] = (status.st_mode, 0, "")
        else:
            found[name] = (status.st_mode, status.st_mtime_ns, path.read_bytes())
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
