"""A place where hostile bundles are unpacked, and which tells what they did."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.errors import IntegrityError
from daemon.restore.unpack import unpack
from daemon.verify import verify
from tests.property.honest import place, read


class Sandbox:
    """A scratch directory in the middle of others, to see that nothing is written but there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root / "home" / "scratch"
        self.scratch.mkdir(parents=True)
        (root / "home" / "outside").write_text("untouched")

    def assert_refused(self, data: bytes, expected: type[IntegrityError]) -> IntegrityError:
        """Reading and unpacking refuse a bundle with the same class of error; verifying reports it."""
        with pytest.raises(expected) as caught:
            read(data)
        assert caught.value.exit_code == 65
        self.assert_not_unpacked(data, expected)
        report = verify(place(self.root, data))
        assert report.levels[0].status == "ok"
        assert not report.is_sound
        return caught.value

    def assert_not_unpacked(self, data: bytes, expected: type[IntegrityError]) -> None:
        """Unpacking refuses a bundle, and leaves nothing outside of its scratch."""
        bundle = place(self.root, data)
        before = self._outside()
        with pytest.raises(expected):
            unpack(bundle, self.scratch, identities=())
        assert self._outside() == before

    def _outside(self) -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.root.rglob("*")
            if not path.is_relative_to(self.scratch)
        }
