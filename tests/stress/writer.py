"""`python -m tests.stress.writer ROOT`: an agent at work. It raises the counter of `stores.py` store after
store, pauses between steps as one who thinks, and goes on where a killed one left off.

Says `ready` on stdout when its stores are open. On SIGTERM it ends between two steps and says, as JSON, how
far it came and how long its longest commit took. A store that refuses it ends it with a traceback: with WAL
its busy timeout is zero, so that one refusal by SQLite is enough.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from pathlib import Path

from tests.stress.stores import CHATTER, DATABASES, STORES, Store, open_stores


class Writer:
    """`begun` and `done` count steps since the agent was born, across all stores."""

    def __init__(self, stores: dict[str, Store], *, pause_ms: float) -> None:
        self._stores = stores
        self._order = [name for name in STORES if name in stores]
        self._pause_ms = pause_ms
        self._is_stopping = False
        self.longest_commit_ms = 0.0
        self.begun = self.done = sum(store.value() for store in stores.values())

    def stop(self, *_: object) -> None:
        self._is_stopping = True

    def run(self) -> None:
        while not self._is_stopping:
            # Of all steps so far the next one's place in the order follows: after a crash, too.
            counter, number = divmod(self.done, len(self._order))
            self.begun = self.done + 1
            self._raise(self._order[number], counter + 1)
            self.done = self.begun
            if self._pause_ms:
                time.sleep(random.uniform(0, self._pause_ms / 1000))

    def _raise(self, name: str, counter: int) -> None:
        started = time.perf_counter()
        self._stores[name].raise_to(counter)
        if name in DATABASES:
            self.longest_commit_ms = max(self.longest_commit_ms, (time.perf_counter() - started) * 1000)


def chatter(path: Path, writer: Writer, over: threading.Event) -> None:
    """Append a line about every millisecond: how many steps were begun, and done, just before."""
    with path.open("ab", buffering=0) as log:
        number = 0
        while not over.wait(0.001):
            done = writer.done  # read first: what is done has been begun
            line = {"number": number, "done": done, "begun": writer.begun}
            log.write(json.dumps(line).encode() + b"\n")
            number += 1


def main() -> int:
    arguments = _parser().parse_args()
    pause_s = arguments.pause_ms / 1000
    stores = open_stores(
        arguments.root,
        journal_mode=arguments.journal_mode,
        busy_seconds=arguments.busy_seconds,
        only_databases=arguments.only_databases,
        pause=lambda: time.sleep(random.uniform(0, pause_s)) if arguments.dawdle else None,
    )
    writer = Writer(stores, pause_ms=arguments.pause_ms)
    signal.signal(signal.SIGTERM, writer.stop)
    over = threading.Event()
    threads = []
    if arguments.chatter:
        threads.append(threading.Thread(target=chatter, args=(arguments.root / CHATTER, writer, over)))
    for thread in threads:
        thread.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        writer.run()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    for store in stores.values():
        store.close()
    json.dump({"steps": writer.done, "longest_commit_ms": round(writer.longest_commit_ms, 1)}, sys.stdout)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.writer")
    parser.add_argument("root", type=Path)
    parser.add_argument("--journal-mode", choices=["wal", "delete"], default="wal")
    parser.add_argument("--busy-seconds", type=float, default=0.0)
    parser.add_argument("--pause-ms", type=float, default=15.0, help="the longest pause; they are random")
    parser.add_argument("--dawdle", action="store_true", help="pause within transactions and lines, too")
    parser.add_argument("--only-databases", action="store_true", help="leave the other stores alone")
    parser.add_argument("--chatter", action="store_true", help="append to another log every millisecond")
    return parser


if __name__ == "__main__":
    sys.exit(main())
