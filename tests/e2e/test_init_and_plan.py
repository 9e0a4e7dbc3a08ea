"""From nothing to a first snapshot: `init` finds the agent, `show --plan` says what comes, and it comes."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

from tests.e2e.commands import Host, quoted
from tests.e2e.trees import access_times, listing


def test_what_init_writes_is_planned_and_captured_as_planned(host: Host, sample: Path) -> None:
    (sample / "state/extract_cursor.json").write_text("{}")
    with closing(sqlite3.connect(sample / "dream_runs.db")) as connection:
        connection.execute("CREATE TABLE dream_runs (id, started_at)")
    host.environment["AGENTKEEP_STATE_DIR"] = str(host.state)  # root's default lies outside of this host
    said = host.agentkeep(
        "init", host.home, "--out", host.config, "--url", host.offsite.as_uri(), configured=False
    )
    assert f"ana: nexo in {sample}" in said.stdout
    assert stat.S_IMODE(host.config.stat().st_mode) == 0o600
    before = listing(sample), access_times(sample)
    plan = host.document("show", "--plan")
    assert (listing(sample), access_times(sample)) == before
    assert not host.state.exists()
    assert (plan["agent_id"], plan["memdir"], plan["git"], plan["failures"]) == ("ana", "memory", True, [])

    record = host.document("snapshot")
    assert record["complete"]
    assert [state["name"] for state in plan["states"]] == ["extract_cursor", "dream_run"]
    artifacts = host.manifest("latest")["artifacts"]
    for kind, of_plan in (("sqlite", "database"), ("memory_file", "memory file"), ("file", "file")):
        captured = [artifact for artifact in artifacts if artifact["kind"] == kind]
        assert len(captured) == plan["totals"][of_plan]["count"], kind


def test_a_plan_for_people_names_what_is_left_out_and_why(host: Host, sample: Path) -> None:
    (sample / ".env").write_text("KEY=x")
    (sample / "unknown.bin").write_bytes(b"x")
    host.configure({"ana": f'root = {quoted(sample)}\nprofile = "nexo"'})
    shown = host.agentkeep("show", "--plan", "ana").stdout
    assert "left out     1 x .env (looks like a secret): .env" in shown
    assert "left out     1 x unknown.bin (not part of the profile): unknown.bin" in shown
    assert "memdir       memory (git repository, all refs)" in shown
    assert "database     db/long_term.sqlite, " in shown


def test_a_plan_with_failures_is_done_in_part(host: Host, sample: Path) -> None:
    host.configure({"ana": f'root = {quoted(sample)}\nmax_file_bytes = "1 KiB"'})
    done = host.agentkeep("show", "--plan", "ana", expecting=3)
    assert "max_file_bytes allows 1,024" in done.stdout
    assert "fix raise max_file_bytes" in done.stdout


def test_a_plan_needs_an_agent_that_is_there(host: Host) -> None:
    host.configure({"ana": f"root = {quoted(host.home / 'nowhere')}"})
    assert "is not there" in host.agentkeep("show", "--plan", "ana", expecting=66).stderr
    assert "did you mean 'ana'" in host.agentkeep("show", "--plan", "anna", expecting=66).stderr
    assert "which snapshot?" in host.agentkeep("show", expecting=64).stderr


def test_init_prints_what_it_would_write(host: Host, sample: Path) -> None:
    text = host.agentkeep("init", sample, configured=False).stdout
    assert host.document("init", sample, configured=False)["configuration"] == text
    host.config.write_text(text)
    assert host.document("show", "--plan", "ana")["root"] == str(sample)


def test_init_overwrites_nothing(host: Host, sample: Path) -> None:
    host.config.write_text("# mine\n")
    done = host.agentkeep("init", sample, "--out", host.config, configured=False, expecting=None)
    assert done.exit_code == 73
    assert host.config.read_text() == "# mine\n"


def test_init_says_where_it_looked_if_nothing_is_there(host: Host) -> None:
    (host.home / "empty").mkdir()
    done = host.agentkeep("init", host.home / "empty", configured=False, expecting=66)
    assert f"{host.home / 'empty'} (3 levels deep)" in done.stderr
    assert str(host.home / ".codex") in done.stderr
    assert "agentkeep init DIR" in done.stderr
