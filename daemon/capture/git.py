"""Reading a live git repository: refs as of the cut, what refs do not hold, and a git bundle of both.

Objects are immutable and found by digest, so the bundle may be written after the window: what the refs
named at the cut is what it holds. The index is a file that git replaces and never writes into, so a
descriptor opened at the cut goes on reading the index of the cut. Stash, index, and what an operation under
way has noted become refs of their own in the bundle, under a prefix that the repository does not use.

The repository is never written to, and through libgit2 alone nothing of it is executed: no hook, filter,
pager or user configuration of anybody. New objects (trees of the index) are made in a scratch repository,
before that knows of the live one's objects: libgit2 touches the file of an object that is there already.

Source: https://git-scm.com/docs/gitformat-bundle (version 2), /gitformat-pack, /gitrepository-layout.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pygit2
from pydantic import Field
from pygit2.enums import ObjectType

from daemon.capture import git_state
from daemon.capture.git_index import (
    GITLINK,
    MAX_INDEX_BYTES,
    PARTS,
    Entry,
    IndexUnreadable,
    parse_index,
    write_tree,
)
from daemon.capture.git_objects import Walk
from daemon.model import GitFacts, GitSubmodule, to_member_name

# The configuration of whoever runs us has no business in an agent's repository.
for _level in (
    pygit2.enums.ConfigLevel.SYSTEM,
    pygit2.enums.ConfigLevel.XDG,
    pygit2.enums.ConfigLevel.GLOBAL,
):
    with suppress(KeyError):
        pygit2.settings.search_path[_level] = ""
# Neither changes what refs and objects look like. What is missing in a partial clone is dealt with here.
pygit2.settings.set_extensions(["partialclone", "relativeworktrees"])

_KEPT_UNDER = "refs/agentkeep"
_MAX_LINKS = 5  # as many symbolic refs as git follows
_MAX_GITMODULES_BYTES = 1 << 20

_Signature = tuple[int, ...]


class RepositoryUnreadable(Exception):
    """A repository that cannot be captured: the message says why, `hint` what to do."""

    def __init__(self, reason: str, *, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


class GitReading(GitFacts):
    """Facts, and what tells whether anything else moved. A manifest has the facts only.

    index: device, inode, size, mtime and ctime of the index file; None: there is none
    texts: messages of a merge under way
    """

    index: Annotated[_Signature | None, Field(exclude=True)] = None
    texts: Annotated[dict[str, bytes], Field(exclude=True, default_factory=dict)]


class LiveRepository:
    def __init__(self, memdir: Path) -> None:
        """Raises RepositoryUnreadable."""
        self.path = memdir
        self.captured: GitFacts | None = None
        """What the bundle that was written last holds: the facts for a manifest."""
        self._index: int | None = None
        self._index_signature: _Signature | None = None
        _refuse_what_waits(memdir)
        try:
            self._repository = pygit2.Repository(str(memdir), pygit2.enums.RepositoryOpenFlag.NO_SEARCH)
        except (pygit2.GitError, OSError, KeyError, ValueError) as exc:
            raise _unreadable(exc) from exc
        self._own = Path(self._repository.path)
        self._common = git_state.common_directory(self._own)

    def reading(self) -> GitReading:
        """Every ref and HEAD, and what is not a ref, now. Equal readings mean that nothing moved.

        Raises RepositoryUnreadable.
        """
        try:
            return self._reading()
        except (pygit2.GitError, KeyError, OSError, ValueError) as exc:
            raise _unreadable(exc) from exc

    def _reading(self) -> GitReading:
        repository, own, common = self._repository, self._own, self._common
        refs: dict[str, str] = {}
        symbolic: dict[str, str] = {}
        for raw in repository.raw_listall_references():
            reference = repository.lookup_reference(_ref_name(raw))
            (symbolic if isinstance(reference.target, str) else refs)[reference.name] = str(reference.target)
        head = repository.lookup_reference("HEAD")
        head_name = str(head.target) if isinstance(head.target, str) else None
        settings = [(entry.raw_name, entry.raw_value) for entry in repository.config]
        return GitReading(
            head=head_name,
            head_oid=_resolved(head_name, refs, symbolic) if head_name is not None else str(head.target),
            refs=dict(sorted(refs.items())),
            symbolic_refs=dict(sorted(symbolic.items())),
            stash=git_state.read_stash(common) if "refs/stash" in refs else (),
            heads=git_state.read_heads(own),
            operations=git_state.read_operations(own),
            worktrees=git_state.read_worktrees(own, common),
            remotes=git_state.remotes_of(settings),
            shallow=git_state.read_shallow(common),
            partial=git_state.is_partial(settings),
            kept_under=_free_prefix({**refs, **symbolic}),
            index=self._hold_index(),
            texts=git_state.read_texts(own),
        )

    def _hold_index(self) -> _Signature | None:
        """Have the index of now open, and say which it is."""
        path = self._own / "index"
        try:
            signature = _signature(path.stat())
        except FileNotFoundError:
            signature = None
        if signature != self._index_signature or signature is None:
            self._let_index_go()
            self._index = git_state.open_regular(path)
            if self._index is not None:
                self._index_signature = _signature(os.fstat(self._index))
        return self._index_signature

    def _let_index_go(self) -> None:
        if self._index is not None:
            os.close(self._index)
        self._index = self._index_signature = None

    def write_bundle(self, facts: GitFacts, scratch: Path) -> tuple[Path, Path] | None:
        """Write `memory.bundle` and its pack's index into `scratch`; None where there is nothing to hold.

        facts: the reading taken last. Raises RepositoryUnreadable (corrupt or pruned objects), OSError.
        """
        assert isinstance(facts, GitReading)
        assert facts.index == self._index_signature
        try:
            with TemporaryDirectory(dir=scratch) as work:
                return self._write_bundle(facts, self._index_entries(), scratch, Path(work))
        except (pygit2.GitError, KeyError, ValueError) as exc:
            raise _unreadable(exc) from exc

    def _write_bundle(
        self, facts: GitReading, entries: list[Entry], scratch: Path, work: Path
    ) -> tuple[Path, Path] | None:
        packing = pygit2.init_repository(str(work / "objects.git"), bare=True)
        tips = _made_objects(packing.odb, facts, entries)
        packing.odb.add_disk_alternate(str(self._common / "objects"))
        tips |= facts.refs
        if facts.head_oid is not None:
            tips["HEAD"] = facts.head_oid
        walk = Walk(packing.odb, boundary=facts.shallow, lenient=facts.partial)
        is_empty = not entries and tips.keys() == {f"{facts.kept_under}/index/staged"}
        if not is_empty:
            tips |= _pack(packing, walk, tips, facts, work)
        self.captured = facts.model_copy(
            update={
                "submodules": _submodules(packing.odb, entries),
                "missing_objects": len(walk.missing),
            }
        )
        if is_empty:
            return None
        (pack,) = work.glob("*.pack")
        (index,) = work.glob("*.idx")
        _as_bundle(pack, tips, scratch / "memory.bundle")
        return scratch / "memory.bundle", index.rename(scratch / "memory.idx")

    def _index_entries(self) -> list[Entry]:
        """The index as it was held. Raises IndexUnreadable, also if it was written into."""
        if self._index is None:
            return []
        data = os.pread(self._index, MAX_INDEX_BYTES + 1, 0)
        # Replacing the file changes the ctime of the old one, writing into it more than that.
        if _signature(os.fstat(self._index))[:-1] != (self._index_signature or ())[:-1]:
            raise IndexUnreadable("the index was written into, which git does not do")
        return parse_index(data)

    def close(self) -> None:
        self._let_index_go()
        self._repository.free()


def _refuse_what_waits(memdir: Path) -> None:
    """A FIFO in the place of a file that libgit2 reads would hold us, and every other thread, for ever."""
    for path in git_state.what_waits(memdir / ".git"):
        raise RepositoryUnreadable(f"{path} is a FIFO or a device", hint="remove it, then run `git fsck`")


def _made_objects(odb: pygit2.Odb, facts: GitReading, entries: list[Entry]) -> dict[str, str]:
    """Objects for what a live repository has as files; by the names of the refs that will hold them."""

    def write(tree: bytes) -> bytes:
        return odb.write(ObjectType.TREE, tree).raw

    made = {name: odb.write(ObjectType.BLOB, text) for name, text in facts.texts.items()}
    for part, belongs in PARTS.items():
        chosen = [entry for entry in entries if belongs(entry)]
        if chosen or part == "staged":
            made[f"index/{part}"] = pygit2.Oid(raw=write_tree(chosen, write))
    if any(entry.intent_to_add for entry in entries):
        odb.write(ObjectType.BLOB, b"")  # their content is still to come, and git has no object for that
    return {f"{facts.kept_under}/{name}": str(oid) for name, oid in made.items()}


def _pack(
    packing: pygit2.Repository, walk: Walk, tips: dict[str, str], facts: GitFacts, directory: Path
) -> dict[str, str]:
    """Write pack and index of everything that `tips` reach, and what else of `facts` can be had: its refs.

    Raises KeyError, ValueError, pygit2.GitError.
    """
    builder = pygit2.PackBuilder(packing)
    builder.set_threads(os.cpu_count() or 1)
    for tip in sorted({*tips.values(), *(entry.oid for entry in facts.stash)}):
        for oid in walk.reach(tip):
            builder.add(oid)
    kept = {}
    for name, tip in facts.kept_refs().items():
        # git keeps nothing alive for ORIG_HEAD and its like: they may name what is gone.
        found = walk.reach_if_whole(tip)
        if found is not None:
            kept[name] = tip
            for oid in found:
                builder.add(oid)
    builder.write(str(directory))
    return kept


def _as_bundle(pack: Path, tips: dict[str, str], bundle: Path) -> None:
    with bundle.open("xb") as stream, pack.open("rb") as packed:
        stream.write(b"# v2 git bundle\n")
        for name, target in sorted(tips.items()):
            stream.write(f"{target} {name}\n".encode())
        stream.write(b"\n")
        shutil.copyfileobj(packed, stream, 1 << 20)


def _submodules(odb: pygit2.Odb, entries: list[Entry]) -> tuple[GitSubmodule, ...]:
    """As the index has them."""
    staged = [entry for entry in entries if entry.stage == 0]
    urls: dict[bytes, str] = {}
    for entry in staged:
        oid = pygit2.Oid(raw=entry.oid)
        if entry.path == b".gitmodules" and oid in odb and odb.read_header(oid)[1] <= _MAX_GITMODULES_BYTES:
            urls = git_state.submodule_urls(odb.read(oid)[1])
    return tuple(
        GitSubmodule(
            path=to_member_name(os.fsdecode(entry.path)), url=urls.get(entry.path), commit=entry.oid.hex()
        )
        for entry in staged
        if entry.mode == GITLINK
    )


def _resolved(name: str, refs: dict[str, str], symbolic: dict[str, str]) -> str | None:
    """What a ref comes to; None if that is not there yet."""
    for _ in range(_MAX_LINKS):
        name = symbolic.get(name, name)
    return refs.get(name)


def _free_prefix(names: Collection[str]) -> str:
    """Where the repository has no refs of its own: a restored one may have some of ours."""
    for number in count():
        prefix = f"{_KEPT_UNDER}-{number}" if number else _KEPT_UNDER
        if not any(f"{name}/".startswith(f"{prefix}/") for name in names):
            return prefix
    raise AssertionError


def _signature(status: os.stat_result) -> _Signature:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _ref_name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise RepositoryUnreadable(
            f"the name of a ref is not UTF-8: {raw!r}", hint="rename that branch or tag"
        ) from exc


_MEND = "run `git fsck` in it, mend what it names, or restore it from an earlier snapshot"
_REMAKE = "make it anew with `rm .git/index` and `git reset`, and stage again what was only staged"
_REMEDIES = {
    "object format": "its objects are named by SHA-256, which libgit2 cannot read: move it over with"
    " `git init --object-format=sha1 NEW` and `git fast-export --all | git -C NEW fast-import`",
    "refstorage": "its refs are in a reftable, which libgit2 cannot read:"
    " run `git refs migrate --ref-format=files` in it",
    "split over two files": "run `git update-index --no-split-index` in it, and unset core.splitIndex",
}
"""What to do, by what the error says."""


def _unreadable(exc: Exception) -> RepositoryUnreadable:
    otherwise = _REMAKE if isinstance(exc, IndexUnreadable) else _MEND
    hint = next((hint for words, hint in _REMEDIES.items() if words in str(exc)), otherwise)
    return RepositoryUnreadable(f"git repository cannot be read: {exc}", hint=hint)
