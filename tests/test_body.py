"""JSON in and out."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.body import DEPTH, compact, parse, storable
from relay.errors import Malformed

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)


def nested(depth: int, opening: bytes, inmost: bytes, closing: bytes) -> bytes:
    return opening * depth + inmost + closing * depth


@given(JSON)
def test_what_is_written_is_read_again(value):
    assert parse(compact(value)) == value


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"{", b"[1,]", b"{'a': 1}", b"<html></html>", b"nul", b'{"a": 1} x', b'"\x01"', b'"\xff"',
        b"\xff\xfe{\x00}\x00", b'"\xed\xa0\x80"', b"NaN", b"[Infinity]", b'{"a": -Infinity}', b"1" * 100_000,
        b"[1e999]", b"[-1e999]", b"\x00",
    ],
)  # fmt: skip
def test_what_is_not_json_is_malformed(data):
    with pytest.raises(Malformed):
        parse(data)


@pytest.mark.parametrize("inmost", [b"", b"1"], ids=["empty", "full"])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'[{"a":', b"}]")], ids=["lists", "objects"])
def test_nesting_is_read_to_the_limit_and_not_below(opening, closing, inmost):
    levels = opening.count(b"[") + opening.count(b"{")
    inmost = inmost or (b"" if levels == 1 else b"[]")
    deepest = DEPTH // levels - (1 if inmost == b"[]" else 0)
    parse(nested(deepest, opening, inmost, closing))
    with pytest.raises(Malformed):
        parse(nested(deepest + 1, opening, inmost, closing))


@pytest.mark.parametrize("bomb", [b"[" * 1_000_000, b'{"a":' * 1_000_000, nested(100_000, b"[", b"", b"]")])
def test_a_depth_bomb_is_malformed(bomb):
    with pytest.raises(Malformed):
        parse(bomb)


def test_many_brackets_side_by_side_are_not_deep():
    value = [[{}] for _ in range(10 * DEPTH)]
    assert parse(json.dumps(value).encode()) == value


@given(st.binary())
@example(b'"\\ud800"')
@example(b'{"a": 1e999}')
def test_any_bytes_are_malformed_or_make_strict_json_again(data):
    try:
        value = parse(data)
    except Malformed:
        return
    parse(compact(value))


def test_it_is_written_compactly_and_not_escaped():
    assert compact({"a": [1, "é🐈"], "b": None}) == '{"a":[1,"é🐈"],"b":null}'.encode()


def test_text_is_stored_without_what_some_database_refuses():
    assert storable("a\0\ud800b\udfff") == "a\ufffd\ufffdb\ufffd"
    assert storable("\x01ä🏮\ufffd\U0010ffff") == "\x01ä🏮\ufffd\U0010ffff"


def test_a_lone_surrogate_becomes_a_question_mark():
    assert compact({"a\ud800": "\udfffb"}) == b'{"a?":"?b"}'
