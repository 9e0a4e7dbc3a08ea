"""Judges a restored memory directory: history, branch, tag, work tree, and what was not committed.

Reads through libgit2, which checks the digest of each object that it reads; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pygit2
from pygit2.enums import ObjectType

from tests.harness.sample_agent import builder, content, layout
from tests.harness.sample_agent.journal import Journal
from tests.harness.sample_agent.verdicts import ChangedContent, MissingContent

_ROUND_MESSAGE = "round "


@dataclass(frozen=True)
class MemdirVerdict:
    worktree_round: int
    commit_round: int
    object_count: int


def check(memdir: Path, journal: Journal) -> MemdirVerdict:
    """Raises ProofError."""
    try:
        repository = pygit2.Repository(str(memdir))
        head = repository.head.peel(pygit2.Commit)
        object_count = _read_every_object(repository)
    except (pygit2.GitError, KeyError) as exc:
        raise ChangedContent(f"memdir: git cannot read it: {exc}") from exc
    try:
        _check_refs(repository, journal)
        commit_round = _check_head(head, journal)
        worktree_round = _check_round_note(memdir, journal)
        _check_uncommitted(memdir, journal)
        _check_work_tree(memdir, head)
    finally:
        repository.free()
    return MemdirVerdict(worktree_round, commit_round, object_count)


def _read_every_object(repository: pygit2.Repository) -> int:
    """Reading is checking: libgit2 hashes what it reads and refuses what differs."""
    seen: set[pygit2.Oid] = set()
    pending = [repository.references[name].target for name in repository.references if name != "HEAD"]
    while pending:
        oid = pending.pop()
        if not isinstance(oid, pygit2.Oid) or oid in seen:
            continue
        seen.add(oid)
        pending.extend(_points_to(repository[oid]))
    return len(seen)


def _points_to(found: pygit2.Object) -> list[pygit2.Oid]:
    match found.type:
        case ObjectType.COMMIT:
            commit = found.peel(pygit2.Commit)
            return [commit.tree_id, *commit.parent_ids]
        case ObjectType.TREE:
            return [entry.id for entry in found.peel(pygit2.Tree)]
        case ObjectType.TAG:
            return [found.peel(pygit2.Commit).id]
    return []


def _check_refs(repository: pygit2.Repository, journal: Journal) -> None:
    if repository.lookup_reference("HEAD").target != "refs/heads/main":
        raise ChangedContent("memdir: HEAD is not on main")
    for name, written in journal.refs.items():
        if name not in repository.references:
            raise MissingContent(f"memdir: {name} is not there")
        found = str(repository.references[name].target)
        if found != written:
            raise ChangedContent(f"memdir: {name} is at {found}, was at {written}")


def _check_head(head: pygit2.Commit, journal: Journal) -> int:
    """A commit's id is a digest over all that came before it, so the journal's id settles everything."""
    if not head.message.startswith(_ROUND_MESSAGE):
        raise ChangedContent(f"memdir: the last commit is {head.message.strip()!r}")
    round_number = int(head.message.removeprefix(_ROUND_MESSAGE))
    if round_number > 0 and journal.digests("commit").get(round_number) != (str(head.id),):
        raise ChangedContent(f"memdir: the commit of round {round_number} was never {head.id}")
    return round_number


def _check_round_note(memdir: Path, journal: Journal) -> int:
    note = _read(memdir / layout.ROUND_NOTE)
    round_number = content.round_of_note(note)
    if note != content.round_note(journal.seed, round_number):
        raise ChangedContent(f"memdir: {layout.ROUND_NOTE} of round {round_number} was not written like this")
    if round_number > 0 and journal.digests("worktree").get(round_number) != (content.digest(note),):
        raise ChangedContent(f"memdir: {layout.ROUND_NOTE} was never at round {round_number}")
    return round_number


def _check_uncommitted(memdir: Path, journal: Journal) -> None:
    expected = {
        layout.MODIFIED_NOTE: builder.memory_note(journal.seed, modified=True),
        layout.UNTRACKED_NOTE: content.note(journal.seed, layout.UNTRACKED_NOTE, words=90),
    }
    for name, written in expected.items():
        if _read(memdir / name) != written:
            raise ChangedContent(f"memdir: uncommitted work in {name} is not as it was")


def _check_work_tree(memdir: Path, head: pygit2.Commit) -> None:
    """Every other file is as committed."""
    for name, blob in _files_of(head.tree):
        if name in (layout.MODIFIED_NOTE, layout.ROUND_NOTE):
            continue
        if pygit2.hash(_read(memdir / name)) != blob:
            raise ChangedContent(f"memdir: {name} differs from what was committed")


def _files_of(tree: pygit2.Tree, prefix: str = "") -> list[tuple[str, pygit2.Oid]]:
    files: list[tuple[str, pygit2.Oid]] = []
    for entry in tree:
        if isinstance(entry, pygit2.Tree):
            files.extend(_files_of(entry, f"{prefix}{entry.name}/"))
        else:
            files.append((f"{prefix}{entry.name}", entry.id))
    return files


def _read(path: Path) -> bytes:
    if not path.exists():
        raise MissingContent(f"{path}: not there")
    return path.read_bytes()
