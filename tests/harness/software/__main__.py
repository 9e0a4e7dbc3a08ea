"""`write`: make a store, say what is in it, keep it open until stdin ends. `read`: open one, say the same."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    name, what, root = sys.argv[1:]
    software = importlib.import_module(f"tests.harness.software.{name}")
    with software.opened(Path(root)) as store:
        if what == "write":
            software.write(store)
        print(json.dumps(software.read(store)), flush=True)
        if what == "write":
            sys.stdin.read()


if __name__ == "__main__":
    main()
