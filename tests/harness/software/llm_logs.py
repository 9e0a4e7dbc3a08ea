"""`llm`: prompts and responses of a model of our own, logged by llm's code, and a collection of embeddings.

What is in the store is what the `llm` command says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llm
import sqlite_utils
from click.testing import CliRunner
from llm.cli import cli
from llm.migrations import migrate


class Echo(llm.Model):
    model_id = "echo"

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        yield from (f"{word} " for word in f"you said: {prompt.prompt}".split())


class Digest(llm.EmbeddingModel):
    model_id = "digest"

    def embed_batch(self, items: Any) -> Iterator[list[float]]:
        for item in items:
            data = item if isinstance(item, bytes) else item.encode()
            yield [byte / 255 for byte in hashlib.sha256(data).digest()]


@contextmanager
def opened(root: Path) -> Iterator[Path]:
    os.environ["LLM_USER_PATH"] = str(root)  # where llm itself looks
    yield root


def write(root: Path) -> None:
    root.mkdir(exist_ok=True)
    logs = sqlite_utils.Database(root / "logs.db")
    migrate(logs)
    conversation = llm.Conversation(model=Echo(), name="a talk")
    for number in range(20):
        response = conversation.prompt(f"remember number {number} ünïcode", system="be brief")
        assert response.text().startswith("you said: remember")
        response.log_to_db(logs)
    embeddings = llm.Collection("notes", sqlite_utils.Database(root / "embeddings.db"), model=Digest())
    embeddings.embed_multi(((f"note-{number}", f"text {number}") for number in range(50)), store=True)
    (root / "templates").mkdir()
    (root / "templates/brief.yaml").write_text("system: be brief\n")
    _command("aliases", "set", "e", "echo")


def read(root: Path) -> dict[str, Any]:
    collection = llm.Collection("notes", sqlite_utils.Database(root / "embeddings.db"), model=Digest())
    return {
        "logs": json.loads(_command("logs", "list", "--count", "0", "--json")),
        "found": json.loads(_command("logs", "list", "--query", "seven OR 7", "--json")),
        "collections": json.loads(_command("collections", "list", "--json")),
        "aliases": json.loads(_command("aliases", "list", "--json")),
        "templates": _command("templates", "show", "brief"),
        "similar": [
            (entry.id, entry.score, entry.content) for entry in collection.similar("text 7", number=5)
        ],
    }


def _command(*arguments: str) -> str:
    """The `llm` command, in this process."""
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output
