"""The retrying layer: what it tries again, how long it waits, and where it goes on."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import pytest

from storage_backends import (
    BytesSource,
    Forbidden,
    InvalidDestination,
    ObjectInfo,
    Source,
    StorageError,
    Unavailable,
)
from storage_backends.layers import Retrying
from storage_backends.memory import MemoryBackend


class Flaky(MemoryBackend):
    """Raises what is in `errors`, one at a call, before doing anything."""

    def __init__(self, *errors: StorageError) -> None:
        super().__init__(secrets.token_hex(8))
        self.errors = list(errors)
        self.resumed_from: list[str | None] = []
        self.discarded: list[str] = []

    def fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def put(
        self,
        key: str,
        source: Source,
        *,
        resume: str | None = None,
        on_resume_token: Callable[[str], None] | None = None,
    ) -> ObjectInfo:
        self.resumed_from.append(resume)
        if on_resume_token is not None:
            on_resume_token(f"token-{len(self.resumed_from)}")
        self.fail()
        return super().put(key, source)

    def stat(self, key: str) -> ObjectInfo:
        self.fail()
        return super().stat(key)

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(super().list(prefix, start_after=start_after)):
            if number == 2:
                self.fail()
            yield info

    def discard(self, key: str, resume: str) -> None:
        self.discarded.append(resume)


def away(count: int) -> list[StorageError]:
    return [Unavailable("away") for _ in range(count)]


def test_unavailable_is_tried_again_after_growing_jittered_delays() -> None:
    flaky = Flaky(*away(5))
    delays: list[float] = []
    retrying = Retrying(
        flaky,
        attempts=6,
        first_delay_seconds=1,
        max_delay_seconds=6,
        sleep=delays.append,
        jitter=lambda: 0.5,
    )
    retrying.put("a", BytesSource(b"1"))
    assert delays == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_it_gives_up() -> None:
    flaky = Flaky(*away(9))
    with pytest.raises(Unavailable):
        Retrying(flaky, attempts=3, sleep=lambda _seconds: None).stat("a")
    assert len(flaky.errors) == 6


def test_nothing_else_is_tried_again() -> None:
    flaky = Flaky(Forbidden("no"), *away(1))
    with pytest.raises(Forbidden):
        Retrying(flaky, attempts=3, sleep=lambda _seconds: None).stat("a")
    assert len(flaky.errors) == 1


def test_a_put_goes_on_from_its_latest_token() -> None:
    flaky = Flaky(*away(2))
    tokens: list[str] = []
    retrying = Retrying(flaky, sleep=lambda _seconds: None)
    retrying.put("a", BytesSource(b"1"), resume="token-0", on_resume_token=tokens.append)
    assert flaky.resumed_from == ["token-0", "token-1", "token-2"]
    assert tokens == ["token-1", "token-2", "token-3"]
    assert flaky.discarded == []


def test_a_token_that_nobody_keeps_is_discarded_at_the_end() -> None:
    flaky = Flaky(*away(2))
    with pytest.raises(Unavailable):
        Retrying(flaky, attempts=2, sleep=lambda _seconds: None).put("a", BytesSource(b"1"))
    assert flaky.discarded == ["token-2"]
    kept = Flaky(*away(2))
    with pytest.raises(Unavailable):
        Retrying(kept, attempts=2, sleep=lambda _seconds: None).put(
            "a", BytesSource(b"1"), on_resume_token=lambda _token: None
        )
    assert kept.discarded == []


def test_a_listing_goes_on_after_the_last_key() -> None:
    flaky = Flaky()
    wanted = [f"k{number}" for number in range(9)]
    for key in wanted:
        flaky.put(key, BytesSource(b""))
    flaky.errors = away(3)
    retrying = Retrying(flaky, attempts=2, sleep=lambda _seconds: None)
    assert [info.key for info in retrying.list()] == wanted
    assert flaky.errors == []


def test_a_layer_has_no_url_and_at_least_one_attempt() -> None:
    with pytest.raises(InvalidDestination):
        Retrying.from_url("memory://a", {})
    with pytest.raises(ValueError, match="at least 1"):
        Retrying(Flaky(), attempts=0)
