"""Reading a live repository: refs as they are, objects as git packs them, nothing of it executed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from daemon.capture.git import LiveRepository, RepositoryUnreadable
from daemon.model import GitFacts
from tests.harness.sample_agent.builder import run_git


@pytest.fixture
def memdir(tmp_path: Path) -> Path:
    memdir = tmp_path / "memory"
    memdir.mkdir()
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    commit(memdir, "first")
    return memdir


def commit(memdir: Path, message: str) -> str:
    (memdir / f"{message}.md").write_text(f"{message}\n")
    run_git(memdir, "add", ".")
    run_git(memdir, "commit", "--quiet", f"--message={message}")
    return run_git(memdir, "rev-parse", "HEAD").strip()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return scratch


def opened(memdir: Path) -> closing[LiveRepository]:
    return closing(LiveRepository(memdir))


def read(memdir: Path) -> GitFacts:
    with opened(memdir) as repository:
        return repository.reading()


def test_every_ref_is_read_loose_or_packed(memdir: Path) -> None:
    first = run_git(memdir, "rev-parse", "HEAD").strip()
    run_git(memdir, "tag", "light")
    run_git(memdir, "branch", "side/line")
    run_git(memdir, "pack-refs", "--all")
    second = commit(memdir, "second")
    assert read(memdir) == GitFacts(
        head="refs/heads/main",
        head_oid=second,
        refs={"refs/heads/main": second, "refs/heads/side/line": first, "refs/tags/light": first},
    )


def test_a_symbolic_ref_is_told_by_what_it_points_to(memdir: Path) -> None:
    run_git(memdir, "update-ref", "refs/remotes/origin/main", "HEAD")
    run_git(memdir, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    assert "refs/remotes/origin/HEAD" not in read(memdir).refs
    assert "refs/remotes/origin/main" in read(memdir).refs


def test_a_detached_head_is_a_commit_and_no_branch(memdir: Path) -> None:
    first = run_git(memdir, "rev-parse", "HEAD").strip()
    commit(memdir, "second")
    run_git(memdir, "checkout", "--quiet", "--detach", first)
    assert (read(memdir).head, read(memdir).head_oid) == (None, first)


def test_an_unborn_branch_is_a_branch_and_no_commit(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--orphan", "fresh")
    assert (read(memdir).head, read(memdir).head_oid) == ("refs/heads/fresh", None)


def test_readings_differ_when_and_only_when_a_ref_moved(memdir: Path) -> None:
    with opened(memdir) as repository:
        before = repository.reading()
        (memdir / "untracked.md").write_text("x")
        run_git(memdir, "add", ".")
        run_git(memdir, "gc", "--quiet")  # moves every object and every loose ref, and changes none
        assert repository.reading() == before
        commit(memdir, "second")
        assert repository.reading() != before
        after = repository.reading()
        run_git(memdir, "tag", "light")
        assert repository.reading() != after


def test_the_bundle_is_one_that_git_verifies_and_clones(memdir: Path, scratch: Path, tmp_path: Path) -> None:
    run_git(memdir, "tag", "--annotate", "heavy", "--message=a tag")
    run_git(memdir, "tag", "of-a-tree", "HEAD^{tree}")
    run_git(memdir, "branch", "side")
    commit(memdir, "second")
    run_git(memdir, "checkout", "--quiet", "--detach", "side")
    with opened(memdir) as repository:
        written = repository.write_bundle(repository.reading(), scratch)
    assert written is not None
    bundle, index = written
    run_git(memdir, "bundle", "verify", "--quiet", str(bundle))
    run_git(tmp_path, "clone", "--quiet", "--mirror", str(bundle), "clone.git")
    assert run_git(tmp_path / "clone.git", "show-ref") == run_git(memdir, "show-ref")
    run_git(tmp_path / "clone.git", "fsck", "--full", "--strict")
    objects = ("cat-file", "--batch-all-objects", "--batch-check")
    assert run_git(tmp_path / "clone.git", *objects) == run_git(memdir, *objects)
    pack = bundle.read_bytes().partition(b"\n\n")[2]
    (scratch / "cut.pack").write_bytes(pack)
    run_git(scratch, "index-pack", "-o", "cut.idx", "cut.pack")
    assert index.read_bytes() == (scratch / "cut.idx").read_bytes()


def test_the_bundle_holds_the_refs_of_the_reading_whatever_moved_since(memdir: Path, scratch: Path) -> None:
    with opened(memdir) as repository:
        reading = repository.reading()
        commit(memdir, "second")
        run_git(memdir, "branch", "late")
        run_git(memdir, "gc", "--quiet")
        written = repository.write_bundle(reading, scratch)
    assert written is not None
    listed = run_git(memdir, "bundle", "list-heads", str(written[0])).splitlines()
    assert listed == [f"{reading.head_oid} HEAD", f"{reading.head_oid} refs/heads/main"]


def test_a_repository_without_any_commit_has_no_bundle(tmp_path: Path, scratch: Path) -> None:
    run_git(tmp_path, "init", "--quiet", "--initial-branch=main", "empty")
    with opened(tmp_path / "empty") as repository:
        facts = repository.reading()
        assert facts == GitFacts(head="refs/heads/main", head_oid=None, refs={})
        assert repository.write_bundle(facts, scratch) is None


def test_reading_and_packing_change_no_byte_of_the_repository(memdir: Path, scratch: Path) -> None:
    def state() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in memdir.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    with opened(memdir) as repository:
        repository.write_bundle(repository.reading(), scratch)
    assert state() == before


@pytest.fixture
def witness(memdir: Path, tmp_path: Path) -> Iterator[Path]:
    """A file that would be there if anything that the repository asks for had been executed."""
    witness = tmp_path / "executed"
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "filter.evil.clean", "filter.evil.smudge"):
        run_git(memdir, "config", key, f"touch {witness}")
    (memdir / ".gitattributes").write_text("* filter=evil\n")
    for hook in ("pre-commit", "post-checkout", "reference-transaction", "pre-auto-gc", "post-index-change"):
        path = memdir / ".git/hooks" / hook
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ntouch {witness}\n")
        path.chmod(0o755)
    yield witness
    assert not witness.exists()


@pytest.mark.usefixtures("witness")
def test_nothing_that_a_repository_asks_for_is_executed(memdir: Path, scratch: Path) -> None:
    with opened(memdir) as repository:
        assert repository.write_bundle(repository.reading(), scratch) is not None


def test_a_submodule_is_remembered_as_the_commit_it_was_at(
    memdir: Path, scratch: Path, tmp_path: Path
) -> None:
    run_git(memdir, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},vendored")
    run_git(memdir, "commit", "--quiet", "--message=with a submodule")
    with opened(memdir) as repository:
        written = repository.write_bundle(repository.reading(), scratch)
    assert written is not None
    run_git(tmp_path, "clone", "--quiet", "--mirror", str(written[0]), "clone.git")
    assert f"160000 commit {'1' * 40}\tvendored" in run_git(tmp_path / "clone.git", "ls-tree", "HEAD")


def test_a_linked_work_tree_is_read_with_the_refs_of_its_repository(memdir: Path, tmp_path: Path) -> None:
    run_git(memdir, "worktree", "add", "--quiet", "-b", "linked", str(tmp_path / "linked"))
    facts = read(tmp_path / "linked")
    assert facts.head == "refs/heads/linked"
    assert facts.refs.keys() == {"refs/heads/main", "refs/heads/linked"}


def test_a_shallow_clone_is_refused_with_what_to_do(memdir: Path, tmp_path: Path) -> None:
    commit(memdir, "second")
    run_git(tmp_path, "clone", "--quiet", "--depth=1", memdir.as_uri(), "shallow")
    with pytest.raises(RepositoryUnreadable, match="shallow") as raised:
        LiveRepository(tmp_path / "shallow")
    assert "unshallow" in raised.value.hint


def test_a_ref_whose_name_is_not_utf8_is_refused_by_name(memdir: Path) -> None:
    head = run_git(memdir, "rev-parse", "HEAD").strip()
    packed = memdir / ".git/packed-refs"
    packed.write_bytes(
        b"# pack-refs with: peeled fully-peeled sorted\n" + head.encode() + b" refs/tags/\xe9\n"
    )
    with pytest.raises(RepositoryUnreadable, match="not UTF-8"):
        read(memdir)


@pytest.mark.parametrize("lost", ["blob", "tree", "commit"])
def test_a_missing_object_is_found_when_it_is_packed(memdir: Path, scratch: Path, lost: str) -> None:
    name = {"blob": "HEAD~1:first.md", "tree": "HEAD~1^{tree}", "commit": "HEAD~1"}[lost]
    commit(memdir, "second")
    oid = run_git(memdir, "rev-parse", name).strip()
    (memdir / ".git/objects" / oid[:2] / oid[2:]).unlink()
    with opened(memdir) as repository, pytest.raises(RepositoryUnreadable) as raised:
        repository.write_bundle(repository.reading(), scratch)
    assert "git fsck" in raised.value.hint


@pytest.mark.parametrize("victim", ["HEAD", "config", "objects"])
def test_a_repository_that_lacks_what_makes_it_one_is_refused(memdir: Path, victim: str) -> None:
    path = memdir / ".git" / victim
    if path.is_dir():
        path.rename(memdir / "moved")
    else:
        path.write_bytes(b"[core\n\tgarbage = = [\n")
    with pytest.raises(RepositoryUnreadable, match="cannot be read"):
        read(memdir)


def test_a_repository_is_read_while_its_owner_commits(memdir: Path, scratch: Path) -> None:
    script = 'for n in $(seq 400); do git commit --quiet --allow-empty -m "$n" && git tag "t$n" || exit; done'
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    for pair in identity[1::2]:
        run_git(memdir, "config", *pair.split("=", 1))
    with subprocess.Popen(["bash", "-c", script], cwd=memdir, stderr=subprocess.DEVNULL) as writer:
        try:
            for number in range(3):
                (scratch / str(number)).mkdir()
                with opened(memdir) as repository:
                    facts = repository.reading()
                    written = repository.write_bundle(facts, scratch / str(number))
                assert written is not None
                listed = run_git(memdir, "bundle", "list-heads", str(written[0])).splitlines()
                assert sorted(listed) == sorted(
                    [f"{facts.head_oid} HEAD", *(f"{oid} {name}" for name, oid in facts.refs.items())]
                )
        finally:
            writer.kill()
