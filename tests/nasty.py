"""JSON as strangers write it."""

import json
import math

from hypothesis import strategies as st

from relay.body import DIGITS

_ODD = "\0\x01\x7f\ud800\udbff\udc00\udfff\ufeff\ufffe\uffff\u2028\\\"'/"
_CHARACTERS = st.characters() | st.sampled_from(_ODD)
TEXT = st.text(_CHARACTERS, max_size=20)
_WHOLE = (
    st.integers()
    | st.integers(0, DIGITS + 2).map(lambda digits: 10**digits - 1)
    | st.sampled_from([2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**400, 10**4000])
)
_LEAVES = (
    st.none() | st.booleans() | _WHOLE | st.floats() | TEXT | st.sampled_from([1e308, 5e-324, -0.0, math.inf])
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=5)
# Escaped, so that lone surrogates and the rest arrive as bytes that are UTF-8; also NaN and Infinity.
JSON_TEXT = VALUES.map(json.dumps)
