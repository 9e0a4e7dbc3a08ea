"""What a tip reaches, read as git stores it: no graft, replacement or filter of a repository has a say."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pygit2
from pygit2.enums import ObjectType

from daemon.capture.git_index import GITLINK, TREE, parse_tree

_TYPES = {
    b"commit": ObjectType.COMMIT,
    b"tree": ObjectType.TREE,
    b"blob": ObjectType.BLOB,
    b"tag": ObjectType.TAG,
}


class Walk:
    """Yields each object once, over all tips that it is asked for. Memory: one id an object.

    boundary: commits whose parents are not here (a shallow clone)
    lenient: note in `missing` what is not there, instead of raising (a partial clone)
    """

    def __init__(self, odb: pygit2.Odb, *, boundary: Collection[str] = (), lenient: bool = False) -> None:
        self.missing: set[pygit2.Oid] = set()
        self._odb = odb
        self._boundary = {pygit2.Oid(hex=oid) for oid in boundary}
        self._lenient = lenient
        self._seen: set[pygit2.Oid] = set()

    def reach(self, tip: str) -> Iterator[pygit2.Oid]:
        """Everything that `tip` reaches, itself included.

        Raises KeyError, pygit2.GitError, ValueError where an object is missing, corrupt, or of another type
        than it is called.
        """
        oid = pygit2.Oid(hex=tip)
        pending = [(ObjectType(self._odb.read_header(oid)[0]), oid)]
        while pending:
            kind, oid = pending.pop()
            if oid in self._seen or oid in self.missing:
                continue
            try:
                pending += self._children(kind, oid)
            except KeyError:
                if not self._lenient:
                    raise
                self.missing.add(oid)
                continue
            self._seen.add(oid)
            yield oid

    def reach_if_whole(self, tip: str) -> list[pygit2.Oid] | None:
        """As `reach`; None if something is missing or corrupt, and nothing counts as yielded then."""
        found = []
        try:
            for oid in self.reach(tip):
                found.append(oid)
        except (KeyError, ValueError, pygit2.GitError):
            self._seen.difference_update(found)
            return None
        return found

    def _children(self, kind: ObjectType, oid: pygit2.Oid) -> Iterator[tuple[ObjectType, pygit2.Oid]]:
        if kind == ObjectType.BLOB:
            if oid not in self._odb:
                raise KeyError(str(oid))
            return iter(())  # and never read here, however large
        found, data = self._odb.read(oid)
        if found != kind:
            raise ValueError(f"object {oid} is not the {kind.name.lower()} that it is called")
        if kind == ObjectType.TREE:
            return _in_tree(data)
        return _in_tag(data) if kind == ObjectType.TAG else self._in_commit(oid, data)

    def _in_commit(self, oid: pygit2.Oid, data: bytes) -> Iterator[tuple[ObjectType, pygit2.Oid]]:
        for line in data.partition(b"\n\n")[0].split(b"\n"):
            key, _, value = line.partition(b" ")
            if key == b"tree":
                yield ObjectType.TREE, pygit2.Oid(hex=value.decode())
            elif key != b"parent":
                return
            elif oid not in self._boundary:
                yield ObjectType.COMMIT, pygit2.Oid(hex=value.decode())


def _in_tree(data: bytes) -> Iterator[tuple[ObjectType, pygit2.Oid]]:
    for mode, _, oid in parse_tree(data):
        if mode != GITLINK:  # the commit of a submodule is in another repository
            yield ObjectType.TREE if mode == TREE else ObjectType.BLOB, pygit2.Oid(raw=oid)


def _in_tag(data: bytes) -> Iterator[tuple[ObjectType, pygit2.Oid]]:
    target, kind, *_ = (line.partition(b" ")[2] for line in data.split(b"\n", 2))
    if kind not in _TYPES:
        raise ValueError("a tag of something unknown")
    yield _TYPES[kind], pygit2.Oid(hex=target.decode())
