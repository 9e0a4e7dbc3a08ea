"""What cannot be captured is named, its bytes are kept, the rest is sealed and uploaded, and it is never
taken for the real thing."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import ForkServer, Host, quoted
from tests.e2e.privileges import UNPRIVILEGED, public_directory
from tests.harness.sample_agent.builder import run_git

EARLIER, NOW = "as it was\n", "as it is now\n"


@dataclass
class Agent:
    """One healthy database, one that something happens to, and a note that tells snapshots apart."""

    host: Host
    root: Path
    uid: int | None = None
    kept: dict[str, bytes] = field(default_factory=dict)

    @property
    def victim(self) -> Path:
        return self.root / "db/victim.sqlite"

    def belongs_to_its_user(self) -> None:
        if self.uid is not None:
            subprocess.run(["chown", "-R", f"{self.uid}:{self.uid}", self.host.home], check=True)

    def expect_kept(self, *paths: Path) -> None:
        """These are to be found in the bundle as the raw bytes that they are now."""
        self.kept = {f"opaque/{path.relative_to(self.root)}": path.read_bytes() for path in paths}

    def agentkeep(self, *arguments: str | Path, expecting: int = 0) -> Any:
        return self.host.document(*arguments, expecting=expecting, uid=self.uid)


@contextmanager
def agent_at(home: Path, server: ForkServer, *, uid: int | None = None) -> Iterator[Agent]:
    agent = Agent(Host(home, server), home / "ana", uid)
    (agent.root / "db").mkdir(parents=True)
    (agent.root / "note.md").write_text(EARLIER)
    (agent.root / "cursor.json").write_text('{"round": 1}\n')
    for name in ("healthy", "victim"):
        make_database(agent.root / f"db/{name}.sqlite")
    # Spelled out, so that nothing of the installation is read that an unprivileged user may not read.
    agent.host.configure(
        {
            "ana": f'root = {quoted(agent.root)}\nfiles = ["**"]\nschedule = "every 1h"\n'
            '[agents.ana.state]\ncursor = { file = "cursor.json" }\n'
            'rounds = { sqlite = "db/healthy.sqlite", query = "SELECT max(id) AS id FROM memories" }'
        }
    )
    agent.belongs_to_its_user()
    yield agent


@pytest.fixture
def agent(fork_server: ForkServer, tmp_path: Path) -> Iterator[Agent]:
    with agent_at(tmp_path, fork_server) as agent:
        yield agent


@pytest.fixture
def unprivileged_agent(fork_server: ForkServer) -> Iterator[Agent]:
    """Whose user has no right to what its file modes deny, whoever runs the tests."""
    with public_directory() as home, agent_at(home, fork_server, uid=UNPRIVILEGED) as agent:
        yield agent


def make_database(path: Path, *, journal_mode: str = "delete", rows: int = 400) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        connection.execute("CREATE TABLE memories (id INTEGER PRIMARY KEY, body TEXT)")
        connection.executemany("INSERT INTO memories (body) VALUES (?)", [("fact " * 40,)] * rows)
        connection.commit()


def assert_named_kept_sealed_and_never_latest(
    agent: Agent, *, source: str, reason: str, hint: str, failures: int = 1
) -> Any:
    """Everything that has to hold for an incomplete snapshot. The earlier one was taken by `before`."""
    record = agent.agentkeep("snapshot", expecting=3)
    assert record["complete"] is False
    assert record["uploads"] == {"offsite": "confirmed"}
    assert len(record["failures"]) == failures, record["failures"]
    failure = next(found for found in record["failures"] if source in found["source"])
    assert reason in failure["reason"]
    assert hint in failure["hint"]

    bundle = agent.host.offsite / record["key"]
    report = agent.agentkeep("verify", bundle)
    assert (report["sound"], report["fully_checked"], report["complete"]) == (True, True, False)

    back = agent.host.home / "incomplete"
    restored = agent.agentkeep("restore", bundle, "--to", back, expecting=3)
    assert restored["complete"] is False
    assert [found["source"] for found in restored["failures"]] == [f["source"] for f in record["failures"]]
    kept = {name for found in record["failures"] for name in found["kept_as"]}
    assert kept == agent.kept.keys()
    for name, content in agent.kept.items():
        assert (back / name).read_bytes() == content, name
    assert (back / "files/note.md").read_text() == NOW

    latest = agent.host.home / "latest"
    assert agent.agentkeep("restore", "latest", "--to", latest)["snapshot_id"] < record["snapshot_id"]
    assert (latest / "files/note.md").read_text() == EARLIER
    assert rows_of(latest / "sqlite/db/victim.sqlite") == 400
    return record


def rows_of(path: Path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM memories").fetchone()[0])


def take_earlier(agent: Agent) -> None:
    agent.belongs_to_its_user()
    assert agent.agentkeep("snapshot")["complete"] is True
    (agent.root / "note.md").write_text(NOW)


# --- databases that are broken ---------------------------------------------------------------------------


def corrupt_page(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(3 * 4096)
        stream.write(os.urandom(4096))


def corrupt_schema(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff" * 200)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_within_header(path: Path) -> None:
    os.truncate(path, 50)


def encrypt(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def empty_of_all_but_zeroes(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        (corrupt_page, "malformed"),
        (corrupt_schema, "malformed"),
        (cut_in_half, "malformed"),
        (cut_within_header, "malformed"),
        (encrypt, "not a SQLite database"),
        (empty_of_all_but_zeroes, "not a SQLite database"),
    ],
)
def test_a_broken_database_is_kept_as_raw_bytes_and_the_rest_is_sealed(
    agent: Agent, breakage: Callable[[Path], None], reason: str
) -> None:
    take_earlier(agent)
    breakage(agent.victim)
    agent.expect_kept(agent.victim)
    record = assert_named_kept_sealed_and_never_latest(
        agent, source=str(agent.victim), reason=reason, hint="restore"
    )
    assert rows_of(agent.host.home / "incomplete/sqlite/db/healthy.sqlite") == 400
    kinds = {a["path_in_bundle"]: a["kind"] for a in agent.host.manifest(record["snapshot_id"])["artifacts"]}
    assert kinds["opaque/db/victim.sqlite"] == "opaque"


def test_a_broken_database_of_an_odd_name_is_named_and_kept(agent: Agent) -> None:
    """Its name cannot be said as it is, neither in JSON nor on a terminal; it has to be said anyhow."""
    take_earlier(agent)
    odd = agent.root / os.fsdecode(b"latin1-\xe9\n[red]\\.sqlite")
    odd.write_bytes(b"no database")
    record = agent.agentkeep("snapshot", expecting=3)
    (failure,) = record["failures"]
    assert failure["kept_as"] == ["opaque/latin1-\\xe9\\x0a[red]\\x5c.sqlite"]
    assert "latin1-\\xe9" in failure["source"]
    for command in (["snapshot"], ["show", record["snapshot_id"]], ["list"]):
        said = agent.host.agentkeep(*command, expecting=3 if command == ["snapshot"] else 0)
        assert said.stdout
    back = agent.host.home / "back"
    said = agent.host.agentkeep("restore", record["snapshot_id"], "--to", back, expecting=3)
    assert "latin1-\\xe9" in said.stdout
    assert (back / "opaque" / odd.name).read_bytes() == b"no database"


def test_the_wal_of_a_broken_database_is_kept_with_it(agent: Agent) -> None:
    take_earlier(agent)
    agent.victim.unlink()
    leave_wal_behind(agent.victim)
    corrupt_schema(agent.victim)
    agent.expect_kept(agent.victim, Path(f"{agent.victim}-wal"))
    assert_named_kept_sealed_and_never_latest(
        agent, source=str(agent.victim), reason="malformed", hint="restore"
    )


def test_a_wal_whose_database_is_no_database_is_kept_with_it(agent: Agent) -> None:
    take_earlier(agent)
    agent.victim.unlink()
    leave_wal_behind(agent.victim)
    encrypt(agent.victim)
    agent.expect_kept(agent.victim, Path(f"{agent.victim}-wal"), Path(f"{agent.victim}-shm"))
    assert_named_kept_sealed_and_never_latest(
        agent, source=str(agent.victim), reason="not a SQLite database", hint="exclude", failures=3
    )


def leave_wal_behind(path: Path) -> None:
    """As a writer that was killed leaves it: rows in the WAL alone."""
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA journal_mode = WAL')\n"
        "db.execute('PRAGMA wal_autocheckpoint = 0')\n"
        "db.execute('CREATE TABLE memories (id INTEGER PRIMARY KEY, body TEXT)')\n"
        "db.execute('PRAGMA wal_checkpoint(TRUNCATE)')\n"
        "db.execute('INSERT INTO memories (body) VALUES (?)', ('in the WAL',))\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=False)


# --- databases that are in use, or somebody else's -------------------------------------------------------


def test_a_database_whose_writer_will_not_let_go_is_named(agent: Agent) -> None:
    take_earlier(agent)
    agent.expect_kept(agent.victim)
    with closing(sqlite3.connect(agent.victim, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert_named_kept_sealed_and_never_latest(
            agent, source=str(agent.victim), reason="locked", hint="journal_mode=WAL"
        )
        writer.execute("INSERT INTO memories (body) VALUES ('still its own')")
        writer.execute("COMMIT")


def test_a_hot_journal_is_rolled_back_in_the_copy_and_left_alone_in_the_agent(agent: Agent) -> None:
    committed = bodies_of(agent.victim)
    leave_hot_journal(agent.victim)
    journal = Path(f"{agent.victim}-journal")
    before = agent.victim.read_bytes(), journal.read_bytes()
    record = agent.host.document("snapshot", "ana")
    assert record["complete"]
    assert (agent.victim.read_bytes(), journal.read_bytes()) == before
    back = agent.host.home / "back"
    agent.host.agentkeep("restore", record["snapshot_id"], "--to", back)
    (restored,) = back.rglob(agent.victim.name)
    assert bodies_of(restored) == committed
    assert not restored.with_name(f"{restored.name}-journal").exists()


def bodies_of(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [row[0] for row in connection.execute("SELECT body FROM memories ORDER BY rowid")]


def leave_hot_journal(path: Path) -> None:
    """As a writer leaves it that was killed after it wrote to the database and before it committed."""
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA cache_size = 1')\n"
        "db.execute('BEGIN')\n"
        "db.execute('UPDATE memories SET body = body || ?', ('changed',))\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=False)
    assert Path(f"{path}-journal").stat().st_size > 512


def test_a_database_of_another_owner_is_never_opened(agent: Agent) -> None:
    """Who may only read it would leave a WAL beside it that its owner cannot write."""
    take_earlier(agent)
    with closing(sqlite3.connect(agent.victim)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    agent.expect_kept(agent.victim)
    if UNPRIVILEGED is not None:
        os.chown(agent.victim, UNPRIVILEGED, -1)
        assert_named_kept_sealed_and_never_latest(
            agent, source=str(agent.victim), reason="belongs to user id", hint="as the agent's user"
        )
    else:  # nobody but root can give a file away
        command = [sys.executable, "-c", WHOSE_VICTIM_IS_FOREIGN, "--config", str(agent.host.config)]
        done = subprocess.run(
            [*command, "snapshot"], cwd=agent.host.home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert "belongs to user id" in done.stdout
    assert [path.name for path in agent.root.rglob("victim.sqlite*")] == ["victim.sqlite"]


# agentkeep, told by the operating system that one file is somebody else's.
WHOSE_VICTIM_IS_FOREIGN = """
import os

really = os.stat

class Foreign:
    def __init__(self, status):
        self.status = status
    def __getattr__(self, name):
        return getattr(self.status, name) + (name == "st_uid")

def stat(path, *arguments, **options):
    status = really(path, *arguments, **options)
    return Foreign(status) if str(path).endswith("/victim.sqlite") else status

os.stat = stat
from daemon.cli import main
main()
"""


# --- no permission: as a user whom file modes bind -------------------------------------------------------


def test_a_database_that_may_not_be_read_is_named(unprivileged_agent: Agent) -> None:
    agent = unprivileged_agent
    take_earlier(agent)
    agent.victim.chmod(0)
    assert_named_kept_sealed_and_never_latest(
        agent, source=str(agent.victim), reason="Permission denied", hint="as the user who owns"
    )


def test_a_file_that_may_not_be_read_is_named(unprivileged_agent: Agent) -> None:
    agent = unprivileged_agent
    (agent.root / "diary.md").write_text("private\n")
    take_earlier(agent)
    (agent.root / "diary.md").chmod(0)
    assert_named_kept_sealed_and_never_latest(
        agent, source=str(agent.root / "diary.md"), reason="Permission denied", hint="exclude"
    )


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_a_directory_that_may_not_be_looked_into_is_named(unprivileged_agent: Agent, mode: int) -> None:
    agent = unprivileged_agent
    (agent.root / "closed").mkdir()
    (agent.root / "closed/diary.md").write_text("private\n")
    take_earlier(agent)
    (agent.root / "closed").chmod(mode)
    try:
        assert_named_kept_sealed_and_never_latest(
            agent, source=str(agent.root / "closed"), reason="Permission denied", hint="user who owns"
        )
    finally:
        (agent.root / "closed").chmod(0o700)


def test_a_wal_database_in_a_directory_that_may_not_be_written_is_named(unprivileged_agent: Agent) -> None:
    """SQLite cannot make its index there. Reading past the WAL would be quiet, and wrong."""
    agent = unprivileged_agent
    take_earlier(agent)
    with closing(sqlite3.connect(agent.victim)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    agent.expect_kept(agent.victim)
    agent.victim.parent.chmod(0o500)
    try:
        assert_named_kept_sealed_and_never_latest(
            agent, source=str(agent.victim), reason="readonly", hint="write permission on its directory"
        )
    finally:
        agent.victim.parent.chmod(0o700)


def test_an_agent_whose_root_may_not_be_entered_is_an_error(unprivileged_agent: Agent) -> None:
    agent = unprivileged_agent
    agent.host.home.joinpath("closed").mkdir()
    inner = agent.host.home / "closed/ana"
    agent.root.rename(inner)
    agent.host.config.write_text(agent.host.config.read_text().replace(str(agent.root), str(inner)))
    inner.parent.chmod(0)
    try:
        answer = agent.agentkeep("snapshot", expecting=78)
        assert str(inner) in answer["error"]["message"]
    finally:
        inner.parent.chmod(0o700)
    assert agent.host.snapshots() == []


# --- state values, repositories, what is named and not there ----------------------------------------------


def test_a_state_file_that_is_no_json_is_kept_as_it_is(agent: Agent) -> None:
    take_earlier(agent)
    (agent.root / "cursor.json").write_text('{"round": 1')
    agent.expect_kept(agent.root / "cursor.json")
    assert_named_kept_sealed_and_never_latest(
        agent, source="state cursor", reason="not valid JSON", hint="mend the value"
    )
    assert not (agent.host.home / "incomplete/state/cursor.json").exists()


def test_a_state_file_that_is_gone_is_named(agent: Agent) -> None:
    take_earlier(agent)
    (agent.root / "cursor.json").unlink()
    assert_named_kept_sealed_and_never_latest(
        agent, source="state cursor", reason="is not there", hint="mend the value"
    )


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT salience FROM memories", "no such column"),
        ("DELETE FROM memories", "readonly"),
        ("SELECT * FROM memories JOIN memories AS again", "more than"),
        ("PRAGMA user_version = 7", "readonly"),
    ],
)
def test_a_state_query_that_fails_is_named(agent: Agent, query: str, reason: str) -> None:
    take_earlier(agent)
    text = agent.host.config.read_text()
    agent.host.config.write_text(text.replace("SELECT max(id) AS id FROM memories", query))
    assert_named_kept_sealed_and_never_latest(
        agent, source="state rounds", reason=reason, hint="in the configuration"
    )
    assert rows_of(agent.root / "db/healthy.sqlite") == 400


def test_a_state_value_of_a_broken_database_is_named_beside_it(agent: Agent) -> None:
    take_earlier(agent)
    encrypt(agent.root / "db/healthy.sqlite")
    agent.expect_kept(agent.root / "db/healthy.sqlite")
    record = agent.agentkeep("snapshot", expecting=3)
    sources = " ".join(failure["source"] for failure in record["failures"])
    assert "state rounds" in sources
    assert str(agent.root / "db/healthy.sqlite") in sources
    assert all(failure["hint"] for failure in record["failures"])


def test_a_corrupt_repository_is_kept_as_raw_bytes(agent: Agent) -> None:
    memdir = agent.root / "memory"
    memdir.mkdir()
    run_git(memdir, "init", "--quiet", "--initial-branch=main")
    (memdir / "note.md").write_text("remembered\n")
    run_git(memdir, "add", ".")
    run_git(memdir, "commit", "--quiet", "--message=first")
    text = agent.host.config.read_text().replace("schedule =", 'memdir = "memory"\nschedule =')
    agent.host.config.write_text(text)
    take_earlier(agent)
    blob = run_git(memdir, "rev-parse", "HEAD:note.md").strip()
    found = memdir / ".git/objects" / blob[:2] / blob[2:]
    found.unlink()
    record = agent.agentkeep("snapshot", expecting=3)
    (failure,) = record["failures"]
    assert failure["source"] == str(memdir)
    assert "git fsck" in failure["hint"]
    assert "opaque/memory/.git/HEAD" in failure["kept_as"]
    back = agent.host.home / "incomplete"
    agent.agentkeep("restore", record["snapshot_id"], "--to", back, expecting=3)
    for path in (memdir / ".git").rglob("*"):
        if path.is_file():
            assert (back / "opaque" / path.relative_to(agent.root)).read_bytes() == path.read_bytes()
    assert (back / "memdir/note.md").read_text() == "remembered\n"


def test_a_pattern_that_matches_no_database_any_more_is_named(agent: Agent) -> None:
    text = agent.host.config.read_text().replace("schedule =", 'sqlite = ["db/v*.sqlite"]\nschedule =')
    agent.host.config.write_text(text)
    take_earlier(agent)
    agent.victim.unlink()
    assert_named_kept_sealed_and_never_latest(
        agent, source="v*.sqlite", reason="nothing is there", hint="bring the file back"
    )


def test_what_is_named_and_gone_is_told_and_the_rest_is_sealed(agent: Agent) -> None:
    text = agent.host.config.read_text().replace("schedule =", 'sqlite = ["db/victim.sqlite"]\nschedule =')
    agent.host.config.write_text(text)
    take_earlier(agent)
    agent.victim.unlink()
    record = agent.agentkeep("snapshot", expecting=3)
    (failure,) = record["failures"]
    assert failure["source"] == str(agent.victim)
    assert failure["hint"]
    assert record["uploads"] == {"offsite": "confirmed"}
    finding = agent.agentkeep("check", expecting=78)["findings"][0]
    assert f"no such path: {agent.victim}" in finding["message"]
    assert "line" in finding["message"]


# --- agents that are not there ---------------------------------------------------------------------------


def test_a_missing_agent_is_an_error_and_no_empty_bundle(agent: Agent) -> None:
    agent.root.rename(agent.host.home / "lost")
    answer = agent.agentkeep("snapshot", expecting=78)
    assert str(agent.root) in answer["error"]["message"]
    assert "restore" in answer["error"]["hint"]
    assert agent.host.snapshots() == []
    assert agent.host.bundles_at(agent.host.home) == []


def test_an_unknown_agent_is_answered_with_the_known_ones(agent: Agent) -> None:
    for command in (["snapshot", "anna"], ["list", "anna"], ["restore", "latest", "--agent", "anna"]):
        answer = agent.agentkeep(*command, expecting=66)
        assert "did you mean 'ana'" in answer["error"]["message"]
        assert "known agents: ana" in answer["error"]["hint"]


def test_an_agent_with_incomplete_snapshots_alone_has_no_latest(agent: Agent) -> None:
    encrypt(agent.victim)
    record = agent.agentkeep("snapshot", expecting=3)
    target = agent.host.home / "back"
    for command in (
        ["restore", "latest", "--to", target],
        ["verify", "latest"],
        ["export", "latest", "--to", target],
    ):
        answer = agent.agentkeep(*command, expecting=66)
        assert "no complete snapshot" in answer["error"]["message"]
    assert not target.exists()
    assert agent.agentkeep("restore", record["snapshot_id"], "--to", target, expecting=3)["complete"] is False
    listed = json.dumps(agent.agentkeep("list"))
    assert record["snapshot_id"] in listed
