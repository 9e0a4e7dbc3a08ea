"""The main job on the real thing: a busy agent, a real S3 server, an empty host and a bucket key."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import REPOSITORY, Done, ForkServer, Host, clean_environment, leftovers, quoted
from tests.harness.sample_agent import DATABASES, DREAM_RUN_QUERY, RestoredPaths, prove, running_writer
from tests.harness.sample_agent.builder import run_git
from tests.harness.sample_agent.process import RunningWriter
from tests.harness.seaweedfs import SeaweedFS

PAUSE_MS = 25.0
STATES = f"""
[agents.ana.state]
extract_cursor = {{ file = "state/cursor.json" }}
dream_run = {{ sqlite = "db/registry.sqlite", query = {quoted(DREAM_RUN_QUERY)} }}
"""


@pytest.fixture
def writer(sample: Path, host: Host) -> Iterator[RunningWriter]:
    with running_writer(sample, journal=host.home / "journal.jsonl", pause_ms=PAUSE_MS) as running:
        running.wait_for_round(3)
        yield running


@pytest.fixture
def empty_host(fork_server: ForkServer, tmp_path: Path, seaweedfs: SeaweedFS) -> Host:
    """Another machine: no configuration, no catalog, only credentials in its environment."""
    home = tmp_path / "another"
    home.mkdir()
    other = Host(home, fork_server)
    other.environment |= seaweedfs.environment()
    return other


def protect_in_bucket(host: Host, root: Path, server: SeaweedFS, *, top: str = "") -> str:
    """Configure `ana` with a prefix of its own in the bucket; the destination's URL."""
    host.environment |= server.environment()
    url = f"s3://{server.bucket}/{host.home.parent.name}"
    host.configure(
        {"ana": f'root = {quoted(root)}\nmemdir = "memory"\n{STATES}'},
        destinations={"offsite": f"url = {quoted(url)}"},
        top=top,
    )
    return url


def snapshot_of_one_instant(host: Host) -> Any:
    """A busy writer may move on at every attempt, and the snapshot says so; another one then."""
    for _ in range(6):
        record = host.document("snapshot")
        assert record["complete"] is True
        assert record["uploads"] == {"offsite": "confirmed"}
        if record["consistency"]["level"] == "point_in_time":
            return record
    raise AssertionError(f"no instant in six snapshots: {record}")


def exec_agentkeep(
    *arguments: str | Path, home: Path, environment: dict[str, str], stdin: bytes = b""
) -> Done:
    """The command as a user starts it, from nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", *map(str, arguments)],
        cwd=home,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        input=stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_busy_agent_comes_back_as_one_instant_by_bucket_key_without_any_configuration(
    writer: RunningWriter, sample: Path, host: Host, seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    url = protect_in_bucket(host, sample, seaweedfs)
    record = snapshot_of_one_instant(host)
    writer.wait_for_round(writer_round(writer) + 2)  # it went on writing all the time
    writer.stop()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = clean_environment(elsewhere) | seaweedfs.environment()
    del environment["AWS_ENDPOINT_URL_S3"]
    restored = elsewhere / "back"
    command: list[str | Path] = ["--json", "restore", f"{url}/{record['key']}", "--to", restored]
    command += ["--endpoint-url", seaweedfs.endpoint_url]
    done = exec_agentkeep(*command, home=elsewhere, environment=environment)
    assert done.exit_code == 0, done.stderr
    assert done.document["snapshot_id"] == record["snapshot_id"]
    assert done.document["complete"] is True

    proof = prove(RestoredPaths.restored(restored), writer.journal)
    assert proof.instant.round_number >= 3
    assert_sound(restored)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["back"]


def test_an_encrypted_bundle_comes_back_with_an_identity_from_a_file_or_from_stdin(
    writer: RunningWriter, sample: Path, host: Host, empty_host: Host, seaweedfs: SeaweedFS
) -> None:
    identity = empty_host.home / "identity.txt"
    recipient = empty_host.agentkeep("keygen", "--out", identity, configured=False).stdout.strip()
    url = protect_in_bucket(host, sample, seaweedfs)
    with host.config.open("a") as config:
        config.write(f"[encryption]\nrecipients = [{quoted(recipient)}]\n")
    record = snapshot_of_one_instant(host)
    writer.stop()
    assert record["encrypted"] is True
    snap = f"{url}/{record['key']}"
    assert snap.endswith(".tar.zst.age")

    def restore(name: str, *options: str | Path, **more: Any) -> None:
        target = empty_host.home / name
        empty_host.agentkeep("restore", snap, "--to", target, *options, configured=False, **more)
        if more.get("expecting", 0) == 0:
            prove(RestoredPaths.restored(target), writer.journal)
            assert_sound(target)

    restore("from-file", "--identity", identity)
    restore("from-stdin", "--identity", "-", stdin=identity.read_bytes())
    other = empty_host.home / "other.txt"
    empty_host.agentkeep("keygen", "--out", other, configured=False)
    restore("refused", "--identity", other, expecting=65)
    restore("refused", expecting=77)
    restore("refused", "--identity", "-", stdin=b"not an identity\n", expecting=64)
    assert not (empty_host.home / "refused").exists()
    assert leftovers(empty_host.home) == []


def test_export_and_verify_work_from_the_bucket_without_any_configuration(
    sample: Path, host: Host, empty_host: Host, seaweedfs: SeaweedFS
) -> None:
    url = protect_in_bucket(host, sample, seaweedfs)
    record = host.document("snapshot")
    snap = f"{url}/{record['key']}"

    report = empty_host.document("verify", snap, configured=False)
    assert report["sound"] is True
    assert report["fully_checked"] is True
    assert report["complete"] is True
    assert report["sha256"] == record["sha256"]

    exported = Path(
        empty_host.document("export", snap, "--to", empty_host.home / "a/b/copy.tar.zst", configured=False)[
            "path"
        ]
    )
    checked = subprocess.run(["sha256sum", "-c", "copy.tar.zst.sha256"], cwd=exported.parent, check=False)
    assert checked.returncode == 0
    assert exported.read_bytes() == host.bundle(record).read_bytes()
    into = empty_host.home / "directory"
    into.mkdir()
    empty_host.agentkeep("export", snap, "--to", into, configured=False)
    assert sorted(path.name for path in into.iterdir()) == [
        exported_name(record),
        exported_name(record) + ".sha256",
    ]


def test_an_encrypted_bundle_is_verified_as_far_as_without_an_identity_can_be(
    sample: Path, host: Host, empty_host: Host, seaweedfs: SeaweedFS
) -> None:
    identity = host.home / "identity.txt"
    recipient = host.agentkeep("keygen", "--out", identity, configured=False).stdout.strip()
    url = protect_in_bucket(host, sample, seaweedfs)
    with host.config.open("a") as config:
        config.write(f"[encryption]\nrecipients = [{quoted(recipient)}]\n")
    snap = f"{url}/{host.document('snapshot')['key']}"
    shallow = empty_host.document("verify", snap, configured=False)
    assert (shallow["sound"], shallow["fully_checked"]) == (True, False)
    assert {level["level"]: level["status"] for level in shallow["levels"]}["sibling"] == "ok"
    deep = empty_host.document("verify", snap, "--identity", identity, configured=False)
    assert (deep["sound"], deep["fully_checked"]) == (True, True)


def test_a_missing_bundle_or_bucket_is_named_and_leaves_nothing(
    sample: Path, host: Host, empty_host: Host, seaweedfs: SeaweedFS
) -> None:
    url = protect_in_bucket(host, sample, seaweedfs)
    record = host.document("snapshot")
    missing = record["key"].replace(record["snapshot_id"][-4:], "0000")
    target = empty_host.home / "back"
    for snap, exit_code in (
        (f"{url}/{missing}", 66),
        (f"s3://no-such-bucket/{record['key']}", 69),
        (f"{url}/tenants/default/snapshots/ana", 64),
    ):
        for command in (
            ["restore", snap, "--to", target],
            ["export", snap, "--to", target],
            ["verify", snap],
        ):
            done = empty_host.agentkeep(*command, configured=False, expecting=exit_code)
            assert "fix:" in done.stderr, command
    assert list(empty_host.home.iterdir()) == [empty_host.offsite]


def test_latest_is_found_in_the_bucket_by_a_host_whose_catalog_is_gone(
    sample: Path, host: Host, empty_host: Host, seaweedfs: SeaweedFS
) -> None:
    protect_in_bucket(host, sample, seaweedfs)
    complete = host.document("snapshot")
    (sample / "db/vector.sqlite").write_bytes(b"no longer a database" * 500)
    incomplete = host.document("snapshot", expecting=3)
    assert incomplete["uploads"] == {"offsite": "confirmed"}
    empty_host.config.write_text(
        host.config.read_text()
        .replace(str(host.state), str(empty_host.state))
        .replace(str(sample), str(empty_host.home / "ana"))
    )
    restored = empty_host.document("restore", "latest", "--agent", "ana")
    assert restored["snapshot_id"] == complete["snapshot_id"]
    assert (empty_host.home / "ana/db/vector.sqlite").read_bytes()[:15] == b"SQLite format 3"


def writer_round(writer: RunningWriter) -> int:
    lines = writer.journal.read_bytes().splitlines()
    return int(max(json.loads(line).get("round", 0) for line in lines[-5:-1]))


def exported_name(record: Any) -> str:
    return str(record["key"]).rpartition("/")[2]


def assert_sound(restored: Path) -> None:
    """By git's and SQLite's own judgement."""
    run_git(restored / "memdir", "fsck", "--full", "--strict")
    assert run_git(restored / "memdir", "branch", "--format=%(refname)").split() == [
        "refs/heads/experiment",
        "refs/heads/main",
    ]
    assert run_git(restored / "memdir", "tag").split() == ["v1"]
    status = run_git(restored / "memdir", "status", "--porcelain").splitlines()
    assert " M MEMORY.md" in status
    assert "?? notes/draft.md" in status
    for database in DATABASES:
        path = restored / "sqlite" / database.path
        said = subprocess.run(
            ["sqlite3", f"file:{path}?mode=ro&immutable=1", "PRAGMA integrity_check"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout == "ok\n"
