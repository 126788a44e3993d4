"""What an API key looks like, and how it is known."""

import re
from dataclasses import replace

import pytest

from relay.key import Key, Scope, hash_of, id_of, new_key

NOW = 1_800_000_000_000
ID = "key_01KKVHBCB0Q2VBV3N8S0WZ6T1D"
TEXT = "rk_01KKVHBCB0Q2VBV3N8S0WZ6T1D_7GdXw0rPz1QkVb5nTf3yLc9sMa2eHu8jRi4oKp6tBvA"


def test_a_key_tells_its_id_and_has_more_chance_than_32_bytes():
    id_, text = new_key(NOW)
    match = re.fullmatch(r"rk_([0-9A-Z]{26})_([0-9A-Za-z]+)", text)
    assert match is not None
    assert id_ == f"key_{match[1]}" == id_of(text)
    assert 62 ** len(match[2]) >= 2**256


def test_keys_share_nothing_but_the_time():
    keys = [new_key(NOW) for _ in range(3000)]
    assert len({id_ for id_, _ in keys}) == len({text[-43:] for _, text in keys}) == 3000
    # Every letter stands at every place now and then.
    assert all(len(set(place)) == 62 for place in zip(*(text[-43:] for _, text in keys), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        *("", "rk_", "key", ID, TEXT[3:], TEXT[:-1], TEXT + "0", TEXT + "\n", " " + TEXT, TEXT[:-1] + "\0"),
        *(TEXT.upper(), TEXT.lower(), TEXT.replace("_", "-"), f"rk_{TEXT[30:]}", f"sk{TEXT[2:]}"),
        *(TEXT[:-1] + "ä", TEXT[:-1] + "٣", f"{TEXT[:5]}I{TEXT[6:]}"),
    ],
)
def test_what_is_no_key_has_no_id(text: str):
    assert id_of(TEXT) == ID
    assert id_of(text) is None


def test_a_key_is_its_whole_text_and_no_other():
    key = Key(ID, "default", None, (Scope.READ,), hash_of(TEXT), NOW)
    assert key.has(TEXT)
    assert TEXT not in repr(key)
    other = new_key(NOW)[1]
    for text in (other, f"{TEXT[:30]}{other[30:]}", f"{other[:30]}{TEXT[30:]}", TEXT[:-1], "", key.hash):
        assert not key.has(text)
    assert not replace(key, hash="").has("")
