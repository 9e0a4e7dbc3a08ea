"""Chroma as a PersistentClient: part of a collection in its index on disk, part still in its queue."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
from chromadb.config import Settings

_DIMENSIONS = 24
_ENTRIES = 250
_PERSISTED_EVERY = 100


@contextmanager
def opened(root: Path) -> Iterator[Any]:
    yield chromadb.PersistentClient(path=str(root), settings=Settings(anonymized_telemetry=False))


def write(client: Any) -> None:
    chance = random.Random(7)
    collection = client.create_collection(
        "memories",
        metadata={
            "hnsw:batch_size": _PERSISTED_EVERY // 2,
            "hnsw:sync_threshold": _PERSISTED_EVERY,
            "hnsw:search_ef": 2 * _ENTRIES,  # so wide a search that its answer is exact
            "hnsw:M": 64,
        },
        embedding_function=None,
    )
    for first in range(0, _ENTRIES, 50):
        numbers = range(first, first + 50)
        collection.add(
            ids=[f"memory-{number}" for number in numbers],
            embeddings=[[chance.random() for _ in range(_DIMENSIONS)] for _ in numbers],
            documents=[f"what happened in round {number}" for number in numbers],
            metadatas=[{"round": number, "kind": "fact"} for number in numbers],
        )
    collection.delete(ids=["memory-3"])


def read(client: Any) -> dict[str, Any]:
    collection = client.get_collection("memories", embedding_function=None)
    everything = collection.get(include=["embeddings", "documents", "metadatas"])
    similar = collection.query(query_embeddings=[[0.5] * _DIMENSIONS], n_results=10)
    full_text = collection.get(where_document={"$contains": "round 77"})
    return {
        "ids": everything["ids"],
        "embeddings": [[float(x) for x in vector] for vector in everything["embeddings"]],
        "documents": everything["documents"],
        "metadatas": everything["metadatas"],
        "similar": similar["ids"],
        "full_text": full_text["ids"],
    }
