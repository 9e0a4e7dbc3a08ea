"""What exists on this host and where it has been uploaded to: one SQLite database under `state_dir`.

A snapshot is announced before its bundle gets its final name and confirmed after, so that whatever moment
the process dies, `settle` finds either a bundle with all its facts or nothing. The catalog is a cache
of what bundles and buckets say; losing it loses no snapshot.

Connections are short-lived and WAL is on: any number of processes and threads may use it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import time

from daemon.durable import file_lock, make_private_directory, translating_os_errors
from daemon.errors import LocalWriteError, SnapshotNotFound, UsageError
from daemon.model import (
    BundleKey,
    Consistency,
    Failure,
    SnapshotRecord,
    Upload,
    UploadState,
)

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE snapshots (
    snapshot_id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    encrypted INTEGER NOT NULL,
    created_at_ms INTEGER NOT NULL,
    label TEXT,
    complete INTEGER NOT NULL,
    consistency TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    content_bytes INTEGER NOT NULL,
    failures TEXT NOT NULL,
    sealed INTEGER NOT NULL DEFAULT 0,
    fingerprint TEXT,
    unchanged_at_ms INTEGER
) WITHOUT ROWID;
CREATE INDEX snapshots_by_agent ON snapshots (tenant, agent_id, created_at_ms);
CREATE TABLE uploads (
    snapshot_id TEXT NOT NULL REFERENCES snapshots ON DELETE CASCADE,
    destination TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending',
    attempts INTEGER NOT NULL DEFAULT 0,
    last_error TEXT,
    updated_at_ms INTEGER NOT NULL DEFAULT 0,
    resume_token TEXT,
    PRIMARY KEY (snapshot_id, destination)
) WITHOUT ROWID;
CREATE INDEX uploads_waiting ON uploads (destination, snapshot_id) WHERE state <> 'confirmed';
"""

_UPGRADES = {
    1: """
ALTER TABLE snapshots ADD COLUMN fingerprint TEXT;
ALTER TABLE snapshots ADD COLUMN unchanged_at_ms INTEGER;
"""
}
"""How a catalog of each older version becomes one of the next."""


class Catalog:
    def __init__(self, path: Path) -> None:
        """Open or make the catalog. Raises LocalWriteError, BusyError."""
        self._path = path
        make_private_directory(path.parent)
        with translating_os_errors("open the catalog", path):
            path.touch(mode=0o600)
        # Two connections that switch to WAL at once are not made to wait for each other: one fails.
        with file_lock(path.with_name(path.name + ".lock"), what="the catalog", timeout_seconds=30):
            self._prepare()

    def _prepare(self) -> None:
        with self._connected() as db:
            db.execute("PRAGMA journal_mode = WAL")
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise LocalWriteError(
                    f"the catalog {self._path} was written by a newer agentkeep", hint="use that version"
                )
            scripts = [_UPGRADES[old] for old in range(version, _SCHEMA_VERSION)] if version else [_SCHEMA]
            for statement in ";".join(scripts).split(";"):
                db.execute(statement)
            if version < _SCHEMA_VERSION:
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def announce(self, record: SnapshotRecord, destinations: Iterable[str]) -> None:
        """Note a snapshot whose bundle is about to get its final name."""
        key = record.key
        with self._transaction() as db:
            db.execute(
                "INSERT INTO snapshots (snapshot_id, tenant, agent_id, encrypted, created_at_ms, label,"
                " complete, consistency, size_bytes, sha256, content_bytes, failures, fingerprint)"
                " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    key.snapshot_id,
                    key.tenant,
                    key.agent_id,
                    key.encrypted,
                    record.created_at_ms,
                    record.label,
                    record.complete,
                    record.consistency.model_dump_json(),
                    record.size_bytes,
                    record.sha256,
                    record.content_bytes,
                    json.dumps([failure.model_dump() for failure in record.failures]),
                    record.fingerprint,
                ),
            )
            db.executemany(
                "INSERT INTO uploads (snapshot_id, destination) VALUES (?,?)",
                [(key.snapshot_id, destination) for destination in destinations],
            )

    def confirm_sealed(self, snapshot_id: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE snapshots SET sealed = 1 WHERE snapshot_id = ?", (snapshot_id,))

    def settle(self, tenant: str, agent_id: str, *, is_in_place: Callable[[SnapshotRecord], bool]) -> None:
        """Finish or forget what an interrupted process announced. To be called under the agent's lock."""
        for record in self._select("tenant = ? AND agent_id = ? AND sealed = 0", (tenant, agent_id)):
            if is_in_place(record):
                self.confirm_sealed(record.snapshot_id)
                continue
            with self._transaction() as db:
                db.execute("DELETE FROM snapshots WHERE snapshot_id = ?", (record.snapshot_id,))

    def snapshots(self, *, tenant: str | None = None, agent_id: str | None = None) -> list[SnapshotRecord]:
        """Sealed snapshots, oldest first."""
        where, values = "sealed = 1", []
        for column, value in (("tenant", tenant), ("agent_id", agent_id)):
            if value is not None:
                where += f" AND {column} = ?"
                values.append(value)
        return self._select(where, tuple(values))

    def find(self, prefix: str) -> SnapshotRecord:
        """The snapshot whose id is `prefix` or, uniquely, begins with it.

        Raises SnapshotNotFound, UsageError (ambiguous).
        """
        if not prefix:
            raise UsageError("an empty name names no snapshot", hint="give an id, or the beginning of one")
        found = self._select("sealed = 1 AND substr(snapshot_id, 1, ?) = ?", (len(prefix), prefix))
        if not found:
            raise SnapshotNotFound(
                f"no snapshot of this host has the id {prefix!r}",
                hint="`agentkeep list` shows them; one made elsewhere is named by its bucket key or URL",
            )
        if len(found) > 1:
            ids = ", ".join(record.snapshot_id for record in found[:3])
            raise UsageError(f"{prefix!r} is ambiguous: {ids}…", hint="give more of the id")
        return found[0]

    def latest(self, tenant: str, agent_id: str, *, not_after_ms: int | None = None) -> SnapshotRecord | None:
        """The newest complete snapshot of an agent. Incomplete ones are never latest."""
        until = not_after_ms if not_after_ms is not None else 1 << 62
        found = self._select(
            "sealed = 1 AND complete = 1 AND tenant = ? AND agent_id = ? AND created_at_ms <= ?",
            (tenant, agent_id, until),
            order="created_at_ms DESC, snapshot_id DESC LIMIT 1",
        )
        return found[0] if found else None

    def note_unchanged(self, snapshot_id: str, *, at_ms: int) -> None:
        """The agent was still as in this snapshot at that time."""
        with self._transaction() as db:
            db.execute("UPDATE snapshots SET unchanged_at_ms = ? WHERE snapshot_id = ?", (at_ms, snapshot_id))

    def last_attempt_ms(self, tenant: str, agent_id: str) -> int | None:
        """When the newest snapshot of an agent was made, complete or not, or found to need no other."""
        with self._transaction(writing=False) as db:
            (newest,) = db.execute(
                "SELECT max(max(created_at_ms, coalesce(unchanged_at_ms, 0))) FROM snapshots"
                " WHERE tenant = ? AND agent_id = ? AND sealed = 1",
                (tenant, agent_id),
            ).fetchone()
        return newest if newest is None else int(newest)

    def waiting(self, destination: str) -> list[SnapshotRecord]:
        """The outbox of a destination: sealed and not confirmed there, oldest first."""
        return self._select(
            "sealed = 1 AND snapshot_id IN"
            " (SELECT snapshot_id FROM uploads WHERE destination = ? AND state <> 'confirmed')",
            (destination,),
        )

    def note_upload(
        self, snapshot_id: str, destination: str, state: UploadState, *, error: str | None = None
    ) -> None:
        """Record the end of one try."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO uploads (snapshot_id, destination, state, attempts, last_error, updated_at_ms)"
                " VALUES (?1, ?2, ?3, 1, ?4, ?5) ON CONFLICT DO UPDATE SET state = ?3,"
                " attempts = attempts + 1, last_error = ?4, updated_at_ms = ?5,"
                " resume_token = iif(?3 = 'confirmed', NULL, resume_token)",
                (snapshot_id, destination, state.value, error, int(time() * 1000)),
            )

    def keep_resume_token(self, snapshot_id: str, destination: str, token: str) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE uploads SET resume_token = ? WHERE snapshot_id = ? AND destination = ?",
                (token, snapshot_id, destination),
            )

    def _select(
        self, where: str, values: tuple[object, ...], *, order: str = "snapshot_id"
    ) -> list[SnapshotRecord]:
        # `where` and `order` are constants of this module; values are bound.
        chosen = f"FROM snapshots WHERE {where} ORDER BY {order}"
        with self._transaction(writing=False) as db:
            rows = db.execute(f"SELECT * {chosen}", values).fetchall()
            uploads = _uploads(db, f"(SELECT snapshot_id {chosen})", values)
        return [_record(row, uploads.get(row["snapshot_id"], {})) for row in rows]

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                yield db
        except sqlite3.Error as exc:
            raise self._unusable(exc) from exc

    @contextmanager
    def _transaction(self, *, writing: bool = True) -> Iterator[sqlite3.Connection]:
        with self._connected() as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
            yield db
            db.execute("COMMIT")

    def _unusable(self, exc: sqlite3.Error) -> LocalWriteError:
        return LocalWriteError(
            f"the catalog {self._path} cannot be used: {exc}",
            hint="check free space and permissions; if it is damaged, move it away: bundles are not touched",
        )


def _uploads(
    db: sqlite3.Connection, chosen_ids: str, values: tuple[object, ...]
) -> dict[str, dict[str, Upload]]:
    """The uploads of some snapshots, by snapshot and destination."""
    query = f"SELECT * FROM uploads WHERE snapshot_id IN {chosen_ids} ORDER BY destination"  # noqa: S608
    uploads: dict[str, dict[str, Upload]] = {}
    for row in db.execute(query, values):
        uploads.setdefault(row["snapshot_id"], {})[row["destination"]] = Upload(
            state=UploadState(row["state"]),
            attempts=row["attempts"],
            last_error=row["last_error"],
            updated_at_ms=row["updated_at_ms"],
            resume_token=row["resume_token"],
        )
    return uploads


def _record(row: sqlite3.Row, uploads: dict[str, Upload]) -> SnapshotRecord:
    return SnapshotRecord(
        key=BundleKey(row["tenant"], row["agent_id"], row["snapshot_id"], bool(row["encrypted"])),
        created_at_ms=row["created_at_ms"],
        label=row["label"],
        complete=bool(row["complete"]),
        consistency=Consistency.model_validate_json(row["consistency"]),
        size_bytes=row["size_bytes"],
        sha256=row["sha256"],
        content_bytes=row["content_bytes"],
        failures=tuple(Failure.model_validate(item) for item in json.loads(row["failures"])),
        uploads=uploads,
        fingerprint=row["fingerprint"],
        unchanged_at_ms=row["unchanged_at_ms"],
    )
