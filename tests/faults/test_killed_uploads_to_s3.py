"""kill -9 in the middle of an upload in parts to a real S3 server: it goes on, and no part is left over."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.commands import Host, quoted
from tests.harness.seaweedfs import SeaweedFS

KILLS = 6
PART_BYTES = 5 << 20  # the smallest that S3 allows


@pytest.fixture
def url(host: Host, seaweedfs: SeaweedFS) -> str:
    root = host.home / "ana"
    root.mkdir()
    (root / "big").write_bytes(os.urandom(2 * PART_BYTES + 12345))
    host.environment |= seaweedfs.environment()
    url = f"s3://{seaweedfs.bucket}/{host.home.parent.name}"
    lines = f'url = {quoted(url)}\noptions = {{ part_size_bytes = "{PART_BYTES}" }}'
    host.configure({"ana": f"root = {quoted(root)}"}, destinations={"offsite": lines})
    return url


def test_uploads_that_are_killed_again_and_again_arrive_whole_and_leave_no_parts(
    host: Host, seaweedfs: SeaweedFS, url: str, tmp_path: Path
) -> None:
    host.agentkeep("snapshot", "--no-upload")
    host.agentkeep("upload")
    record = host.document("snapshot", "--force", "--no-upload")
    prefix = f"{host.home.parent.name}/"
    for _ in range(KILLS):
        with host.started("upload") as running:
            # Until its parts are on their way (or, on a good day for uploads, until it is through).
            while not unfinished(seaweedfs, prefix) and not running.has_ended_within(0.01):
                pass
            running.kill()
        if record["key"] in keys(seaweedfs, prefix):
            assert host.document("verify", f"{url}/{record['key']}")["fully_checked"] is True
    host.agentkeep("upload")
    assert [r["uploads"] for r in host.snapshots()] == [{"offsite": "confirmed"}] * 2
    for record in host.snapshots():
        report = host.document("verify", f"{url}/{record['key']}")
        assert (report["sound"], report["fully_checked"]) == (True, True)
        assert report["sha256"] == record["sha256"]
        assert {record["key"], f"{record['key']}.sha256"} <= keys(seaweedfs, prefix)
    assert len(keys(seaweedfs, prefix)) == 4
    host.agentkeep("restore", record["snapshot_id"], "--to", tmp_path / "back")
    assert (tmp_path / "back/files/big").read_bytes() == (host.home / "ana/big").read_bytes()
    # One killed while it finds out what the server can do may leave an upload of its own, of no bundle.
    assert [key for key in unfinished(seaweedfs, prefix) if "snapshots" in key] == []


def keys(server: SeaweedFS, prefix: str) -> set[str]:
    with closing(server.client()) as client:
        listed = client.list_objects_v2(Bucket=server.bucket, Prefix=prefix).get("Contents", [])
    return {found["Key"].removeprefix(prefix) for found in listed}


def unfinished(server: SeaweedFS, prefix: str) -> list[str]:
    with closing(server.client()) as client:
        listed = client.list_multipart_uploads(Bucket=server.bucket, Prefix=prefix).get("Uploads", [])
    return [found["Key"] for found in listed]
