"""The house rules that a reader relies on: who may import what, and what answers at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("daemon", "config", "storage_backends")


def modules() -> list[Path]:
    found = [
        path.relative_to(REPOSITORY) for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")
    ]
    assert len(found) > 30
    return sorted(found)


def imported_by(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in a file, in functions too, by its full name."""
    for node in ast.walk(ast.parse((REPOSITORY / path).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers_of(*names: str) -> set[str]:
    """Files that import one of these packages or anything in them."""
    return {
        str(path)
        for path in modules()
        for imported in imported_by(path)
        if any(imported == name or imported.startswith(f"{name}.") for name in names)
    }


def test_the_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            "--no-cache",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_only_the_s3_backend_knows_boto3() -> None:
    found = importers_of("boto3", "botocore", "s3transfer")
    assert found
    assert {path for path in found if not path.startswith("storage_backends/s3")} == set()


def test_only_the_git_halves_of_capture_and_restore_know_libgit2() -> None:
    halves = {"daemon/capture/git.py", "daemon/capture/git_objects.py", "daemon/restore/git.py"}
    assert importers_of("pygit2") == halves


def test_only_one_module_knows_pyrage() -> None:
    assert importers_of("pyrage") == {"daemon/bundle/encryption.py"}


def test_storage_backends_know_nothing_of_the_application() -> None:
    found = importers_of("daemon", "config")
    assert {path for path in found if path.startswith("storage_backends/")} == set()


def test_only_schedules_and_the_service_know_apscheduler() -> None:
    assert importers_of("apscheduler") == {"daemon/schedule.py", "daemon/service.py"}


def test_only_the_command_line_prints_or_exits() -> None:
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse((REPOSITORY / path).read_bytes())):
            is_print = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            )
            is_exit = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.exit", "os._exit")
            if is_print or is_exit:
                found.add(str(path))
    assert found
    assert {path for path in found if not path.startswith("daemon/cli/")} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["restore", "--help"]])
def test_what_only_looks_imports_nothing_that_is_slow(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "ana").mkdir()
    config = tmp_path / "agentkeep.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/state"\n[agents.ana]\nroot = "{tmp_path}/ana"\nschedule = "every 1h"\n'
        '[destinations.offsite]\nurl = "s3://bucket/prefix"\n'
    )
    script = (
        "import atexit, sys\n"
        "slow = ('boto3', 'botocore', 'pygit2', 'apscheduler')\n"
        "atexit.register(lambda: print('loaded:', *(name for name in slow if name in sys.modules)))\n"
        "from daemon.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--config", config, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert len(done.stdout.splitlines()) > 1
