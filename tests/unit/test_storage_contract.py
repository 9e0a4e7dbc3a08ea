"""Keys, sources, and the way from a URL to a backend."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage_backends
from storage_backends import (
    BytesSource,
    FileSource,
    InvalidDestination,
    InvalidKey,
    known_schemes,
    open_backend,
    option_names,
    validate_key,
)
from storage_backends.base import directory_of
from storage_backends.conformance import INVALID_KEYS
from storage_backends.memory import MemoryBackend

SEGMENT = st.text("abzAZ09._-", min_size=1, max_size=20).filter(lambda segment: segment not in (".", ".."))


@settings(deadline=None)
@given(st.lists(SEGMENT, min_size=1, max_size=8).map("/".join).filter(lambda key: key[0] != "."))
def test_good_keys_pass_unchanged(key: str) -> None:
    assert validate_key(key) == key


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab./-_A0 \\\n\0%é"), max_size=30))
def test_what_passes_cannot_escape(key: str) -> None:
    try:
        validate_key(key)
    except InvalidKey as exc:
        assert "\n" not in str(exc)  # noqa: PT017 - either outcome is right
        return
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", key)
    assert not key.startswith((".", "/"))
    assert not {"", ".", ".."} & set(key.split("/"))
    base = Path("/base")
    assert (base / key).relative_to(base).as_posix() == key


@pytest.mark.parametrize("key", INVALID_KEYS)
def test_bad_keys_are_refused_in_a_short_line(key: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        validate_key(key)
    assert len(str(caught.value)) < 200


def test_directory_of_a_prefix() -> None:
    assert directory_of("") == ""
    assert directory_of("ab") == ""
    assert directory_of("a/b/c") == "a/b/"
    assert [directory_of(prefix) for prefix in ("/", "../", "a//", ".x/", "a/../b")] == [None] * 5


def test_sources_open_anywhere_again_and_again(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    path = tmp_path / "data"
    path.write_bytes(data)
    for source in (FileSource.of(path), BytesSource(data)):
        assert source.size_bytes == len(data)
        assert source.sha256 == hashlib.sha256(data).hexdigest()
        for offset in (0, 7, len(data), 0):
            with source.open(offset) as stream:
                assert stream.read() == data[offset:]


def test_known_schemes() -> None:
    assert {"file", "memory", "s3"} <= set(known_schemes())


def test_an_unknown_scheme_names_the_nearest_and_the_known() -> None:
    with pytest.raises(InvalidDestination, match=r"did you mean 'file'.*known: file, memory, s3"):
        open_backend("fiel:///a", {})


@pytest.mark.parametrize("url", ["", "bucket/prefix", "s3:bucket", "/mnt/nas"])
def test_a_url_has_a_scheme(url: str) -> None:
    with pytest.raises(InvalidDestination, match="scheme"):
        open_backend(url, {})


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(InvalidDestination, match="did you mean 'endpoint_url'"):
        open_backend("s3://bucket", {"endpoint": "https://s3.example.net"})
    with pytest.raises(InvalidDestination, match="no option 'region'"):
        open_backend("memory://a", {"region": "x"})


def test_option_names() -> None:
    assert "endpoint_url" in option_names("s3")
    assert option_names("file") == frozenset()


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://AKIA:hunter2@bucket/prefix", {}),
        ("s3://hunter2@bucket", {}),
        ("s3://bucket/p?secret=hunter2", {}),
        ("s3://bucket/hunter2 with spaces", {}),
        ("s3://bucket", {"endpoint_url": "https://me:hunter2@s3.example.net"}),
        ("s3://bucket", {"endpoint_url": "https://s3.example.net/?key=hunter2"}),
        ("s3://bucket", {"endpoint_url": "hunter2"}),
        ("s3://bucket", {"secret_access_key": "hunter2"}),
        ("s3://bucket", {"session_token": "hunter2"}),
        ("s3://bucket", {"access_key_id": "a", "secret_access_key": "hunter2", "profile": "p"}),
        ("s3://bucket", {"addressing_style": "hunter2"}),
        ("s3://bucket", {"checksums": "hunter2"}),
        ("s3://bucket", {"part_size_bytes": "1"}),
        ("s3://bucket", {"part_size_bytes": "many"}),
        ("s3://bucket", {"ca_file": "/nowhere/ca.pem"}),
        ("s3://bucket", {"profile": "no-such-profile"}),
        ("s3://", {}),
        ("s3://b", {}),
        ("s3://bucket/a//b", {}),
        ("s3://bucket/../b", {}),
        ("s3://bucket/" + "p" * 121, {}),
        ("file://host/path", {}),
        ("file://relative", {}),
        ("file:///a/../b", {}),
        ("file:///a?b", {}),
        ("memory://", {}),
        ("memory://a/b", {}),
    ],
)
def test_bad_destinations_are_refused_without_echoing_secrets(url: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidDestination) as caught:
        open_backend(url, options)
    shown = f"{caught.value!r} {caught.value.__cause__!r}"
    assert "hunter2" not in shown


def test_no_secret_in_a_repr() -> None:
    options = {"access_key_id": "AKIA", "secret_access_key": "hunter2", "region": "us-east-1"}
    backend = open_backend("s3://bucket/p", options)
    assert "hunter2" not in repr(backend) + repr(vars(backend))
    backend.close()


def test_only_s3_imports_boto3() -> None:
    program = (
        "import sys, storage_backends; storage_backends.open_backend('file:///tmp', {});"
        "storage_backends.open_backend('memory://a', {});"
        "import storage_backends.layers;"
        "print(sorted({'boto3', 'botocore', 'pytest', 'daemon', 'config'} & set(sys.modules)))"
    )
    root = Path(storage_backends.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


class TestThirdParty:
    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        group = storage_backends.ENTRY_POINT_GROUP
        found = EntryPoints(
            [
                EntryPoint("mine", f"{__name__}:MyBackend", group),
                EntryPoint("s3", f"{__name__}:MyBackend", group),
                EntryPoint("broken", "no_such_module:Backend", group),
                EntryPoint("odd", f"{__name__}:SEGMENT", group),
            ]
        )
        monkeypatch.setattr(storage_backends, "entry_points", lambda group: found)

    def test_is_found_by_its_entry_point(self) -> None:
        assert isinstance(open_backend("mine://x", {"colour": "blue"}), MyBackend)
        assert "mine" in known_schemes()

    def test_cannot_take_the_place_of_a_shipped_one(self) -> None:
        with pytest.raises(InvalidDestination, match="no option 'colour'"):
            open_backend("s3://bucket", {"colour": "blue"})

    def test_that_cannot_be_loaded_is_named(self) -> None:
        with pytest.raises(InvalidDestination, match="broken://"):
            open_backend("broken://x", {})
        with pytest.raises(InvalidDestination, match="not a StorageBackend"):
            open_backend("odd://x", {})


class MyBackend(MemoryBackend):
    option_names = frozenset({"colour"})

    @classmethod
    def from_url(cls, url: str, options: object) -> MyBackend:
        return cls(url)
