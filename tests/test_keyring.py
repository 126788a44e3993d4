"""Secrets at rest: what is sealed opens only where, and with what, it was sealed."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import SealBroken
from relay.keyring import KeyRing, sealed_with

OLD, NEW = "an old secret key of the tests, long", "a new secret key of the tests, long"
RING = KeyRing([NEW])
PLACE = ("endpoints", "secrets", "ep_1", "acme")
texts = st.text(st.characters(blacklist_categories=["Cs"]))
names = st.text("abcdefgh_-.", max_size=8)


@given(texts, st.tuples(names, names, names, names))
def test_what_is_sealed_opens_at_its_place(text, place):
    assert RING.open(RING.seal(text, *place), *place) == text


@given(texts, st.lists(st.tuples(names, names, names, names), min_size=2, max_size=2, unique=True))
def test_what_is_moved_to_another_place_does_not_open(text, places):
    here, there = places
    with pytest.raises(SealBroken, match="moved"):
        RING.open(RING.seal(text, *here), *there)


@given(texts, st.data())
def test_what_is_changed_anywhere_does_not_open(text, data):
    sealed = RING.seal(text, *PLACE)
    at = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.sampled_from("ABab01-_.="))
    changed = sealed[:at] + other + sealed[at + 1 :]
    if changed == sealed:
        return
    # The last character of unpadded base64 may hold bits that say nothing.
    try:
        assert RING.open(changed, *PLACE) == text
        assert at >= len(sealed.rstrip("=")) - 1
    except SealBroken:
        pass


@given(texts)
def test_the_same_text_is_never_sealed_to_the_same_twice_and_is_not_in_it(text):
    one, other = RING.seal(text, *PLACE), RING.seal(text, *PLACE)
    assert one != other
    assert len(text) < 4 or text not in one


def test_a_ring_seals_with_its_newest_key_and_opens_with_any():
    before = KeyRing([OLD]).seal("x", *PLACE)
    ring = KeyRing([NEW, OLD])
    assert ring.open(before, *PLACE) == "x"
    after = ring.seal("x", *PLACE)
    assert (sealed_with(before), sealed_with(after)) == (KeyRing([OLD]).newest, ring.newest)
    assert KeyRing([NEW]).open(after, *PLACE) == "x"
    with pytest.raises(SealBroken, match="previous_secret_keys"):
        KeyRing([NEW]).open(before, *PLACE)


def test_the_id_of_a_key_does_not_hold_the_key():
    assert KeyRing([NEW]).newest not in NEW
    assert KeyRing([NEW]).newest != KeyRing([OLD]).newest


@pytest.mark.parametrize(
    "text", ["", "whsec_in_clear", "v1.only", "v2.abc.def", "v1.aaaaaaaa.!!", "v1.a.b.c"]
)
def test_what_was_not_sealed_does_not_open(text):
    with pytest.raises(SealBroken):
        RING.open(text, *PLACE)


def test_a_fingerprint_is_made_with_a_key_and_with_every_one_that_is_known():
    [old], [new] = KeyRing([OLD]).fingerprints(b"x"), KeyRing([NEW]).fingerprints(b"x")
    assert KeyRing([NEW, OLD]).fingerprints(b"x") == [new, old]
    assert len({old, new, *RING.fingerprints(b"y")}) == 3


def test_what_is_long_is_not_kept_once_it_was_opened():
    ring, long = KeyRing([NEW]), "a credential of somebody's choice" * 1000
    tracemalloc.start()
    try:
        for number in range(100):
            assert ring.open(ring.seal(f"{long}{number}", *PLACE), *PLACE) == f"{long}{number}"
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 10 * len(long)
