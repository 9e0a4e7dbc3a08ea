"""The canonical form is RFC 8785's for any document, and it is the same for two only if they say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.bundle.seal import canonical, parse_json, seal_of
from daemon.bundle.sibling import parse_sibling, sibling_bytes
from daemon.errors import MalformedBundle, SiblingMismatch
from tests.property.crafted import jcs, seal_over

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(TEXT, VALUES, max_size=6)


@given(DOCUMENTS)
@settings(max_examples=80)
def test_the_canonical_form_equals_an_independent_one(document: dict[str, Any]) -> None:
    assert canonical(document) == jcs(document)
    assert seal_of(document) == seal_over(document)
    assert json.loads(canonical(document)) == document


@given(DOCUMENTS, st.randoms(use_true_random=False))
def test_the_order_of_keys_makes_no_difference(document: dict[str, Any], random: Any) -> None:
    items = list(document.items())
    random.shuffle(items)
    assert seal_of(dict(items)) == seal_of(document)


@given(DOCUMENTS, DOCUMENTS)
@settings(max_examples=50)
def test_two_documents_have_one_form_only_if_they_are_the_same_json(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (canonical(one) == canonical(other)) == same


@given(DOCUMENTS, st.booleans(), st.sampled_from([None, 1, 7]))
def test_a_document_is_read_however_it_is_written(
    document: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    data = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    assert parse_json(data, "it") == document


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=150)
def test_bytes_that_are_no_document_are_refused_and_nothing_else_is_raised(data: bytes) -> None:
    try:
        parse_json(data, "it")
    except MalformedBundle:
        return
    assert isinstance(json.loads(data.decode()), dict)


@given(st.binary(min_size=32, max_size=32), st.from_regex(r"\A[A-Za-z0-9._-]{1,200}\Z"))
def test_a_sibling_is_read_as_it_was_written(digest: bytes, name: str) -> None:
    assert parse_sibling(sibling_bytes(digest.hex(), name)) == digest.hex()


@given(st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=150)
def test_another_byte_anywhere_in_a_sibling_is_another_digest_or_no_sibling(position: int, byte: int) -> None:
    """The name is for `sha256sum`; what proves the bundle is the digest."""
    spelled = sibling_bytes("a1" * 32, "bundle.tar.zst")
    position %= len(spelled)
    changed = spelled[:position] + bytes([byte]) + spelled[position + 1 :]
    if changed == spelled:
        return
    try:
        digest = parse_sibling(changed)
    except SiblingMismatch:
        return
    assert sibling_bytes(digest, changed[66:-1].decode()) == changed
    assert (digest != "a1" * 32) == (position < 64)


@given(st.text(max_size=30))
def test_a_name_is_written_into_a_sibling_only_if_it_can_be_read_there(name: str) -> None:
    try:
        data = sibling_bytes("0" * 64, name)
    except ValueError:
        return
    assert parse_sibling(data) == "0" * 64
    assert data.split(b"  ", 1)[1] == name.encode() + b"\n"


def test_a_surrogate_has_no_form() -> None:
    with pytest.raises(ValueError):
        canonical({"\ud800": 1})
