"""What is wrong with a configuration, said with the place, the value and the nearest right one.

No secret is quoted: neither a value under a secret's key, nor one of a backend's options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from config.settings import ENVIRONMENT_PREFIX, Settings
from daemon.errors import ConfigError

Location = tuple[int | str, ...]
_SECRET_KEYS = {"secret_access_key", "session_token", "access_key_id", "options"}


def not_json(message: str) -> ConfigError:
    """What pydantic-settings says of a value, which names the section alone."""
    section = re.search(r'field "(\w+)"', message)
    prefix = ENVIRONMENT_PREFIX + (section[1].upper() if section else "")
    names = sorted(variable for variable in os.environ if variable.upper().startswith(prefix))
    return ConfigError(
        f"{' or '.join(names) or f'a variable or credential {prefix}...'} is not what it should be",
        hint="""lists and tables are written as JSON there: ["a", "b"] or {"key": "value"}""",
    )


def explain(path: Path, text: str, exc: ValidationError) -> list[str]:
    return [_complaint(path, text, error) for error in exc.errors(include_url=False)]


def _complaint(path: Path, text: str, error: Any) -> str:
    location: Location = error["loc"]
    key = ".".join(str(part) for part in location if part != "[key]")
    where = at(path, text, location)
    if error["type"] == "extra_forbidden":
        return f"{where}unknown key {key!r}{nearest(str(location[-1]), _known_keys(location[:-1]))}"
    if error["type"] == "missing":
        return f"{where}{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"valid dictionary( or instance of \w+)?", "table", message).replace(
        "valid tuple", "list"
    )
    value = error.get("input")
    is_plain = isinstance(value, str | int | float | bool) and _may_be_shown(location)
    shown = f", not {value!r}" if is_plain and repr(value) not in message else ""
    return f"{where}{key}: {message[:1].lower()}{message[1:]}{shown}"


def _may_be_shown(location: Location) -> bool:
    """Of a destination only single values, those that are no secret: a whole one may hold some."""
    return location[0] != "destinations" or (len(location) == 3 and location[2] not in _SECRET_KEYS)


def _known_keys(location: Location) -> list[str]:
    """The keys that may stand at a place of the configuration."""
    model: Any = Settings
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field else None
        elif getattr(model, "__origin__", None) is dict:
            model = model.__args__[1]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_there(path: Path) -> bool:
    """Also false where this user may not look."""
    try:
        return path.exists()
    except PermissionError:
        return False


def nearest_path(path: Path) -> str:
    """Where a path goes wrong first, the name there that is most like it."""
    missing = path
    while not is_there(missing.parent):
        missing = missing.parent
    try:
        near = get_close_matches(missing.name, [entry.name for entry in missing.parent.iterdir()], n=1)
    except OSError:  # not for us to look into
        near = []
    if not near:
        return f"; {missing.parent} is there" if missing != path else ""
    whole = missing.parent / near[0] / path.relative_to(missing)
    return f"; did you mean {str(whole if is_there(whole) else missing.parent / near[0])!r}?"


def at(path: Path, text: str, location: Location) -> str:
    """`FILE, line N: `, the line being the deepest part of the location that the file spells out."""
    keys = [str(part) for part in location if not isinstance(part, int) and part != "[key]"]
    variable = ENVIRONMENT_PREFIX + "__".join(keys).upper()
    if variable in os.environ:
        return f"environment {variable}: "
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / variable
    if len(keys) > 1 and credential.is_file():
        return f"credential {variable}: "
    line = _line_of(text, keys)
    return f"{path}, line {line}: " if line else f"{path}: "


_PART = r"""(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEYS = rf"({_PART}(?:\s*\.\s*{_PART})*)"
_HEADER = re.compile(rf"\s*\[\[?\s*{_KEYS}\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*{_KEYS}\s*=")


def _line_of(text: str, keys: list[str]) -> int | None:
    best: tuple[int, int] | None = None
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _dotted(header[1])
            spelled = table
        elif assignment := _ASSIGNMENT.match(line):
            spelled = table + _dotted(assignment[1])
        else:
            continue
        depth = min(len(spelled), len(keys))
        if spelled[:depth] == keys[:depth] and (best is None or depth > best[0]):
            best = (depth, number)
    return best[1] if best else None


def _dotted(text: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_PART, text)]
