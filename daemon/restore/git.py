"""A working repository out of a bundle's git part, by libgit2 alone: nothing of the bundle is executed.

The pack and its index are put into a new repository, every object is read back (libgit2 rehashes it),
everything that the refs reach has to be there, and only then are refs written. Configuration and hooks
are the new repository's own.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pygit2
from pygit2.enums import ObjectType, RepositoryInitFlag

from daemon.capture.git import reachable
from daemon.errors import IntegrityError, MalformedBundle
from daemon.model import GitFacts

_SIGNATURE = b"# v2 git bundle\n"
_MAX_HEADER_BYTES = 64 << 20
_FALLBACK_HEAD = "refs/heads/main"


def rebuild_repository(memdir: Path, facts: GitFacts, *, bundle: Path | None, index: Path | None) -> None:
    """Make `memdir`, which holds the work tree, the repository that `facts` describe.

    bundle and index are None for a repository without a commit. Raises MalformedBundle, IntegrityError,
    OSError.
    """
    head = facts.head or _FALLBACK_HEAD
    _check_names(facts, head)
    try:
        repository = pygit2.init_repository(
            str(memdir), flags=RepositoryInitFlag.NO_REINIT | RepositoryInitFlag.MKDIR, initial_head=head
        )
        try:
            if bundle is not None and index is not None:
                _install_pack(repository, bundle, index, facts)
            _check_objects(repository, facts)
            _write_refs(repository, facts)
        finally:
            repository.free()
    except (pygit2.GitError, KeyError, ValueError) as exc:
        raise IntegrityError(
            f"the git repository in the bundle is damaged: {exc}", hint="restore an earlier snapshot"
        ) from exc


def _check_names(facts: GitFacts, head: str) -> None:
    for name in [head, *facts.refs]:
        if not name.startswith("refs/") or not pygit2.reference_is_valid_name(name):
            raise MalformedBundle(f"not a valid git ref: {name[:200]!r}")


def _install_pack(repository: pygit2.Repository, bundle: Path, index: Path, facts: GitFacts) -> None:
    """Cut the pack out of the bundle and put it and its index among the repository's objects."""
    pack_directory = Path(repository.path) / "objects" / "pack"
    with bundle.open("rb") as stream:
        listed = _read_bundle_header(stream)
        expected = dict(facts.refs) | ({"HEAD": facts.head_oid} if facts.head_oid else {})
        if listed != expected:
            raise MalformedBundle("the git bundle and the manifest name different refs")
        pack = pack_directory / "pack-restored.pack"
        with pack.open("xb") as target:
            shutil.copyfileobj(stream, target, 1 << 20)
    with pack.open("rb") as stream:
        stream.seek(-20, 2)
        name = stream.read().hex()
    pack.rename(pack_directory / f"pack-{name}.pack")
    _check_index(index, pack_name=name)
    shutil.copyfile(index, pack_directory / f"pack-{name}.idx")
    for path in pack_directory.iterdir():
        path.chmod(0o444)


def _check_index(index: Path, *, pack_name: str) -> None:
    """Its trailer names the pack and then itself. libgit2 checks neither."""
    digest = hashlib.sha1(usedforsecurity=False)
    with index.open("rb") as stream:
        left, tail = index.stat().st_size - 20, b""
        while left > 0 and (data := stream.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
            tail = (tail + data)[-20:]
        said = stream.read()
    if left != 0 or tail.hex() != pack_name or said != digest.digest():
        raise MalformedBundle("the index of the git pack is damaged, or of another pack")


def _read_bundle_header(stream: object) -> dict[str, str]:
    """The refs of a version 2 bundle; the stream stands at the pack afterwards."""
    readline = stream.readline  # type: ignore[attr-defined]
    if readline(len(_SIGNATURE)) != _SIGNATURE:
        raise MalformedBundle("git/memory.bundle is not a git bundle of version 2")
    refs: dict[str, str] = {}
    read_bytes = 0
    while (line := readline(1 << 16)) != b"\n":
        read_bytes += len(line)
        oid, space, name = line.rstrip(b"\n").partition(b" ")
        if not space or line[-1:] != b"\n" or len(oid) != 40 or read_bytes > _MAX_HEADER_BYTES:
            raise MalformedBundle("the git bundle's header is damaged, or needs objects that it lacks")
        refs[name.decode("utf-8", "replace")] = oid.decode("ascii", "replace")
    return refs


def _check_objects(repository: pygit2.Repository, facts: GitFacts) -> None:
    """Read every object, which rehashes it, and find everything that the refs reach."""
    odb = repository.odb
    for oid in odb:
        odb.read(oid)
    tips = {*facts.refs.values(), *([facts.head_oid] if facts.head_oid else [])}
    for oid in reachable(repository, tips):
        if oid not in odb:
            raise IntegrityError(f"the git repository in the bundle lacks object {oid}")


def _write_refs(repository: pygit2.Repository, facts: GitFacts) -> None:
    for name, target in facts.refs.items():
        repository.create_reference_direct(name, pygit2.Oid(hex=target), True)
    if facts.head is None and facts.head_oid is not None:
        repository.set_head(pygit2.Oid(hex=facts.head_oid))
    if facts.head_oid is not None:
        # As after `git reset`: what was staged shows as modified or untracked, and none of it is lost.
        commit = repository[facts.head_oid].peel(ObjectType.COMMIT)
        repository.index.read_tree(commit.peel(ObjectType.TREE).id)
        repository.index.write()
