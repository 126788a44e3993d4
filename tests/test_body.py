"""JSON in and out."""

import json
import math
import time
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.body import DEPTH, DIGITS, compact, parse, storable
from relay.errors import Malformed
from tests.nasty import JSON_TEXT

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
        b"[1e999]", b"[-1e999]", b"\x00", b"\xef\xbb\xbf{}", b"\xfe\xff\x00{\x00}", b"1" * (DIGITS + 1),
        b'{"a": -%s}' % (b"9" * (DIGITS + 1)), b"9" * DIGITS + b"e99", b"01", b"+1", b".5", b"0x1F",
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


@given(JSON_TEXT)
def test_what_is_accepted_is_written_and_read_again_as_the_same(text):
    try:
        value = parse(text.encode())
    except Malformed:
        return
    written = compact(value)
    assert compact(parse(written)) == written


def test_the_largest_integers_are_kept_as_they_are_and_fit_into_a_double():
    for digits in (b"9" * DIGITS, b"-" + b"9" * DIGITS):
        assert compact(parse(digits)) == digits
        assert math.isfinite(float(parse(digits)))


def test_of_members_with_the_same_name_the_last_one_counts():
    assert parse(b'{"a": 1, "b": 2, "\\u0061": 3}') == {"a": 3, "b": 2}


@pytest.mark.parametrize("complaint", [b"1" * 100_000 + b"e999", b"9" * 100_000, b'{"a": ' + b"x" * 100_000])
def test_a_complaint_is_short_however_long_the_body_is(complaint):
    with pytest.raises(Malformed) as refused:
        parse(complaint)
    assert len(str(refused.value)) < 200


MIB = 1024 * 1024
LONGEST = {
    "one float": b"0." + b"3" * MIB,
    "one exponent": b"1e-" + b"9" * MIB,
    "one integer": b"9" * MIB,
    "long integers": b"[" + b",".join([b"-" + b"9" * DIGITS] * (MIB // (DIGITS + 2))) + b"]",
    "short integers": b"[" + b",".join([b"1"] * (MIB // 2)) + b"]",
    "floats": b"[" + b",".join([b"1.5"] * (MIB // 4)) + b"]",
    "surrogates": b"[" + b",".join([b'"\\ud800"'] * (MIB // 9)) + b"]",
    "escapes": b'"' + b"\\u0000" * (MIB // 6) + b'"',
    "objects": b"[" + b",".join([b"{}"] * (MIB // 3)) + b"]",
    "one member": b"{" + b",".join([b'"a":1'] * (MIB // 6)) + b"}",
    "members": b"{" + b",".join([b'"%d":1' % number for number in range(MIB // 12)]) + b"}",
    "an open string": b'"' + b"a" * MIB,
    "backslashes": b'"' + b"\\" * MIB,
    "blanks": b" " * MIB + b"1",
    "wide and deep": b"[" * 90 + b",".join([b"[[[]]]"] * (MIB // 7)) + b"]" * 90,
}


@pytest.mark.parametrize("data", LONGEST.values(), ids=LONGEST)
def test_no_mebibyte_takes_long(tidy, data):
    begun = time.process_time()
    with suppress(Malformed):
        compact(parse(data))
    assert time.process_time() - begun < 1
