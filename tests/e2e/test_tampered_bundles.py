"""Bundles that somebody changed, where they lie: refused by every command, with nothing left behind."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.commands import Host, quoted


@pytest.fixture
def stored(host: Host) -> Path:
    """A bundle at the destination; the host that made it is lost but for its agents' configuration."""
    for name in ("ana", "bob"):
        (host.home / name).mkdir()
        (host.home / name / "note.md").write_text(f"I am {name}\n")
        (host.home / name / "big").write_bytes(os.urandom(200_000))
    host.configure({name: f"root = {quoted(host.home / name)}" for name in ("ana", "bob")})
    record = host.document("snapshot", "ana")
    shutil.rmtree(host.state)
    shutil.rmtree(host.home / "ana")
    return host.offsite / str(record["key"])


def sibling_of(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}.sha256")


def without_sibling(bundle: Path) -> None:
    sibling_of(bundle).unlink()


def with_another_sibling(bundle: Path) -> None:
    sibling_of(bundle).write_text(f"{'0' * 64}  {bundle.name}\n")


def with_one_bit_changed(bundle: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.write_bytes(data)


def with_one_bit_and_the_sibling_changed(bundle: Path) -> None:
    with_one_bit_changed(bundle)
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    sibling_of(bundle).write_text(f"{digest}  {bundle.name}\n")


def cut_short(bundle: Path) -> None:
    os.truncate(bundle, bundle.stat().st_size // 2)


@pytest.mark.parametrize(
    "tamper",
    [
        without_sibling,
        with_another_sibling,
        with_one_bit_changed,
        with_one_bit_and_the_sibling_changed,
        cut_short,
    ],
)
def test_a_bundle_that_is_not_proven_is_restored_by_nobody(
    host: Host, stored: Path, tamper: Callable[[Path], None]
) -> None:
    tamper(stored)
    out = host.home / "out"
    url = stored.as_uri()
    for arguments in (
        ["restore", url, "--to", out / "back"],
        ["restore", url, "--agent", "ana"],
        ["show", url],
    ):
        answer = host.document(*arguments, expecting=65)
        assert answer["error"]["message"]
    report = host.document("verify", url, expecting=65)
    assert report["sound"] is False
    assert [level["level"] for level in report["levels"] if level["status"] == "failed"]
    assert not out.exists()
    assert not (host.home / "ana").exists()
    assert [path.name for path in host.home.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("tamper", [without_sibling, with_another_sibling, with_one_bit_changed, cut_short])
def test_a_bundle_that_is_not_its_siblings_is_not_exported(
    host: Host, stored: Path, tamper: Callable[[Path], None]
) -> None:
    tamper(stored)
    out = host.home / "out"
    answer = host.document("export", stored.as_uri(), "--to", out / "deep/copy.tar.zst", expecting=65)
    assert answer["error"]["hint"]
    assert not out.exists()


def test_the_bundle_of_another_agent_is_not_restored_in_its_place(host: Host, stored: Path) -> None:
    shutil.rmtree(host.home / "bob")
    answer = host.document("restore", stored.as_uri(), "--agent", "bob", expecting=77)
    assert "'ana'" in answer["error"]["message"]
    assert not (host.home / "bob").exists()


def test_a_bundle_that_was_moved_to_another_agents_key_is_refused(host: Host, stored: Path) -> None:
    moved = host.offsite / "tenants/default/snapshots/bob" / stored.name
    moved.parent.mkdir(parents=True)
    for path in (stored, sibling_of(stored)):
        shutil.copy(path, moved.with_name(path.name))
    shutil.rmtree(host.home / "bob")
    host.document("restore", moved.as_uri(), "--agent", "bob", expecting=77)
    host.document("restore", moved.as_uri(), "--to", host.home / "out/back", expecting=65)
    assert host.document("verify", moved.as_uri(), expecting=65)["sound"] is False
    assert not (host.home / "bob").exists()
    assert not (host.home / "out").exists()


@pytest.mark.parametrize("existing", [False, True], ids=["missing", "empty"])
def test_an_agent_comes_back_to_a_root_that_is_missing_or_empty(
    host: Host, stored: Path, *, existing: bool
) -> None:
    if existing:
        (host.home / "ana").mkdir()
    restored: Any = host.document("restore", stored.as_uri(), "--agent", "ana")
    assert restored["target"] == str(host.home / "ana")
    assert (host.home / "ana/note.md").read_text() == "I am ana\n"
    assert restored["not_put_back"] == []


def test_a_living_agent_is_never_restored_over(host: Host, stored: Path) -> None:
    (host.home / "ana").mkdir()
    (host.home / "ana/new.md").write_text("what it knows since\n")
    answer = host.document("restore", stored.as_uri(), "--agent", "ana", "--yes", expecting=77)
    assert answer["error"]["hint"]
    assert [path.name for path in (host.home / "ana").iterdir()] == ["new.md"]
