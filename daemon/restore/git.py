"""A working repository out of a bundle's git part, by libgit2 alone: nothing of the bundle is executed.

The pack and its index are put into a new repository, every object is read back (libgit2 rehashes it),
everything that the refs reach has to be there, and only then are refs written. Configuration and hooks
are the new repository's own. What the bundle kept under a prefix of its own goes back to where it was: the
stash, the index, MERGE_HEAD and its like, in files whose names are fixed here. What has no such place stays
as refs, and is told of: todo lists of a rebase can hold commands, so none is ever carried.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pygit2
from pygit2.enums import ObjectType, RepositoryInitFlag

from daemon.capture.git_index import PARTS, Entry, index_bytes, tree_entries
from daemon.capture.git_objects import Walk
from daemon.capture.git_state import TEXT_FILES
from daemon.errors import IntegrityError, MalformedBundle
from daemon.model import GIT_HEAD_FILES, GitFacts, from_member_name

_SIGNATURE = b"# v2 git bundle\n"
_MAX_HEADER_BYTES = 64 << 20
_MAX_TEXT_BYTES = 1 << 20
_FALLBACK_HEAD = "refs/heads/main"
_NO_OID = "0" * 40
_GOES_ON = ("merge", "cherry-pick", "revert")
"""Operations whose state is all in files that are put back."""


def rebuild_repository(
    memdir: Path, facts: GitFacts, *, bundle: Path | None, index: Path | None
) -> tuple[str, ...]:
    """Make `memdir`, which holds the work tree, the repository that `facts` describe; what of it did not
    come back, for people to read.

    bundle and index are None for a repository that held nothing. Raises MalformedBundle, IntegrityError,
    OSError.
    """
    head = facts.head or _FALLBACK_HEAD
    _check_names(facts, head)
    try:
        repository = pygit2.init_repository(
            str(memdir), flags=RepositoryInitFlag.NO_REINIT | RepositoryInitFlag.MKDIR, initial_head=head
        )
        try:
            return _fill(repository, memdir, facts, bundle, index)
        finally:
            repository.free()
    except (pygit2.GitError, KeyError, ValueError) as exc:
        raise IntegrityError(
            f"the git repository in the bundle is damaged: {exc}", hint="restore an earlier snapshot"
        ) from exc


def _fill(
    repository: pygit2.Repository, memdir: Path, facts: GitFacts, bundle: Path | None, index: Path | None
) -> tuple[str, ...]:
    kept: dict[str, str] = {}
    if bundle is not None and index is not None:
        kept = _install_pack(repository, bundle, index, facts)
    _check_objects(repository, facts, kept)
    _write_refs(repository, facts)
    inside = _Inside(repository, facts, kept)
    inside.write_stash()
    inside.write_index()
    inside.write_state()
    inside.write_limits()
    return (*inside.left_as_refs(), *_let_submodules_go(memdir, facts))


def _check_names(facts: GitFacts, head: str) -> None:
    for name in [head, *facts.refs, *facts.symbolic_refs, *facts.symbolic_refs.values()]:
        if not name.startswith("refs/") or not pygit2.reference_is_valid_name(name):
            raise MalformedBundle(f"not a valid git ref: {name[:200]!r}")
    names = facts.refs.keys() | facts.symbolic_refs.keys()
    if facts.refs.keys() & facts.symbolic_refs.keys():
        raise MalformedBundle("a git ref is said to be symbolic, and to be none")
    if any(str(parent) in names for name in names for parent in PurePosixPath(name).parents):
        raise MalformedBundle("a git ref lies below another")
    if any(f"{name}/".startswith(f"{facts.kept_under}/") for name in names):
        raise MalformedBundle("the repository has refs where the bundle keeps others")


def _install_pack(
    repository: pygit2.Repository, bundle: Path, index: Path, facts: GitFacts
) -> dict[str, str]:
    """Cut the pack out of the bundle and put it and its index among the repository's objects.

    Returns what the bundle keeps under its own prefix: names without it, and object ids.
    """
    pack_directory = Path(repository.path) / "objects" / "pack"
    with bundle.open("rb") as stream:
        kept = _kept_refs(_read_bundle_header(stream), facts)
        pack = pack_directory / "pack-restored.pack"
        with pack.open("xb") as target:
            shutil.copyfileobj(stream, target, 1 << 20)
    with pack.open("rb") as stream:
        stream.seek(-20, 2)
        name = stream.read().hex()
    pack.rename(pack_directory / f"pack-{name}.pack")
    _check_index(index, pack_name=name)
    shutil.copyfile(index, pack_directory / f"pack-{name}.idx")
    if facts.partial:  # what tells git that objects are missing on purpose
        (pack_directory / f"pack-{name}.promisor").touch()
    for path in pack_directory.iterdir():
        path.chmod(0o444)
    return kept


def _kept_refs(listed: dict[str, str], facts: GitFacts) -> dict[str, str]:
    """What of a bundle's refs is under its own prefix; everything is as the facts have it."""
    prefix = f"{facts.kept_under}/"
    kept = {name: oid for name, oid in listed.items() if name.startswith(prefix)}
    own = {name: oid for name, oid in listed.items() if name not in kept}
    named = facts.kept_refs()
    made = {f"{prefix}index/{part}" for part in PARTS} | {f"{prefix}{name}" for name in TEXT_FILES}
    if (
        own != facts.refs | ({"HEAD": facts.head_oid} if facts.head_oid else {})
        or any(name not in made and named.get(name) != oid for name, oid in kept.items())
        or any(f"{prefix}stash/{number}" not in kept for number in range(len(facts.stash)))
    ):
        raise MalformedBundle("the git bundle and the manifest name different refs")
    return {name.removeprefix(prefix): oid for name, oid in kept.items()}


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


def _check_objects(repository: pygit2.Repository, facts: GitFacts, kept: dict[str, str]) -> None:
    """Read every object, which rehashes it, and find everything that the refs reach."""
    odb = repository.odb
    for oid in odb:
        odb.read(oid)
    walk = Walk(odb, boundary=facts.shallow, lenient=facts.partial)
    for tip in sorted({*facts.refs.values(), *kept.values(), *([facts.head_oid] if facts.head_oid else [])}):
        for _ in walk.reach(tip):
            pass
    if len(walk.missing) > facts.missing_objects:
        raise IntegrityError(
            f"the git repository in the bundle lacks {len(walk.missing)} objects, and"
            f" {facts.missing_objects} were missing when it was captured"
        )


def _write_refs(repository: pygit2.Repository, facts: GitFacts) -> None:
    for name, target in facts.refs.items():
        repository.create_reference_direct(name, pygit2.Oid(hex=target), True)
    for name, points_to in facts.symbolic_refs.items():
        repository.create_reference_symbolic(name, points_to, True)
    if facts.head is None and facts.head_oid is not None:
        repository.set_head(pygit2.Oid(hex=facts.head_oid))


class _Inside:
    """The repository's own directory, and what goes there beside objects and refs.

    kept: what the bundle has under its prefix, by the rest of the name
    """

    def __init__(self, repository: pygit2.Repository, facts: GitFacts, kept: dict[str, str]) -> None:
        self._repository = repository
        self._directory = Path(repository.path)
        self._facts = facts
        self._kept = kept
        self._put_back: set[str] = set()

    def write_stash(self) -> None:
        """As `git stash` would have: its list is the reflog of one ref."""
        if not self._facts.stash:
            return
        newest = self._facts.refs.get("refs/stash", self._facts.stash[0].oid)
        self._repository.create_reference_direct("refs/stash", pygit2.Oid(hex=newest), True)
        lines, before = [], _NO_OID
        for entry in reversed(self._facts.stash):
            who = f"{entry.committer_name} <{entry.committer_email}>"
            lines.append(
                f"{before} {entry.oid} {who} {entry.committed_at} {entry.utc_offset}\t{entry.message}\n"
            )
            before = entry.oid
        log = self._directory / "logs" / "refs" / "stash"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(lines), encoding="utf-8", newline="\n")
        self._put_back |= {f"stash/{number}" for number in range(len(self._facts.stash))}

    def write_index(self) -> None:
        """As it was captured; of an older bundle, which has none, as after `git reset`."""
        if "index/staged" in self._kept:
            entries = self._captured_index()
        elif self._facts.head_oid is not None:
            commit = self._repository[self._facts.head_oid].peel(ObjectType.COMMIT)
            entries = list(self._entries(commit.peel(ObjectType.TREE).id))
        else:
            return
        (self._directory / "index").write_bytes(index_bytes(entries))
        self._put_back |= {f"index/{part}" for part in PARTS}

    def _captured_index(self) -> list[Entry]:
        parts = {
            part: list(self._entries(pygit2.Oid(hex=self._kept[name])))
            for part in PARTS
            if (name := f"index/{part}") in self._kept
        }
        entries = list(parts["staged"])
        for stage, part in enumerate(("base", "ours", "theirs"), start=1):
            entries += [replace(entry, stage=stage) for entry in parts.get(part, ())]
        entries += [replace(entry, intent_to_add=True) for entry in parts.get("intent-to-add", ())]
        skipped, unchanged = (
            {entry.path for entry in parts.get(part, ())} for part in ("skip-worktree", "assume-unchanged")
        )
        return [
            replace(entry, skip_worktree=entry.path in skipped, assume_unchanged=entry.path in unchanged)
            for entry in entries
        ]

    def _entries(self, tree: pygit2.Oid) -> Iterator[Entry]:
        odb = self._repository.odb

        def read(raw: bytes) -> bytes | None:
            oid = pygit2.Oid(raw=raw)
            if self._facts.partial and oid not in odb:
                return None
            kind, data = odb.read(oid)
            if kind != ObjectType.TREE:
                raise MalformedBundle("a part of the index is no tree")
            return data

        return tree_entries(tree.raw, read)

    def write_state(self) -> None:
        """MERGE_HEAD and its like, where all that they name is here; the messages that go with them."""
        for name in GIT_HEAD_FILES:
            oids = self._facts.heads.get(name, ())
            refs = [f"{name}/{number}" for number in range(len(oids))]
            if oids and self._kept.keys() >= set(refs):
                (self._directory / name).write_text("".join(f"{oid}\n" for oid in oids))
                self._put_back.update(refs)
        for name in TEXT_FILES:
            if name in self._kept:
                kind, text = self._repository.odb.read(pygit2.Oid(hex=self._kept[name]))
                if kind != ObjectType.BLOB or len(text) > _MAX_TEXT_BYTES:
                    raise MalformedBundle(f"{name} of the repository is no message")
                (self._directory / name).write_bytes(text)
                self._put_back.add(name)

    def write_limits(self) -> None:
        """Where history ends: git looks for no parents of these."""
        odb = self._repository.odb
        ends = [oid for oid in self._facts.shallow if pygit2.Oid(hex=oid) in odb]
        if ends:
            (self._directory / "shallow").write_text("".join(f"{oid}\n" for oid in sorted(ends)))

    def left_as_refs(self) -> Iterator[str]:
        """Keep under their names what has no place of its own, and tell of what is not as it was."""
        facts = self._facts
        for name in sorted(self._kept.keys() - self._put_back):
            self._repository.create_reference_direct(
                f"{facts.kept_under}/{name}", pygit2.Oid(hex=self._kept[name]), True
            )
        for operation in facts.operations:
            if operation.kind not in _GOES_ON:
                of = f" of {operation.branch}" if operation.branch else ""
                yield f"git: the {operation.kind}{of} that was under way (its heads: {facts.kept_under}/)"
        for number, worktree in enumerate(facts.worktrees):
            head = worktree.head or f"{facts.kept_under}/worktree/{number}"
            yield f"git: the other work tree {worktree.path} (its HEAD: {head})"
        if facts.missing_objects:
            yield f"git: {facts.missing_objects} objects of a partial clone, which were not there to capture"


def _let_submodules_go(memdir: Path, facts: GitFacts) -> Iterator[str]:
    """A submodule's repository lies within the one that is made anew: a `.git` that points there would
    point nowhere, and git would stop at it. Their files are there, and the commit they were at."""
    for submodule in facts.submodules:
        pointer = memdir / from_member_name(submodule.path) / ".git"
        if pointer.is_file():  # as a directory it is a repository of its own, and came with the files
            pointer.unlink()
            where = f", to be cloned from {submodule.url}" if submodule.url else ""
            yield f"git: the repository of submodule {submodule.path} (at {submodule.commit}{where})"
