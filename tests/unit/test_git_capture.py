"""Reading a live repository: refs as they are, objects as git packs them, nothing of it executed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from daemon.capture.git import GitReading, LiveRepository, RepositoryUnreadable
from daemon.capture.git_index import Entry, index_bytes
from daemon.capture.git_state import submodule_urls
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


def read(memdir: Path) -> GitReading:
    with opened(memdir) as repository:
        return repository.reading()


def heads_in(bundle: Path) -> list[str]:
    """The refs of a bundle, without those that it keeps under a prefix of ours."""
    listed = run_git(bundle.parent, "bundle", "list-heads", str(bundle)).splitlines()
    return [line for line in listed if "refs/agentkeep" not in line]


def test_every_ref_is_read_loose_or_packed(memdir: Path) -> None:
    first = run_git(memdir, "rev-parse", "HEAD").strip()
    run_git(memdir, "tag", "light")
    run_git(memdir, "branch", "side/line")
    run_git(memdir, "pack-refs", "--all")
    second = commit(memdir, "second")
    facts = read(memdir)
    assert (facts.head, facts.head_oid) == ("refs/heads/main", second)
    assert facts.refs == {"refs/heads/main": second, "refs/heads/side/line": first, "refs/tags/light": first}


def test_a_symbolic_ref_is_told_by_what_it_points_to(memdir: Path) -> None:
    run_git(memdir, "update-ref", "refs/remotes/origin/main", "HEAD")
    run_git(memdir, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    facts = read(memdir)
    assert facts.symbolic_refs == {"refs/remotes/origin/HEAD": "refs/remotes/origin/main"}
    assert facts.refs.keys() == {"refs/heads/main", "refs/remotes/origin/main"}


def test_a_detached_head_is_a_commit_and_no_branch(memdir: Path) -> None:
    first = run_git(memdir, "rev-parse", "HEAD").strip()
    commit(memdir, "second")
    run_git(memdir, "checkout", "--quiet", "--detach", first)
    assert (read(memdir).head, read(memdir).head_oid) == (None, first)


def test_an_unborn_branch_is_a_branch_and_no_commit(memdir: Path) -> None:
    run_git(memdir, "checkout", "--quiet", "--orphan", "fresh")
    assert (read(memdir).head, read(memdir).head_oid) == ("refs/heads/fresh", None)


MOVES: dict[str, Callable[[Path], object]] = {
    "a commit": lambda memdir: commit(memdir, "second"),
    "a tag": lambda memdir: run_git(memdir, "tag", "light"),
    "a symbolic ref": lambda memdir: run_git(memdir, "symbolic-ref", "refs/heads/x", "refs/heads/main"),
    "staging": lambda memdir: run_git(memdir, "update-index", "--chmod=+x", "first.md"),
    "an index that is gone": lambda memdir: (memdir / ".git/index").unlink(),
    "a head": lambda memdir: (memdir / ".git/ORIG_HEAD").write_text(f"{'1' * 40}\n"),
    "a message": lambda memdir: (memdir / ".git/MERGE_MSG").write_text("merging\n"),
    "a bisection": lambda memdir: run_git(memdir, "bisect", "start"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_readings_differ_when_something_moved(memdir: Path, move: Callable[[Path], object]) -> None:
    with opened(memdir) as repository:
        before = repository.reading()
        assert repository.reading() == before
        move(memdir)
        assert repository.reading() != before
        assert repository.reading() == repository.reading()


def test_a_dropped_stash_is_a_move(memdir: Path) -> None:
    for text in ("one", "two"):
        (memdir / "first.md").write_text(text)
        run_git(memdir, "stash", "--quiet")
    with opened(memdir) as repository:
        before = repository.reading()
        run_git(memdir, "stash", "drop", "--quiet", "stash@{1}")
        after = repository.reading()
    assert after.refs == before.refs
    assert after != before
    assert after.stash == before.stash[:1]


def test_readings_are_equal_whatever_git_does_to_how_objects_and_refs_are_kept(memdir: Path) -> None:
    with opened(memdir) as repository:
        before = repository.reading()
        (memdir / "untracked.md").write_text("x")
        run_git(memdir, "gc", "--quiet")
        assert repository.reading() == before


def test_the_index_in_a_bundle_is_the_one_of_the_reading(memdir: Path, scratch: Path, tmp_path: Path) -> None:
    def staged(text: str) -> str:
        (memdir / "first.md").write_text(text)
        run_git(memdir, "add", ".")
        return run_git(memdir, "write-tree").strip()

    with opened(memdir) as repository:
        before = staged("of the cut\n")
        reading = repository.reading()
        for number in range(20):  # so that the inode is used again
            staged(f"later, {number}\n")
        bundle, _ = repository.write_bundle(reading, scratch) or (None, None)
    assert f"{before} refs/agentkeep/index/staged" in run_git(memdir, "bundle", "list-heads", str(bundle))


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
    cloned = run_git(tmp_path / "clone.git", "show-ref").splitlines()
    assert [line for line in cloned if "refs/agentkeep" not in line] == run_git(
        memdir, "show-ref"
    ).splitlines()
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
    assert heads_in(written[0]) == [f"{reading.head_oid} HEAD", f"{reading.head_oid} refs/heads/main"]


def test_a_repository_without_any_commit_has_no_bundle(tmp_path: Path, scratch: Path) -> None:
    run_git(tmp_path, "init", "--quiet", "--initial-branch=main", "empty")
    with opened(tmp_path / "empty") as repository:
        facts = repository.reading()
        assert (facts.head, facts.head_oid, facts.refs) == ("refs/heads/main", None, {})
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


def test_a_repository_with_objects_named_by_sha256_is_refused_with_what_to_do(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run_git(tmp_path, "init", "--quiet", "--object-format=sha256", str(old))
    commit(old, "first")
    with pytest.raises(RepositoryUnreadable) as raised:
        LiveRepository(old)
    assert "git init --object-format=sha1 NEW" in raised.value.hint
    run_git(tmp_path, "init", "--quiet", "--object-format=sha1", str(new))
    assert "git fast-export --all | git -C NEW fast-import" in raised.value.hint
    (tmp_path / "exported").write_text(run_git(old, "fast-export", "--all"))
    with (tmp_path / "exported").open() as stream:
        subprocess.run(["git", "-C", str(new), "fast-import", "--quiet"], stdin=stream, check=True)
    assert read(new).refs.keys() == read_names(old)


def read_names(memdir: Path) -> set[str]:
    return set(run_git(memdir, "for-each-ref", "--format=%(refname)").split())


def test_a_repository_with_a_reftable_is_refused_with_what_to_do(memdir: Path) -> None:
    run_git(memdir, "config", "core.repositoryFormatVersion", "1")
    run_git(memdir, "config", "extensions.refStorage", "reftable")
    with pytest.raises(RepositoryUnreadable) as raised:
        LiveRepository(memdir)
    assert "git refs migrate" in raised.value.hint


def test_a_split_index_is_refused_with_what_to_do(memdir: Path, scratch: Path) -> None:
    run_git(memdir, "update-index", "--split-index")
    with opened(memdir) as repository, pytest.raises(RepositoryUnreadable) as raised:
        repository.write_bundle(repository.reading(), scratch)
    assert "git update-index --no-split-index" in raised.value.hint
    run_git(memdir, "update-index", "--no-split-index")
    with opened(memdir) as repository:
        assert repository.write_bundle(repository.reading(), scratch) is not None


def damaged(data: bytes) -> Iterator[bytes]:
    yield b""
    yield data[:40]
    yield data[:-30]
    yield data[:200].replace(b"first", b"wurst") + data[200:]
    yield b"DIRC" + bytes([0, 0, 0, 9]) + data[8:]


def test_a_damaged_index_is_refused_with_what_to_do(memdir: Path, scratch: Path) -> None:
    for number, data in enumerate(damaged((memdir / ".git/index").read_bytes())):
        (memdir / ".git/new-index").write_bytes(data)
        (memdir / ".git/new-index").rename(memdir / ".git/index")
        (scratch / str(number)).mkdir()
        with opened(memdir) as repository, pytest.raises(RepositoryUnreadable) as raised:
            repository.write_bundle(repository.reading(), scratch / str(number))
        assert "git reset" in raised.value.hint


def test_an_index_that_is_written_into_is_not_taken_for_the_one_of_the_cut(
    memdir: Path, scratch: Path
) -> None:
    index = memdir / ".git/index"
    with opened(memdir) as repository:
        reading = repository.reading()
        index.write_bytes(index.read_bytes() + b"\0")
        with pytest.raises(RepositoryUnreadable, match="written into"):
            repository.write_bundle(reading, scratch)


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
                assert sorted(heads_in(written[0])) == sorted(
                    [f"{facts.head_oid} HEAD", *(f"{oid} {name}" for name, oid in facts.refs.items())]
                )
        finally:
            writer.kill()


# --- what goes on while it is read ----------------------------------------------------------------


def test_a_collection_of_garbage_between_reading_and_writing_is_survived(memdir: Path, scratch: Path) -> None:
    for number in range(5):
        commit(memdir, f"more-{number}")
        run_git(memdir, "repack", "-d")
    (memdir / "first.md").write_text("stashed\n")
    run_git(memdir, "stash", "--quiet")
    (memdir / "first.md").write_text("staged\n")
    run_git(memdir, "add", ".")
    with opened(memdir) as repository:
        reading = repository.reading()
        repository.write_bundle(reading, made(scratch / "before"))  # which opens every pack
        run_git(memdir, "gc", "--quiet", "--aggressive", "--prune=now")
        bundle, _ = repository.write_bundle(reading, made(scratch / "after")) or (None, None)
    assert bundle is not None
    run_git(scratch, "clone", "--quiet", "--mirror", str(bundle), "clone.git")
    run_git(scratch / "clone.git", "fsck", "--full", "--strict")


def test_a_repository_is_read_while_it_collects_its_garbage(memdir: Path, scratch: Path) -> None:
    for number in range(40):
        commit(memdir, f"note-{number}")
    script = (
        "while :; do git repack -q -a -d -f; git unpack-objects < .git/objects/pack/*.pack; git prune; done"
    )
    with subprocess.Popen(["bash", "-c", script], cwd=memdir, stderr=subprocess.DEVNULL) as collector:
        try:
            for number in range(12):
                with opened(memdir) as repository:
                    assert repository.write_bundle(repository.reading(), made(scratch / str(number)))
        finally:
            collector.kill()


def test_objects_that_only_a_stale_head_names_may_be_gone(memdir: Path, scratch: Path) -> None:
    let_go = commit(memdir, "let-go")
    run_git(memdir, "reset", "--quiet", "--hard", "HEAD~1")
    assert (memdir / ".git/ORIG_HEAD").exists()
    (memdir / ".git/ORIG_HEAD").write_text(f"{let_go}\n")
    run_git(memdir, "reflog", "expire", "--expire=now", "--all")
    run_git(memdir, "gc", "--quiet", "--prune=now")
    with opened(memdir) as repository:
        written = repository.write_bundle(repository.reading(), scratch)
        assert repository.captured is not None
    assert written is not None
    assert repository.captured.heads == {"ORIG_HEAD": (let_go,)}
    assert "ORIG_HEAD" not in run_git(memdir, "bundle", "list-heads", str(written[0]))


@pytest.mark.parametrize(
    "name",
    [
        *(".", "HEAD", "shallow", "packed-refs", "objects/info/alternates"),
        *("objects/pack/x.idx", "objects/ab/cdef", "refs/heads/x"),
        *("MERGE_HEAD", "MERGE_MSG", "logs/refs/stash", "index"),
    ],
)
def test_a_fifo_that_libgit2_would_wait_for_is_refused(memdir: Path, name: str) -> None:
    path = memdir / ".git" / name
    if name == ".":
        path.rename(memdir / "git")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(RepositoryUnreadable, match="is a FIFO"), opened(memdir):
        pass


def test_a_fifo_that_the_configuration_includes_is_refused(memdir: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    run_git(memdir, "config", "include.path", str(tmp_path / "fifo"))
    with pytest.raises(RepositoryUnreadable, match="is a FIFO"), opened(memdir):
        pass


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_an_index_that_would_take_all_memory_is_refused(memdir: Path, scratch: Path) -> None:
    """Each of its paths is a thousand directories deep, and shares none with the others."""
    entries = [Entry(b"%d" % number + b"/d" * 2000, 0o100644, bytes(20)) for number in range(400)]
    (memdir / ".git/index").write_bytes(index_bytes(entries))
    with opened(memdir) as repository, pytest.raises(RepositoryUnreadable, match="too many directories"):
        repository.write_bundle(repository.reading(), scratch)


def test_gitmodules_of_any_shape_are_read_in_no_time() -> None:
    assert submodule_urls(b"[s]\npath=x" + b" " * 1_000_000 + b"y\n" + b"=" * 1_000_000) == {}
    assert submodule_urls(b'[submodule "a"]\n\tPath = "a b"\n\turl=../c?d\n') == {b"a b": "../c?d"}


# --- remotes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.net/a.git", "https://example.net/a.git"),
        ("https://user:pass@example.net:8443/a.git", "https://example.net:8443/a.git"),
        ("https://ghp_token@example.net/a.git", "https://example.net/a.git"),
        ("https://u:p@ss@example.net/a@b.git", "https://example.net/a@b.git"),
        ("https://example.net/a.git?private_token=x#y", "https://example.net/a.git"),
        ("https://u:p@example.net", "https://example.net"),
        ("ssh://git@example.net/a.git", "ssh://git@example.net/a.git"),
        ("ssh://git:secret@example.net/a.git", "ssh://example.net/a.git"),
        ("helper::https://u:p@example.net/a", "helper::https://example.net/a"),
        ("git@example.net:a.git", "git@example.net:a.git"),
        ("u:tok@example.net:a.git", "example.net:a.git"),
        ("//u:tok@example.net/a.git", "//example.net/a.git"),
        ("https://u:t ok@example.net/a.git", "https://example.net/a.git"),
        ("https://u:to/k@example.net/a.git", "https://example.net"),
        ("https://u:to?k@example.net", "https://example.net"),
        ("https://example.net/a.git;token=1", "https://example.net/a.git"),
        ("https://[::1]:8443/a.git", "https://[::1]:8443/a.git"),
        ("ext::sh -c 'curl -H Authorization:tok %S'", "ext::"),
        ("/srv/git/a.git", "/srv/git/a.git"),
        ("caf\udce9\x1b", "caf\\xe9 "),
    ],
)
def test_a_remote_is_named_without_what_opens_it(memdir: Path, url: str, shown: str) -> None:
    run_git(memdir, "config", "remote.some.where.url", url)
    assert read(memdir).remotes == {"some.where": shown}
