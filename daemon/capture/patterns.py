"""Globs over paths relative to an agent's root, many at once: the dear part of a scan."""

from __future__ import annotations

import re
from functools import lru_cache

from wcmatch import glob

_GLOB_FLAGS = glob.GLOBSTAR | glob.DOTGLOB


@lru_cache(maxsize=1024)
class _Globs:
    """Several globs, asked at once: which one it was is only looked for on a hit. Immutable, and dear to
    make: one that is asked for again is the same."""

    def __init__(self, globs: tuple[tuple[str, str], ...], flags: int) -> None:
        self._each = [
            (pattern, re.compile(regex))
            for pattern, written in globs
            for regex in glob.translate([written], flags=flags)[0]
        ]
        self._takes_all = bool(self._each) and self._each[0][0] == "**"
        self._any = re.compile("|".join(f"(?:{regex.pattern})" for _, regex in self._each))

    def first(self, text: str) -> str | None:
        if self._takes_all:
            return "**"
        if not self._each or self._any.fullmatch(text) is None:
            return None
        return next(pattern for pattern, regex in self._each if regex.fullmatch(text))


class Patterns:
    """Globs over paths relative to the root. With `anywhere`, one without a slash matches at any depth."""

    def __init__(self, patterns: tuple[str, ...], *, anywhere: bool, ignore_case: bool = False) -> None:
        flags = _GLOB_FLAGS | (glob.IGNORECASE if ignore_case else 0)
        names = tuple(pattern for pattern in patterns if anywhere and "/" not in pattern)
        paths = tuple(pattern for pattern in patterns if pattern not in names)
        # A name is shorter than a path, and `**/` is what makes matching dear.
        self._names = _Globs(tuple(zip(names, names, strict=True)), flags)
        self._paths = _Globs(tuple(zip(paths, paths, strict=True)), flags)
        # `cache/**` leaves out all that is in cache, so there is no need to look into it.
        deep = tuple((pattern, pattern[:-3]) for pattern in paths if pattern.endswith("/**"))
        self._whole = _Globs(deep, flags)

    def matching(self, path: str) -> str | None:
        """The first pattern that matches (those of whole paths come first), or None."""
        return self._paths.first(path) or self._names.first(path.rpartition("/")[2])

    def matching_directory(self, path: str) -> str | None:
        """The first pattern that matches a directory itself or all that is in it, or None."""
        return self._whole.first(path) or self.matching(path)


def directories_of(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Globs of the directories in which something may lie that one of the patterns matches."""
    found: dict[str, None] = {}
    for pattern in patterns:
        parts = pattern.split("/")
        for depth in range(1, len(parts)):
            if parts[depth - 1] == "**":
                break
            found["/".join(parts[:depth])] = None
        if "**" in parts:
            found["/".join(parts[: parts.index("**") + 1])] = None
    return tuple(found)
