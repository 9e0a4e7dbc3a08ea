"""Reading a live git repository: refs as of the cut, and a git bundle of everything that they reach.

Objects are immutable and found by digest, so the bundle may be written after the window: what the refs
named at the cut is what it holds. Through libgit2 alone: no hook, filter, pager or user configuration of
anybody runs.

Source: https://git-scm.com/docs/gitformat-bundle (version 2), /gitformat-pack.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import pygit2
from pygit2.enums import FileMode, ObjectType, SortMode

from daemon.model import GitFacts

# The configuration of whoever runs us has no business in an agent's repository.
for _level in (
    pygit2.enums.ConfigLevel.SYSTEM,
    pygit2.enums.ConfigLevel.XDG,
    pygit2.enums.ConfigLevel.GLOBAL,
):
    with suppress(KeyError):
        pygit2.settings.search_path[_level] = ""


class RepositoryUnreadable(Exception):
    """A repository that cannot be captured: the message says why, `hint` what to do."""

    def __init__(self, reason: str, *, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


class LiveRepository:
    def __init__(self, memdir: Path) -> None:
        """Raises RepositoryUnreadable."""
        self.path = memdir
        try:
            self._repository = pygit2.Repository(str(memdir), pygit2.enums.RepositoryOpenFlag.NO_SEARCH)
            shallow = self._repository.is_shallow
        except (pygit2.GitError, OSError, KeyError) as exc:
            raise _unreadable(exc) from exc
        if shallow:
            raise RepositoryUnreadable(
                "is a shallow clone: part of its history is not here",
                hint="run `git fetch --unshallow` in it",
            )

    def reading(self) -> GitFacts:
        """Every ref and HEAD, now. Equal readings mean that no ref moved. Raises RepositoryUnreadable."""
        repository = self._repository
        try:
            refs = {}
            for raw in repository.raw_listall_references():
                reference = repository.lookup_reference(_ref_name(raw))
                if isinstance(reference.target, str):
                    continue  # symbolic, such as refs/remotes/origin/HEAD: its target is listed itself
                refs[reference.name] = str(reference.target)
            head = repository.lookup_reference("HEAD")
            symbolic = isinstance(head.target, str)
            head_name = str(head.target) if symbolic else None
            head_oid = refs.get(head_name) if head_name is not None else str(head.target)
        except (pygit2.GitError, KeyError, OSError, ValueError) as exc:
            raise _unreadable(exc) from exc
        return GitFacts(head=head_name, head_oid=head_oid, refs=dict(sorted(refs.items())))

    def write_bundle(self, facts: GitFacts, scratch: Path) -> tuple[Path, Path] | None:
        """Write `memory.bundle` and its pack's index into `scratch`; None where there is no commit at all.

        Raises RepositoryUnreadable (corrupt or pruned objects), OSError.
        """
        tips = dict(facts.refs)
        if facts.head_oid is not None:
            tips["HEAD"] = facts.head_oid
        if not tips:
            return None
        pack_directory = scratch / "pack"
        pack_directory.mkdir()
        try:
            builder = pygit2.PackBuilder(self._repository)
            builder.set_threads(os.cpu_count() or 1)
            for oid in reachable(self._repository, set(tips.values())):
                builder.add(oid)
            builder.write(str(pack_directory))
        except (pygit2.GitError, KeyError, ValueError) as exc:
            raise _unreadable(exc) from exc
        (pack,) = pack_directory.glob("*.pack")
        (index,) = pack_directory.glob("*.idx")
        bundle = scratch / "memory.bundle"
        with bundle.open("xb") as stream, pack.open("rb") as packed:
            stream.write(b"# v2 git bundle\n")
            for name, target in sorted(tips.items()):
                stream.write(f"{target} {name}\n".encode())
            stream.write(b"\n")
            shutil.copyfileobj(packed, stream, 1 << 20)
        pack.unlink()
        return bundle, index

    def close(self) -> None:
        self._repository.free()


def reachable(repository: pygit2.Repository, tips: set[str]) -> Iterator[pygit2.Oid]:
    """Every object that `tips` reach: tags, commits, trees, blobs; each once.

    Raises KeyError or pygit2.GitError where one is missing or corrupt. Memory: one id an object.
    """
    seen: set[pygit2.Oid] = set()
    walker = repository.walk(None, SortMode.NONE)
    trees: list[pygit2.Oid] = []
    for tip in sorted(tips):
        found: pygit2.Object = repository[tip]
        while found.type == ObjectType.TAG:
            if found.id not in seen:
                seen.add(found.id)
                yield found.id
            found = repository[cast(pygit2.Tag, found).target]
        if found.type == ObjectType.COMMIT:
            walker.push(found.id)
        elif found.type == ObjectType.TREE:
            trees.append(found.id)
        elif found.id not in seen:
            seen.add(found.id)
            yield found.id
    for commit in walker:
        yield commit.id
        trees.append(commit.tree_id)
        yield from _tree_objects(repository, trees, seen)
    yield from _tree_objects(repository, trees, seen)


def _tree_objects(
    repository: pygit2.Repository, pending: list[pygit2.Oid], seen: set[pygit2.Oid]
) -> Iterator[pygit2.Oid]:
    while pending:
        tree_id = pending.pop()
        if tree_id in seen:
            continue
        seen.add(tree_id)
        yield tree_id
        tree = repository[tree_id]
        for entry in cast(pygit2.Tree, tree):
            if entry.filemode == FileMode.TREE:
                pending.append(entry.id)
            elif entry.filemode != FileMode.COMMIT and entry.id not in seen:
                seen.add(entry.id)
                yield entry.id


def _ref_name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise RepositoryUnreadable(
            f"the name of a ref is not UTF-8: {raw!r}", hint="rename that branch or tag"
        ) from exc


def _unreadable(exc: Exception) -> RepositoryUnreadable:
    return RepositoryUnreadable(
        f"git repository cannot be read: {exc}",
        hint="run `git fsck` in it, mend what it names, or restore it from an earlier snapshot",
    )
