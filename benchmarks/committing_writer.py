"""`python -m benchmarks.committing_writer DATABASE PHASE PAUSE_MS SYNCHRONOUS`: commits, and measures each.

PAUSE_MS: between commits; 0 is as fast as it can. SYNCHRONOUS: SQLite's. PHASE is a file of one byte: which
column of the histogram a commit counts for; the last value ends the writer. Rows take turns in a table of
fixed size, so that the database does not grow. At the end the writer prints its histograms.

Its busy timeout is Python's own, and waiting counts. With none at all, a commit was refused within a few
hundred thousand where somebody else read beside it, agentkeep or not: probably by a reader that meets the
WAL's index half written and takes the writer's lock to look again (walIndexReadHdr in SQLite's wal.c).
"""

from __future__ import annotations

import json
import mmap
import sqlite3
import sys
import time
from contextlib import closing
from math import exp, log
from pathlib import Path

END = 255
_ROWS = 5000
_TEXT = "what was said in this turn of the conversation " * 5
_BUCKETS_PER_E = 50  # each two per cent wide


class Histogram:
    """Latencies in buckets of equal ratio, and the longest exactly."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.longest_ms = 0.0

    def add(self, ms: float) -> None:
        bucket = int(log(max(ms, 1e-4)) * _BUCKETS_PER_E)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.longest_ms = max(self.longest_ms, ms)

    def merge(self, counts: dict[str, int], longest_ms: float) -> None:
        for bucket, count in counts.items():
            self.counts[int(bucket)] = self.counts.get(int(bucket), 0) + count
        self.longest_ms = max(self.longest_ms, longest_ms)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def quantile_ms(self, share: float) -> float:
        wanted = share * self.total
        for bucket in sorted(self.counts):
            wanted -= self.counts[bucket]
            if wanted <= 0:
                return exp(bucket / _BUCKETS_PER_E)
        return self.longest_ms

    def longer_than(self, ms: float) -> int:
        return sum(n for bucket, n in self.counts.items() if exp(bucket / _BUCKETS_PER_E) > ms)


def main() -> None:
    database, phase_file = map(Path, sys.argv[1:3])
    pause_seconds, synchronous = float(sys.argv[3]) / 1000, sys.argv[4]
    phases: dict[int, Histogram] = {}
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS turns (id INTEGER PRIMARY KEY, number INTEGER, text TEXT)"
        )
        print("ready", flush=True)
        with phase_file.open("rb") as stream, mmap.mmap(stream.fileno(), 1, prot=mmap.PROT_READ) as phase:
            number = 0
            while (now := phase[0]) != END:
                started = time.perf_counter()
                row = (number % _ROWS, number, _TEXT)
                connection.execute("INSERT OR REPLACE INTO turns VALUES (?, ?, ?)", row)
                ms = (time.perf_counter() - started) * 1000
                phases.setdefault(now, Histogram()).add(ms)
                number += 1
                if pause_seconds:
                    time.sleep(pause_seconds)
    print(json.dumps({phase: [found.counts, found.longest_ms] for phase, found in phases.items()}))


if __name__ == "__main__":
    main()
