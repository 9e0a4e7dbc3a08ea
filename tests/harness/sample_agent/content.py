"""What the sample agent writes: every row, line and note, as a pure function of a seed.

Text is a random draw of words from one fixed table: common words by Zipf's law, a long tail of
made-up ones, numbers, dates and ids. zstd at level 3 shrinks it about 2.7 times, as it does notes
and documentation; repeated blocks would have shrunk ten times more. Vectors are float32 with random
mantissas and the few exponents that normalised embeddings have: about 1.08 times, as real ones.

Because content depends on nothing but (seed, store, round), the prover can make any row again
instead of keeping a copy of it. No I/O here, no clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from operator import itemgetter
from random import Random

Value = int | float | str | bytes
Row = tuple[Value, ...]

FIRST_ROUND_AT = datetime(2026, 1, 1, tzinfo=UTC)
VECTOR_DIMENSIONS = 384
LOG_LINE_OF_EACH_ROUND_WORDS = 60
BASE_LOG_LINE_WORDS = 140

_WORD_TABLE_SIZE = 1 << 16  # one entry for every 16-bit random number
_COMMON_WORDS = """
the of and to a in is that for it with as was on user be this by not are from at have or an agent they
which you we will can their has but one all were when there more who so about if out up what been would
no into only than then its time also some could them other after now should because over any new these
two first may do how our use like most even work where made before each through back much those must
well way while own being under used memory prefers asked note remember project meeting decided tomorrow
session context task plan file error fixed deploy branch review question answer although summary follow
call email customer invoice deadline budget report schedule draft team release version database query
index cache token model prompt tool result search page link travel family birthday coffee music garden
language learning health doctor address city train flight hotel price preference dislikes enjoys working
remotely usually morning evening weekly monthly important urgent later finished started blocked waiting
confirmed cancelled updated changed removed added observed learned inferred likely certain unknown
related contradicts supports
"""
_SYLLABLES = (
    "ka ri to men sol ver ant lis por gra ne du mar tel con bri fa zen ol ist ber qui sha lo pen dra vi"
)
# High bytes of small positive and negative float32: |x| between about 0.002 and 0.13.
_EXPONENT_BYTES = bytes(
    ([0x3C] * 5 + [0x3D] * 9 + [0x3B] * 2 + [0xBC] * 5 + [0xBD] * 9 + [0xBB] * 2) * (256 // 32)
)


def random_for(seed: int, *name: str | int) -> Random:
    """The one stream of random numbers that belongs to this name."""
    return Random("/".join(str(part) for part in (seed, *name)))


def text(random: Random, *, words: int) -> str:
    indices = memoryview(random.randbytes(2 * max(words, 2))).cast("H")
    return " ".join(itemgetter(*indices)(_word_table()))


def vector(random: Random) -> bytes:
    floats = bytearray(random.randbytes(4 * VECTOR_DIMENSIONS))
    floats[3::4] = floats[3::4].translate(_EXPONENT_BYTES)
    return bytes(floats)


def digest_of_row(row: Row) -> str:
    return digest(repr(row).encode())


def digest_of_rows(rows: list[Row]) -> str:
    return digest("".join(digest_of_row(row) for row in rows).encode())


def digest(content: bytes) -> str:
    """128 bits are plenty between a test and its own journal, and keep the journal small."""
    return hashlib.sha256(content).hexdigest()[:32]


def moment_of(round_number: int) -> datetime:
    """Rounds are a minute apart on the agent's own calendar, which no real clock touches."""
    return FIRST_ROUND_AT + timedelta(minutes=round_number)


def identity_document(*, agent_id: str, seed: int, size_mb: float) -> bytes:
    return _json_bytes({"agent_id": agent_id, "seed": seed, "size_mb": size_mb, "model": "sample"})


def cursor_document(*, round_number: int, log_size_bytes: int) -> bytes:
    return _json_bytes(
        {
            "round": round_number,
            "session": "sessions/current.jsonl",
            "offset_bytes": log_size_bytes,
            "extracted_at": moment_of(round_number).isoformat(),
        }
    )


def log_line(seed: int, round_number: int) -> bytes:
    """The line that a round adds to the session log."""
    random = random_for(seed, "log", round_number)
    return _log_line(random, round_number=round_number, words=LOG_LINE_OF_EACH_ROUND_WORDS)


def base_log_lines(seed: int, name: str, *, size_bytes: int) -> Iterator[bytes]:
    """What a session log held before the first round."""
    random = random_for(seed, "base log", name)
    written_bytes = 0
    while written_bytes < size_bytes:
        line = _log_line(random, round_number=0, words=BASE_LOG_LINE_WORDS)
        written_bytes += len(line)
        yield line


def note(seed: int, name: str, *, words: int) -> bytes:
    random = random_for(seed, "note", name)
    title = text(random, words=4).replace("\n", " ")
    return f"# {title}\n\n{text(random, words=words)}\n".encode()


def round_note(seed: int, round_number: int) -> bytes:
    """The note that every round rewrites and every few rounds commit."""
    body = text(random_for(seed, "round note", round_number), words=120)
    return f"round: {round_number}\n\n{body}\n".encode()


def round_of_note(content: bytes) -> int:
    first_line = content.split(b"\n", 1)[0]
    return int(first_line.removeprefix(b"round: "))


def _log_line(random: Random, *, round_number: int, words: int) -> bytes:
    entry = {
        "round": round_number,
        "at": moment_of(round_number).isoformat(),
        "role": random.choice(("user", "assistant", "tool")),
        "text": text(random, words=words),
    }
    return json.dumps(entry).encode() + b"\n"


def _json_bytes(document: dict[str, object]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"


@cache
def _word_table() -> tuple[str, ...]:
    random = Random("word table")  # the same for every seed: it is the language, not the content
    syllables = _SYLLABLES.split()
    rare_words = sorted({_made_up_word(random, syllables) for _ in range(9000)})
    random.shuffle(rare_words)
    vocabulary = [*_COMMON_WORDS.split(), *rare_words]
    weights = [(rank + 3) ** -0.95 for rank in range(len(vocabulary))]
    words_in_table = _WORD_TABLE_SIZE - _WORD_TABLE_SIZE // 14
    scale = words_in_table / sum(weights)
    entries = [
        word
        for word, weight in zip(vocabulary, weights, strict=True)
        for _ in range(max(1, round(weight * scale)))
    ]
    entries = entries[:words_in_table]
    entries.extend(_number_like(random) for _ in range(_WORD_TABLE_SIZE - len(entries)))
    random.shuffle(entries)
    return tuple(_punctuated(word, position) for position, word in enumerate(entries))


def _made_up_word(random: Random, syllables: list[str]) -> str:
    return "".join(random.choice(syllables) for _ in range(random.choice((2, 2, 3, 3, 4))))


def _number_like(random: Random) -> str:
    return random.choice(
        (
            f"#{random.randrange(9999)}",
            f"2026-{random.randrange(1, 13):02}-{random.randrange(1, 29):02}",
            f"{random.getrandbits(32):08x}",
            f"user_{random.randrange(500)}",
            f"{random.randrange(1000) / 10}",
        )
    )


def _punctuated(word: str, position: int) -> str:
    if position % 61 == 0:
        return word + ".\n"
    if position % 12 == 0:
        return word + "."
    if position % 17 == 0:
        return word + ","
    return word.capitalize() if position % 11 == 0 else word
