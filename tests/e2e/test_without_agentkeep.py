"""A bundle is recovered with nothing of ours: sha256sum, age, zstd, tar, git, sqlite3, and a shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.commands import Host, quoted
from tests.harness.sample_agent import DATABASES, RestoredPaths, SampleWriter, prove
from tests.harness.sample_agent.builder import run_git

STEPS = """
set -eu
sha256sum --check --strict -- *.sha256
if [ -n "${IDENTITY:-}" ]; then
    age --decrypt --identity "$IDENTITY" --output bundle.tar.zst -- *.tar.zst.age
else
    cp -- *.tar.zst bundle.tar.zst
fi
zstd --quiet --decompress bundle.tar.zst -o bundle.tar
mkdir unpacked
tar --extract --file bundle.tar --directory unpacked
git clone --quiet --mirror unpacked/git/memory.bundle memory.git
cp -a unpacked/memory_files memdir
git clone --quiet --mirror memory.git memdir/.git
git -C memdir config core.bare false
git -C memdir read-tree refs/agentkeep/index/staged
git -C memdir for-each-ref --format='delete %(refname)' refs/agentkeep | git -C memdir update-ref --stdin
for database in unpacked/sqlite/db/*.sqlite; do
    test "$(sqlite3 "$database" 'PRAGMA integrity_check')" = ok
done
"""


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_bundle_is_recovered_with_standard_tools_alone(
    host: Host, sample: Path, tmp_path: Path, *, encrypted: bool
) -> None:
    journal = tmp_path / "journal.jsonl"
    with SampleWriter(sample, journal=journal) as writer:
        writer.write_until(round_number=7)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C"}
    top = ""
    if encrypted:
        identity = tmp_path / "identity.txt"
        recipient = host.agentkeep("keygen", "--out", identity, configured=False).stdout.strip()
        top = f"encryption.recipients = [{quoted(recipient)}]"
        environment["IDENTITY"] = str(identity)
    host.configure({"ana": f'root = {quoted(sample)}\nmemdir = "memory"'}, top=top)
    record = host.document("snapshot")
    desk = tmp_path / "desk"
    shutil.copytree((host.offsite / record["key"]).parent, desk)

    done = subprocess.run(
        ["bash", "-c", STEPS], cwd=desk, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    for database in DATABASES:
        recovered = sql_dump(desk / "unpacked/sqlite" / database.path)
        assert recovered == sql_dump(sample / database.path), database.name
    assert run_git(desk / "memdir", "show-ref") == run_git(sample / "memory", "show-ref")
    for question in (("status", "--porcelain"), ("diff",), ("diff", "--cached"), ("rev-parse", "HEAD")):
        assert run_git(desk / "memdir", *question) == run_git(sample / "memory", *question)
    for path in (sample / "sessions").iterdir():
        assert (desk / "unpacked/files/sessions" / path.name).read_bytes() == path.read_bytes()
    paths = RestoredPaths(
        memdir=desk / "memdir",
        databases={d.name: desk / "unpacked/sqlite" / d.path for d in DATABASES},
        files=desk / "unpacked/files",
        cursors=(desk / "unpacked/files/state/cursor.json",),
        dream_run=None,
        may_end_mid_line=False,
    )
    assert prove(paths, journal).instant.round_number == 7


def test_the_manifest_names_every_digest_for_sha256sum(host: Host, sample: Path, tmp_path: Path) -> None:
    host.configure({"ana": f'root = {quoted(sample)}\nmemdir = "memory"'})
    bundle = host.bundle(host.document("snapshot"))
    subprocess.run(["tar", "--zstd", "-xf", bundle], cwd=tmp_path, check=True)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    lines = [f"{a['sha256']}  {a['path_in_bundle']}\n" for a in manifest["artifacts"]]
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet"],
        input="".join(lines),
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert checked.returncode == 0
    unpacked = {
        str(path.relative_to(tmp_path))
        for room in ("git", "memory_files", "sqlite", "files")
        for path in (tmp_path / room).rglob("*")
        if path.is_file()
    }
    assert unpacked == {a["path_in_bundle"] for a in manifest["artifacts"]}


def sql_dump(path: Path) -> str:
    """Read as a copy, WAL and all: sqlite3 would write beside it."""
    copy = Path(str(path) + ".dumped")
    for suffix in ("", "-wal"):
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    said = subprocess.run(["sqlite3", copy, ".dump"], capture_output=True, text=True, check=True)
    for left in copy.parent.glob(f"{copy.name}*"):
        left.unlink()
    return said.stdout
