"""Putting an unpacked bundle together as a tree, and that tree into place with one rename.

Two layouts: for a look or another host, DIR with `memdir/`, `sqlite/`, `files/`, `state/`; for an agent
of the configuration, its root as it was. Work is done in a scratch directory beside the target, on the
same file system; a crash leaves the target untouched and the scratch to be thrown away by the next try.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from daemon import durable
from daemon.errors import AgentkeepError, LocalWriteError, MalformedBundle, RefusedError
from daemon.locate import Bundle
from daemon.model import (
    AgentSpec,
    ArtifactKind,
    Header,
    Manifest,
    Symlink,
    from_member_name,
    is_safe_member_name,
    mtime_ns_of,
    presentable,
    stays_inside,
)
from daemon.restore.git import rebuild_repository
from daemon.restore.unpack import Progress, member_path, unpack
from daemon.restore.values import give_values_back

_MAX_TARGET_BYTES = 4095  # PATH_MAX, without its NUL


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore brought back, and what of the bundle is not where an agent would look for it.

    unsound: databases that are as they were captured, and were damaged then
    not_put_back: what has no place of its own in the target: state values, raw bytes, parts of a repository
    """

    manifest: Manifest
    target: Path
    artifacts: int
    content_bytes: int
    not_put_back: tuple[str, ...] = ()
    unsound: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.manifest.complete and not self.not_put_back and not self.unsound


class Layout(Protocol):
    """Where the parts of a bundle go below the target. None: nowhere, and reported."""

    def place(self, room: str, path: str) -> str | None: ...
    def place_directory(self, room: str, path: str) -> str | None: ...
    def memdir(self) -> str | None: ...
    def root_mode(self) -> int | None: ...


class DirectoryLayout:
    """`--to DIR`: every room a directory, the work tree and its repository together in `memdir/`."""

    def __init__(self, manifest: Manifest) -> None:
        rooms: dict[str, set[str]] = {"sqlite": set(), "state": set(), "files": set()}
        for artifact in manifest.artifacts:
            room, _, inner = artifact.path_in_bundle.partition("/")
            rooms.setdefault(room, set()).add(_directory_of(inner))
        rooms["state"] = {_directory_of(home.path) for home in manifest.states.values()}
        self._elsewhere = (rooms["sqlite"] | rooms["state"]) - rooms["files"]

    def place(self, room: str, path: str) -> str | None:
        return f"{'memdir' if room == 'memory_files' else room}/{path}"

    def place_directory(self, room: str, path: str) -> str | None:
        """Nowhere, if what was in it is in another room: an empty twin in `files/` would only puzzle."""
        return None if room == "files" and path in self._elsewhere else self.place(room, path)

    def memdir(self) -> str | None:
        return "memdir"

    def root_mode(self) -> int | None:
        return None  # DIR is no directory of the agent's


class AgentLayout:
    """`--agent`: everything relative to the agent's root, as it was captured."""

    def __init__(self, manifest: Manifest) -> None:
        self._memdir = manifest.memdir
        self._root_mode = manifest.root_mode
        self._state_files = {
            name: from_member_name(home.path)
            for name, home in manifest.states.items()
            if home.kind == "file" and is_safe_member_name(home.path)
        }

    def place(self, room: str, path: str) -> str | None:
        if room == "memory_files":
            return path if self._memdir in (".", None) else f"{self._memdir}/{path}"
        if room == "state":
            return self._state_files.get(path.removesuffix(".json"))
        return path if room in ("sqlite", "files") else None

    def place_directory(self, room: str, path: str) -> str | None:
        return self.place(room, path)

    def memdir(self) -> str | None:
        return self._memdir

    def root_mode(self) -> int | None:
        return self._root_mode


def restore_to_directory(
    bundle: Bundle, target: Path, *, identities: Sequence[Any] = (), progress: Progress | None = None
) -> RestoreReport:
    """Bring a snapshot back into `target`, which must be empty or not be there.

    Raises IntegrityError's classes, RefusedError, LocalWriteError, and what a destination raises; the
    target is then as it was.
    """
    target = target.absolute()
    with _prepared(target) as scratch:
        manifest, unsound = unpack(bundle, scratch / "parts", identities=identities, progress=progress)
        not_put_back = _assemble(manifest, scratch / "parts", scratch / "tree", DirectoryLayout(manifest))
        _put_in_place(scratch / "tree", target)
    return _report(manifest, target, not_put_back, unsound)


def restore_agent(
    bundle: Bundle, spec: AgentSpec, *, identities: Sequence[Any] = (), progress: Progress | None = None
) -> RestoreReport:
    """Bring an agent back to where it lived; its root must be empty or not be there.

    State values that a command gave go back through its `restore_command`, if `spec` has one. Raises as
    `restore_to_directory`, and RefusedError for a bundle of another agent or tenant, before
    anything is unpacked.
    """

    def check_header(header: Header) -> None:
        if (header.tenant, header.agent_id) != (spec.tenant, spec.agent_id):
            raise RefusedError(
                f"the bundle is of agent {header.agent_id!r}, tenant {header.tenant!r}, and not of"
                f" {spec.agent_id!r}, tenant {spec.tenant!r}",
                hint="name a snapshot of this agent, or look at the other one's with --to DIR",
            )

    with _prepared(spec.root) as scratch:
        manifest, unsound = unpack(
            bundle, scratch / "parts", identities=identities, check_header=check_header, progress=progress
        )
        left = _assemble(manifest, scratch / "parts", scratch / "tree", AgentLayout(manifest))
        _give_to_owner_of(spec.root, scratch / "tree")
        _put_in_place(scratch / "tree", spec.root)
        left = give_values_back(manifest, scratch / "parts", spec, left)
    left = tuple(name for name in left if not _is_within(name, manifest))
    return _report(manifest, spec.root, left, unsound)


def _give_to_owner_of(target: Path, tree: Path) -> None:
    """As root, an agent's files go to whoever owns the place: root's would shut the agent out."""
    if os.geteuid() != 0:
        return
    owner = (target if target.is_dir() else target.parent).stat()
    with durable.translating_os_errors("give the files to their owner below", tree):
        for directory, _, names in os.walk(tree):
            for path in (directory, *(os.path.join(directory, name) for name in names)):  # noqa: PTH118
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _is_within(name: str, manifest: Manifest) -> bool:
    """Whether a state value came back as rows of a database that was itself put back."""
    home = manifest.states.get(name.removeprefix("state/").removesuffix(".json"))
    databases = {artifact.path_in_bundle for artifact in manifest.artifacts}
    return home is not None and home.kind == "rows" and f"sqlite/{home.path}" in databases


@contextmanager
def _prepared(target: Path) -> Iterator[Path]:
    """Scratch beside the target, for one restore at a time. Raises RefusedError, BusyError."""
    name, what = f"restore-{target.name}", f"a restore to {target}"
    try:
        _refuse_occupied(target)
    except RefusedError:
        if os.path.lexists(durable.scratch_path(target.parent, name)):  # killed when all was in place
            with suppress(AgentkeepError), durable.scratch_directory(target.parent, name, what=what):
                pass
        raise
    with (
        durable.made_directory(target.parent),
        durable.scratch_directory(target.parent, name, what=what) as scratch,
    ):
        (scratch / "parts").mkdir(mode=0o700)
        (scratch / "tree").mkdir(mode=0o700)
        yield scratch


def _refuse_occupied(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if os.path.ismount(target):
        raise RefusedError(
            f"{target} is a mount point, which cannot be put in place as one step",
            hint="restore to a new directory inside it",
        )
    if target.is_symlink() or not target.is_dir():
        raise RefusedError(f"{target} exists and is no directory", hint="choose another directory")
    if any(target.iterdir()):
        raise RefusedError(
            f"{target} is not empty, and nothing live is overwritten",
            hint="move it away first (mv), or restore to a new directory with --to DIR",
        )


def _assemble(manifest: Manifest, parts: Path, tree: Path, layout: Layout) -> tuple[str, ...]:
    """Move unpacked artifacts to their places in `tree`; the names of those that have none."""
    not_put_back = [
        artifact.path_in_bundle
        for artifact in manifest.artifacts
        if not _move(artifact.path_in_bundle, artifact.kind, parts, tree, layout)
    ]
    with durable.translating_os_errors("put together", tree):
        _make_directories(manifest, tree, layout)
        not_put_back += _rebuild_git(manifest, parts, tree, layout)
        not_put_back += _make_symlinks(manifest, tree, layout)
        _set_attributes(manifest, tree, layout)
    return tuple(not_put_back)


def _move(name: str, kind: ArtifactKind, parts: Path, tree: Path, layout: Layout) -> bool:
    """Whether the artifact has a place. The repository's parts are dealt with apart."""
    if kind in (ArtifactKind.GIT_BUNDLE, ArtifactKind.GIT_INDEX):
        return True
    source = member_path(name)
    place = _place_of(name, layout)
    if place is None or (kind != ArtifactKind.OPAQUE and _makes_git_run_things(place)):
        return False
    target = tree / place
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.path.lexists(target):
            raise FileExistsError
    except (FileExistsError, NotADirectoryError) as exc:
        raise MalformedBundle(f"two artifacts want one place: {place[:200]!r}") from exc
    (parts / source).rename(target)
    return True


def _make_directories(manifest: Manifest, tree: Path, layout: Layout) -> None:
    for directory in manifest.directories:
        place = _place_of_directory(directory.path, layout)
        if place is not None:
            try:
                (tree / place).mkdir(parents=True, exist_ok=True, mode=0o700)
            except (FileExistsError, NotADirectoryError) as exc:
                raise MalformedBundle(f"a file lies where a directory is to be: {place[:200]!r}") from exc


def _rebuild_git(manifest: Manifest, parts: Path, tree: Path, layout: Layout) -> tuple[str, ...]:
    """What of the repository did not come back."""
    place = layout.memdir()
    if place is not None and (manifest.git is not None or manifest.memdir is not None):
        (tree / place).mkdir(parents=True, exist_ok=True, mode=0o700)
    if manifest.git is None or place is None:
        return ()
    if os.path.lexists(tree / place / ".git"):  # under another spelling, where case makes no difference
        raise MalformedBundle("something lies where the repository is to be")
    kinds = {artifact.kind: parts / member_path(artifact.path_in_bundle) for artifact in manifest.artifacts}
    return rebuild_repository(
        tree / place,
        manifest.git,
        bundle=kinds.get(ArtifactKind.GIT_BUNDLE),
        index=kinds.get(ArtifactKind.GIT_INDEX),
    )


def _make_symlinks(manifest: Manifest, tree: Path, layout: Layout) -> list[str]:
    """Last, so that nothing is ever written through one. Only relative ones that stay inside are made; the
    others, to be told of."""
    left = []
    as_captured = AgentLayout(manifest)
    for symlink in manifest.symlinks:
        place, origin = _place_of(symlink.path, layout), _place_of(symlink.path, as_captured)
        target = _target_of(symlink)
        # What led out of the agent leads nowhere in a directory of rooms, or to something else.
        leads_out = any(path is None or not stays_inside(path, target) for path in (place, origin))
        if place is None or leads_out:
            left.append(_led_out(symlink, target))
            continue
        link = tree / place
        try:
            link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (FileExistsError, NotADirectoryError) as exc:
            raise MalformedBundle(f"a symlink lies below a file: {place[:200]!r}") from exc
        # Below another symlink it would lie elsewhere, where `..` leads elsewhere too.
        if os.path.lexists(link) or _real(link.parent) != _real(tree) / Path(place).parent:
            raise MalformedBundle(f"a symlink wants the place of something else: {place[:200]!r}")
        link.symlink_to(target)
        if not _real(link).is_relative_to(_real(tree)):  # by way of another link
            link.unlink()
            left.append(_led_out(symlink, target))
    return left


def _led_out(symlink: Symlink, target: str) -> str:
    return f"{symlink.path} (a symlink that leads out of the agent, to {presentable(target)})"


def _real(path: Path) -> Path:
    """As `resolve`, which does not take links that lead in circles."""
    return Path(os.path.realpath(path))


def _target_of(symlink: Symlink) -> str:
    try:
        target = base64.b64decode(symlink.target_b64, validate=True)
    except ValueError as exc:
        raise MalformedBundle(f"the target of the symlink {symlink.path[:200]!r} is damaged") from exc
    if b"\0" in target or len(target) > _MAX_TARGET_BYTES:
        raise MalformedBundle(f"the target of the symlink {symlink.path[:200]!r} is none")
    return os.fsdecode(target)


def _set_attributes(manifest: Manifest, tree: Path, layout: Layout) -> None:
    """Modes and mtimes as recorded; directories last, deepest first, since a mode may close them."""
    for artifact in manifest.artifacts:
        place = _place_of(artifact.path_in_bundle, layout)
        if place is None or artifact.kind in (ArtifactKind.GIT_BUNDLE, ArtifactKind.GIT_INDEX):
            continue
        path = tree / place
        if not path.exists():  # not put back
            continue
        # Never set-uid or set-gid: a memory has no need of it, an attacker has.
        path.chmod(artifact.mode & 0o777 if artifact.kind != ArtifactKind.OPAQUE else 0o600)
        if artifact.mtime is not None:
            mtime_ns = mtime_ns_of(artifact.mtime)
            os.utime(path, ns=(mtime_ns, mtime_ns))
    for directory in sorted(manifest.directories, key=lambda item: item.path.count("/"), reverse=True):
        place = _place_of_directory(directory.path, layout)
        if place is not None:
            _set_directory_mode(tree / place, directory.mode)
    memdir = layout.memdir()
    if memdir is not None and manifest.memdir_mode is not None and (tree / memdir).is_dir():
        _set_directory_mode(tree / memdir, manifest.memdir_mode)
    if (root_mode := layout.root_mode()) is not None:
        _set_directory_mode(tree, root_mode)


def _set_directory_mode(directory: Path, mode: int) -> None:
    """Open to its owner in any case: what cannot be entered can be neither used nor put in place."""
    directory.chmod(mode & 0o777 | stat.S_IRWXU)


def _place_of(member: str, layout: Layout) -> str | None:
    return _checked(layout.place(*str(member_path(member)).split("/", 1)), layout)


def _directory_of(path: str) -> str:
    return path.rpartition("/")[0]


def _place_of_directory(member: str, layout: Layout) -> str | None:
    return _checked(layout.place_directory(*str(member_path(member)).split("/", 1)), layout)


def _checked(place: str | None, layout: Layout) -> str | None:
    """The repository is made here; nothing of the bundle gets into it: no hook, no configuration."""
    memdir = layout.memdir()
    if place is not None and memdir is not None and Path(place).is_relative_to(Path(memdir, ".git")):
        raise MalformedBundle(f"a part of the repository that is no object or ref: {place[:200]!r}")
    return place


def _makes_git_run_things(place: str) -> bool:
    """Configuration and hooks of a repository within the agent's files: git would execute what they say."""
    parts = place.lower().split("/")
    if ".git" not in parts:
        return False
    inner = parts[parts.index(".git") + 1 :]
    return "hooks" in inner or inner[-1:] in (["config"], ["config.worktree"])


def _put_in_place(tree: Path, target: Path) -> None:
    with durable.translating_os_errors("put the restored tree at", target):
        if target.is_dir():
            tree.chmod(stat.S_IMODE(target.stat().st_mode))
        durable.sync_file_system(tree)
        try:
            durable.rename_into_place(tree, target)
        except OSError as exc:
            raise LocalWriteError(
                f"{target} was filled while the restore was under way: {exc.strerror}",
                hint="nothing of it was touched; restore to another directory",
            ) from exc


def _report(
    manifest: Manifest, target: Path, not_put_back: tuple[str, ...], unsound: tuple[str, ...]
) -> RestoreReport:
    return RestoreReport(
        manifest=manifest,
        target=target,
        artifacts=len(manifest.artifacts),
        content_bytes=sum(artifact.size_bytes for artifact in manifest.artifacts),
        not_put_back=not_put_back,
        unsound=unsound,
    )
