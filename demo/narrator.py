"""How the story is told on a terminal, or in a log. Prints; decides nothing."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_WIDTH_LIMIT = 100
_INDENT = 4


class Narrator:
    def __init__(self) -> None:
        console = Console(highlight=False)
        self._console = Console(highlight=False, width=min(console.width, _WIDTH_LIMIT))
        self._chapter = 0
        self._began = time.monotonic()

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._began

    def title(self, text: str) -> None:
        self._console.print()
        self._console.rule(Text(text, style="bold"), align="left")

    @contextmanager
    def chapter(self, heading: str) -> Iterator[None]:
        """A numbered heading, what is said within it, and how long it took."""
        self._chapter += 1
        began = time.monotonic()
        self._console.print()
        self._console.print(Text(f"{self._chapter:>2}  {heading}", style="bold cyan"))
        yield
        self._console.print(Text(f"    {time.monotonic() - began:.1f} s", style="dim"))

    def say(self, text: str) -> None:
        for line in textwrap.wrap(text, self._console.width - _INDENT):
            self._console.print(Text(" " * _INDENT + line))

    def command(self, *words: str) -> None:
        """A command as a user would type it, on lines that can be copied."""
        self._console.print(Text("    $ " + " ".join(words), style="yellow"), soft_wrap=True)

    def table(self, *headings: str, rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """`numbers`: the columns to be set flush right. Headings that are all empty are left out."""
        table = Table(box=None, pad_edge=False, header_style="dim", show_header=any(headings))
        for position, heading in enumerate(headings):
            table.add_column(heading, justify="right" if position in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(Padding(table, (0, 0, 0, _INDENT), expand=False))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something that moves, where there is a terminal."""
        with self._console.status(Text(what, style="dim")):
            yield

    def verdict(self, text: str, *, good: bool) -> None:
        self._console.print()
        self._console.print(Text(text, style="bold green" if good else "bold red"))

    def detail(self, text: str) -> None:
        for line in text.splitlines():
            self._console.print(Text(f"    {line}", style="dim"), soft_wrap=True)


def size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"
