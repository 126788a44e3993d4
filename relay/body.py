"""Bytes to JSON and back, and text: what Relay accepts from strangers, and what it signs and sends."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, to_json

from relay.errors import Malformed

DEPTH = 100
# What does not fit into a double, many a receiver cannot read.
DIGITS = 300


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number in it is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > DIGITS:
        raise ValueError(f"an integer in it has more than {DIGITS} digits")
    return int(digits)


def parse(data: bytes) -> Any:
    """The JSON value in `data`. Raises Malformed for anything else: bad UTF-8, a byte order mark, NaN,
    numbers too large for a double, nesting deeper than DEPTH. Of members with the same name the last one
    counts.

    What it returns, `compact` writes and `parse` reads again; both in a time that grows with the length only.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite, parse_int=_whole
        )
    except UnicodeDecodeError as error:
        raise Malformed("the body is not UTF-8") from error
    except RecursionError as error:
        raise Malformed(f"the JSON is nested deeper than {DEPTH} levels") from error
    except ValueError as error:
        raise Malformed(f"the body is not JSON: {error}") from error
    # The nesting is at most the number of brackets: nearly every body is passed without a walk.
    if data.count(b"{") + data.count(b"[") > DEPTH and _deeper_than(value, DEPTH):
        raise Malformed(f"the JSON is nested deeper than {DEPTH} levels")
    return value


def compact(value: Any) -> bytes:
    """The value, or the pydantic model, as compact UTF-8 JSON, which every verifier can decode: a lone
    surrogate becomes `?`."""
    try:
        return to_json(value)
    except PydanticSerializationError:
        plain = value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def portions(ids: Sequence[str], sizes: Mapping[str, int], most: int) -> Iterator[Sequence[str]]:
    """The ids in their order, so many at once that their bodies have `most` bytes together; one that has more
    by itself."""
    portion, size = list[str](), 0
    for id_ in ids:
        if portion and size + sizes[id_] > most:
            yield portion
            portion, size = [], 0
        portion.append(id_)
        size += sizes[id_]
    if portion:
        yield portion


def storable(text: str) -> str:
    """The text as every database takes it: U+0000 and lone surrogates become U+FFFD."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return True
