"""The seal covers all that a manifest says, in the one form of RFC 8785; and JSON from outside is plain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from daemon.bundle.seal import canonical, parse_json, seal_of
from daemon.errors import BrokenSeal, MalformedBundle
from tests.property.crafted import Draft, draft, jcs, seal_over, to_json
from tests.property.honest import Piece, read, seal
from tests.property.sandbox import Sandbox

# --- the canonical form ---------------------------------------------------------------------------


def test_the_canonical_form_is_that_of_rfc_8785() -> None:
    """Section 3.2.3's example of sorting, and strings of 3.2.2.2."""
    value = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    assert list(json.loads(canonical(value)).values()) == [
        "Carriage Return",
        "One",
        "Control",
        "Latin Small Letter O With Diaeresis",
        "Euro Sign",
        "Emoji: Grinning Face",
        "Hebrew Letter Dalet With Dagesh",
    ]
    assert canonical({"s": '\u20ac$\u000f\nA\'B"\\\\"/\u007f'}) == (
        '{"s":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/\u007f"}'.encode()
    )


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"b": [1, {"d": None, "c": [True, False]}, []], "a": {}},
        {"numbers": [0, -1, (1 << 53) - 1, -((1 << 53) - 1)]},
        {"controls": "".join(map(chr, range(0x30)))},
        {"\uffff": 1, "\U00010000": 2, "\ud7ff": 3, "\ue000": 4},
        {"nested": {"\uffff": {"\U0010ffff": 1, "\ufffe": 2}}},
    ],
    ids=["empty", "nested", "numbers", "controls", "astral keys", "astral keys below"],
)
def test_the_canonical_form_equals_an_independent_one(value: dict[str, Any]) -> None:
    assert canonical(value) == jcs(value)


@pytest.mark.parametrize(
    "value", [1 << 53, -(1 << 53), "\ud800", {"\udfff": 1}, [{"x": [1 << 60]}]], ids=repr
)
def test_what_the_form_cannot_hold_is_no_value(value: object) -> None:
    with pytest.raises(ValueError):
        seal_of({"value": value})


# --- the seal -------------------------------------------------------------------------------------


def test_the_seal_is_over_everything_but_itself() -> None:
    manifest = {"a": 1, "seal": "whatever", "nested": {"seal": "counts"}}
    rest = b'{"a":1,"nested":{"seal":"counts"}}'
    assert seal_of(manifest) == "sha256:" + hashlib.sha256(rest).hexdigest()


def test_the_seal_of_a_written_bundle_can_be_computed_by_anybody() -> None:
    sealed = seal([Piece("files/caf\u00e9 \U0001f9e0", b"x")], label="\u20ac and \ufb33 and \U0001f600")
    manifest = sealed.manifest.model_dump(mode="json")
    assert manifest["seal"] == seal_over(manifest)


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.pop(name)


def _another(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["artifacts"][0].update({name: "0"})


def _changes() -> dict[str, Callable[[dict[str, Any]], object]]:
    """A change of every field, down to an artifact's, and a field more and less."""
    fields = draft().manifest
    changes = {f"without {name}": _without(name) for name in fields}
    changes |= {f"artifact: {name}": _another(name) for name in fields["artifacts"][0]}
    return changes | {
        "another label": lambda m: m.update(label="another"),
        "a later time": lambda m: m.update(created_at_ms=m["created_at_ms"] + 1),
        "incomplete": lambda m: m.update(complete=False),
        "another consistency": lambda m: m["consistency"].update(level="per_source"),
        "one artifact less": lambda m: m.update(artifacts=[]),
        "something new": lambda m: m.update(note="x"),
        "the same as text": lambda m: m.update(created_at_ms=str(m["created_at_ms"])),
        "another seal": lambda m: m.update(seal="sha256:" + "0" * 64),
        "a seal in capitals": lambda m: m.update(seal="sha256:" + m["seal"][7:].upper()),
        "a seal without its name": lambda m: m.update(seal=m["seal"][7:]),
        "no seal": lambda m: m.pop("seal"),
        "null for a seal": lambda m: m.update(seal=None),
    }


@pytest.mark.parametrize("change", _changes().values(), ids=_changes().keys())
def test_any_change_breaks_it(change: Callable[[dict[str, Any]], object], sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.manifest["seal"] = seal_over(bundle.manifest)
    change(bundle.manifest)
    bundle.reseal = False
    expected = MalformedBundle if "manifest_version" not in bundle.manifest else BrokenSeal
    sandbox.assert_refused(bundle.build(), expected)


def test_it_is_over_what_the_json_says_and_not_over_how_it_is_written() -> None:
    bundle = draft()
    sealed = {**bundle.manifest, "seal": seal_over(bundle.manifest)}
    bundle.manifest_json = json.dumps(dict(reversed(sealed.items())), indent=7, ensure_ascii=True).encode()
    read(bundle.build())


def test_fields_of_a_later_revision_are_passed_over_and_sealed_all_the_same() -> None:
    bundle = draft()
    bundle.manifest["mood"] = {"today": ["cheerful", 7, True, None]}
    bundle.header["mood"] = "cheerful"
    read(bundle.build())

    sealed = to_json({**bundle.manifest, "seal": seal_over(bundle.manifest)})
    bundle.manifest_json = sealed.replace(b"cheerful", b"gloomful")
    with pytest.raises(BrokenSeal):
        read(bundle.build())


def test_whoever_seals_a_change_anew_is_believed_as_far_as_the_seal_goes() -> None:
    """It is no signature: it shows that something changed; the sibling shows that it is another bundle."""
    bundle = draft()
    bundle.manifest["label"] = "trust me"
    assert read(bundle.build())[0].manifest.label == "trust me"


# --- JSON from outside ----------------------------------------------------------------------------


def _nested(depth: int) -> bytes:
    return b'{"x":' + b"[" * depth + b"]" * depth + b"}"


BAD_JSON: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"7",
    "half an object": b'{"format": "agentkeep-bundle"',
    "two objects": b"{}{}",
    "bytes that are not UTF-8": b'{"label": "\xff"}',
    "UTF-16": '{"format": "agentkeep-bundle"}'.encode("utf-16"),
    "UTF-32": '{"format": "agentkeep-bundle"}'.encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a surrogate in UTF-8": b'{"label": "\xed\xa0\x80"}',
    "a fraction": b'{"version": 1.5}',
    "a whole fraction": b'{"version": 1.0}',
    "an exponent": b'{"version": 1e3}',
    "NaN": b'{"version": NaN}',
    "infinity": b'{"version": Infinity}',
    "minus infinity, deep": b'{"a": [{"b": -Infinity}]}',
    "a number without end": b'{"version": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"version": 1, "version": 1}',
    "a key twice, deep": b'{"a": [{"b": 1, "b": 2}]}',
    "a key twice, once escaped": b'{"version": 1, "\\u0076ersion": 2}',
    "a depth of a million": _nested(1_000_000),
}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_is_not_plain_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedBundle, match=r"manifest\.json is not"):
        parse_json(data, "manifest.json")


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("document", ["header_json", "manifest_json"])
def test_a_bundle_with_such_a_document_is_refused(document: str, data: bytes, sandbox: Sandbox) -> None:
    bundle = draft()
    setattr(bundle, document, data)
    sandbox.assert_refused(bundle.build(), MalformedBundle)


@pytest.mark.parametrize(
    "extra",
    [
        b'"x": "\\ud800"',
        b'"\\udc00": 1',
        b'"x": 9007199254740992',
        *(b'"x": ' + b"[" * depth + b"]" * depth for depth in (300, 450, 600, 900, 1200)),
    ],
    ids=["a lone surrogate", "a lone surrogate as a key", "2^53", *["300", "450", "600", "900", "1200"]],
)
@pytest.mark.parametrize("document", ["header", "manifest"])
def test_extremes_in_fields_that_nobody_reads_are_never_a_crash(document: str, extra: bytes) -> None:
    """In the manifest they cannot be sealed (or are not sealed truly); in the header they are passed over
    or refused, which may depend on the interpreter's depth."""
    bundle = draft()
    sound = {"header": bundle.header, "manifest": {**bundle.manifest, "seal": "sha256:" + "0" * 64}}
    setattr(bundle, f"{document}_json", to_json(sound[document])[:-1] + b", " + extra + b"}")
    if document == "manifest":
        with pytest.raises(MalformedBundle):
            read(bundle.build())
        return
    try:
        _, received = read(bundle.build())
    except MalformedBundle:
        return
    assert received == {"files/notes.txt": b"remember the milk\n"}


def _twice(bundle: Draft, document: str, key: str) -> bytes:
    """The document with one of its keys a second time, saying the same."""
    bundle.manifest["seal"] = seal_over(bundle.manifest)
    fields = getattr(bundle, document)
    return to_json(fields)[:-1] + b", " + to_json({key: fields[key]})[1:]


@pytest.mark.parametrize(
    ("document", "key"), [("header", "tenant"), ("manifest", "label"), ("manifest", "seal")]
)
def test_a_key_that_stands_twice_is_refused_even_if_both_say_the_same(
    document: str, key: str, sandbox: Sandbox
) -> None:
    bundle = draft()
    setattr(bundle, f"{document}_json", _twice(bundle, document, key))
    sandbox.assert_refused(bundle.build(), MalformedBundle)


def test_a_header_of_65_kib_is_refused(sandbox: Sandbox) -> None:
    bundle = draft()
    bundle.header["x"] = "x" * (65 << 10)
    sandbox.assert_refused(bundle.build(), MalformedBundle)
