"""Schemas of published events: JSON Schema, Draft 2020-12, of their `data`.

Nothing is ever fetched for one, and none can take long: it refers to nothing but its own `$defs`, not in
circles, and is not large with all that it refers to; its patterns are matched in a time that grows with the
text only; and it is not held against data that is too large for it. (A thread would not help: the validator
lets nobody else work meanwhile.)
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jsonschema_rs import Draft202012Validator, RegexOptions, ValidationError

from relay.body import compact, parse

LARGEST = 16 * 1024
MOST_PARTS, MOST_PATTERNS = 500, 20
# Parts of a schema times values of the data, at some 0.2 microseconds each when every value meets every part.
MOST_WORK = 500_000
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LOCAL = "#/$defs/"
# Names that a JSON Pointer in a URI leaves as they are.
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# They would let a part be named in ways that cannot be followed here.
_REFUSED = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor")
_AGAIN = ("unevaluatedItems", "unevaluatedProperties")
# Integers beyond are not exact in a double.
_EXACT = 2**53
_REGEX = RegexOptions(size_limit=64 * 1024, dfa_size_limit=64 * 1024)


def checked(schema: Mapping[str, Any]) -> str:
    """The schema as it is stored. Raises ValueError that says what is wrong with it, and where."""
    text = compact(schema)
    if len(text) > LARGEST:
        raise ValueError(f"may be {LARGEST} bytes of JSON at most")
    if str(schema.get("$schema", DIALECT)).rstrip("#") != DIALECT:
        raise ValueError(f"$schema: must be {DIALECT}")
    try:
        # As it will be read.
        parts, patterns = _parts(parse(text)), _patterns(schema)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if parts > MOST_PARTS:
        raise ValueError(
            f"has more than {MOST_PARTS} parts: every value in it, counted again wherever $ref names it"
            " and threefold beside unevaluatedItems or unevaluatedProperties"
        )
    if patterns > MOST_PATTERNS:
        raise ValueError(f"has more than {MOST_PATTERNS} patterns")
    try:
        _validator(text)
    except ValidationError as error:
        where = ".".join(map(str, error.instance_path))
        raise ValueError(f"{where}: {error.message}" if where else error.message) from error
    return text.decode()


def complaint(schema: str, data: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where the data does not fit a schema (`.order.id`), and why; None when it does."""
    text = schema.encode()
    validator, parts = _validator(text), _parts_of(text)
    if parts * (size := _size(data)) > MOST_WORK:
        most = MOST_WORK // parts
        return "", f"is too large for its type's schema, which has {parts} parts: {size} values of {most}"
    try:
        try:
            validator.validate(data)
        except UnicodeEncodeError:
            # A lone surrogate: as it will be sent.
            validator.validate(parse(compact(data)))
    except ValidationError as error:
        return "".join(f".{part}" for part in error.instance_path), error.message
    return None


@lru_cache(maxsize=64)
def _validator(text: bytes) -> Draft202012Validator:
    return Draft202012Validator(parse(text), offline=True, pattern_options=_REGEX, mask="it")


@lru_cache(maxsize=64)
def _parts_of(text: bytes) -> int:
    return _parts(parse(text))


def _parts(schema: Mapping[str, Any]) -> int:
    defs = schema.get("$defs", {})
    return _Size(defs if isinstance(defs, Mapping) else {}).of(schema)


def _patterns(part: Any) -> int:
    if isinstance(part, list):
        return sum(map(_patterns, part))
    if not isinstance(part, Mapping):
        return 0
    named = part.get("patternProperties")
    own = len(named) if isinstance(named, Mapping) else 0
    return own + isinstance(part.get("pattern"), str) + sum(map(_patterns, part.values()))


def _size(data: Any) -> int:
    """How many values there are, with names; long texts and large numbers are several."""
    size, waiting = 0, [data]
    while waiting:
        value = waiting.pop()
        size += 1
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            size += len(value) // 64
        elif isinstance(value, int | float) and not -_EXACT < value < _EXACT:
            # What multipleOf may take for one.
            size += 128
    return size


class _Size:
    """How many parts a schema has, with whatever it refers to in every place where it does."""

    def __init__(self, defs: Mapping[str, Any]) -> None:
        for name in defs:
            if not _NAME.fullmatch(name):
                raise ValueError(f"$defs: {name!r} must be of letters, digits and _ . - only")
        self._defs, self._sizes = defs, dict[str, int | None]()

    def of(self, part: Any) -> int:
        """Raises ValueError for a part that leads anywhere else, or back to itself."""
        if isinstance(part, list):
            return 1 + sum(map(self.of, part))
        if not isinstance(part, Mapping):
            return 1
        # Where it is no text, it stands for a property of that name.
        for name in _REFUSED:
            if isinstance(part.get(name), str):
                raise ValueError(f"{name}: is not taken here")
        reference = part.get("$ref")
        named = self._named(reference) if isinstance(reference, str) else 0
        size = 1 + named + sum(map(self.of, part.values()))
        # Reckoned exactly, which takes its time.
        size += 20 * isinstance(part.get("multipleOf"), float)
        # They look at everything beside them again, and so at what does so there.
        return 3 * size if any(name in part for name in _AGAIN) else size

    def _named(self, reference: str) -> int:
        name = reference.removeprefix(_LOCAL)
        if not reference.startswith(_LOCAL) or not _NAME.fullmatch(name) or name not in self._defs:
            raise ValueError(f"$ref: {reference!r} is none of its own, {_LOCAL}…")
        if name not in self._sizes:
            self._sizes[name] = None
            self._sizes[name] = self.of(self._defs[name])
        size = self._sizes[name]
        if size is None:
            raise ValueError(f"$ref: {reference!r} leads back to itself")
        return size
