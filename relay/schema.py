"""Schemas of published events: JSON Schema, Draft 2020-12, of their `data`.

Nothing is ever fetched for one, and none can take long: it refers to nothing but its own `$defs`, not in
circles, and is not large with all that it refers to; its patterns are matched in a time that grows with the
text only.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jsonschema_rs import Draft202012Validator, RegexOptions, ValidationError

from relay.body import compact, parse

LARGEST = 16 * 1024
MOST_PARTS, MOST_PATTERNS = 300, 20
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LOCAL = "#/$defs/"
# They would let a part be named in ways that cannot be followed here.
_REFUSED = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor")
_REGEX = RegexOptions(size_limit=64 * 1024, dfa_size_limit=64 * 1024)


def checked(schema: Mapping[str, Any]) -> str:
    """The schema as it is stored. Raises ValueError that says what is wrong with it, and where."""
    text = compact(schema)
    if len(text) > LARGEST:
        raise ValueError(f"may be {LARGEST} bytes of JSON at most")
    if str(schema.get("$schema", DIALECT)).rstrip("#") != DIALECT:
        raise ValueError(f"$schema: must be {DIALECT}")
    defs = schema.get("$defs", {})
    try:
        parts = _Size(defs if isinstance(defs, Mapping) else {}).of(schema)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if parts > MOST_PARTS:
        raise ValueError(f"has more than {MOST_PARTS} parts, counted again wherever $ref names them")
    if text.count(b'"pattern') > MOST_PATTERNS:
        raise ValueError(f"has more than {MOST_PATTERNS} patterns")
    try:
        _validator(text)
    except ValidationError as error:
        where = ".".join(map(str, error.instance_path))
        raise ValueError(f"{where}: {error.message}" if where else error.message) from error
    return text.decode()


def complaint(schema: str, data: Mapping[str, Any]) -> tuple[str, str] | None:
    """Where the data does not fit a schema (`.order.id`), and why; None when it does."""
    validator = _validator(schema.encode())
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


class _Size:
    """How many parts a schema has, with whatever it refers to in every place where it does."""

    def __init__(self, defs: Mapping[str, Any]) -> None:
        self._defs, self._sizes = defs, dict[str, int | None]()

    def of(self, part: Any) -> int:
        """Raises ValueError for a part that leads anywhere else, or back to itself."""
        if isinstance(part, list):
            return sum(map(self.of, part))
        if not isinstance(part, Mapping):
            return 0
        # Where it is no text, it stands for a property of that name.
        for name in _REFUSED:
            if isinstance(part.get(name), str):
                raise ValueError(f"{name}: is not taken here")
        reference = part.get("$ref")
        named = self._named(reference) if isinstance(reference, str) else 0
        return 1 + named + sum(map(self.of, part.values()))

    def _named(self, reference: str) -> int:
        name = reference.removeprefix(_LOCAL)
        if not reference.startswith(_LOCAL) or name not in self._defs:
            raise ValueError(f"$ref: {reference!r} is none of its own, {_LOCAL}…")
        if name not in self._sizes:
            self._sizes[name] = None
            self._sizes[name] = self.of(self._defs[name])
        size = self._sizes[name]
        if size is None:
            raise ValueError(f"$ref: {reference!r} leads back to itself")
        return size
