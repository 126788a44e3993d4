"""When a callback has its generation asked about."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.hints import LONGEST_WAIT, Turns, ask_at, hint_asks, pause

SECOND, MINUTE, NOW = 1_000, 60_000, 1_000_000_000


def taken(turns: Turns, *, now: int) -> int:
    turn = turns.first(now)
    turns.take(now)
    return turn


@pytest.mark.parametrize(("per_minute", "half"), [(None, 30), (1, 1), (2, 1), (3, 1), (60, 30), (601, 300)])
def test_half_of_an_accounts_requests_have_their_turn_at_once_and_the_others_after_them(per_minute, half):
    turns = Turns(per_minute)
    found = [taken(turns, now=NOW) for _ in range(half + 5)]
    assert found[:half] == [NOW] * half
    pause = 2 * MINUTE / (per_minute or 60)
    waits = [turn - NOW for turn in found[half:]]
    assert all(abs(wait - pause * place) <= 1 for place, wait in enumerate(waits, start=1))


@given(st.integers(1, 600), st.lists(st.integers(0, 5 * SECOND), max_size=200))
def test_turns_come_in_order_and_no_minute_has_more_than_all_requests(per_minute, pauses):
    turns, now, found = Turns(per_minute), NOW, []
    for one in pauses:
        now += one
        found.append(taken(turns, now=now))
        assert now <= found[-1] <= now + LONGEST_WAIT
    assert found == sorted(found)
    if found and found[-1] < now + LONGEST_WAIT:
        for first in found:
            assert sum(first <= turn < first + MINUTE for turn in found) <= max(2, per_minute + 1)


def test_looking_for_a_turn_takes_none():
    turns = Turns(2)
    assert [turns.first(NOW) for _ in range(3)] == [NOW] * 3


def test_a_clock_that_is_set_back_delays_a_turn_by_no_more_than_the_longest_wait():
    turns = Turns(2)
    turns.take(NOW + 60 * MINUTE)
    assert turns.first(NOW) <= NOW + LONGEST_WAIT


@pytest.mark.parametrize(("callbacks", "seconds"), [(1, 1), (2, 4), (3, 9), (7, 49), (8, 60), (10_000, 60)])
def test_the_pause_grows_with_the_callbacks_up_to_a_minute(callbacks, seconds):
    assert pause(callbacks, 0) == seconds * SECOND


@pytest.mark.parametrize(("callbacks", "seconds"), [(1, 10), (3, 10), (4, 16), (8, 60)])
def test_the_pause_is_never_shorter_than_the_provider_wants(callbacks, seconds):
    assert pause(callbacks, 10 * SECOND) == seconds * SECOND
    turns = Turns(None, 10 * SECOND)
    assert ask_at(None, NOW, callbacks, turns, now=NOW) == NOW + seconds * SECOND


@pytest.mark.parametrize(("callbacks", "begin"), [(1, 0), (2, 1), (5, 4), (6, 4), (10_000, 4)])
def test_each_callback_brings_fewer_quick_asks_than_the_one_before(callbacks, begin):
    assert hint_asks(callbacks) == begin


@pytest.mark.parametrize(
    ("planned", "asked_at", "callbacks", "at"),
    [
        (600, None, 1, 0),
        (None, None, 1, 0),
        (600, None, 100, 0),  # never asked: it waits for nothing
        (600, -0.1, 1, 0.9),
        (600, -0.1, 3, 8.9),
        (600, -61, 100, 0),
        (5, 0, 3, 5),  # planned sooner anyway
        (-5, None, 1, -5),
    ],
)
def test_a_callback_has_it_asked_after_its_pause_but_never_later_than_planned(
    planned, asked_at, callbacks, at
):
    assert ask_at(moment(planned), moment(asked_at), callbacks, None, now=NOW) == moment(at)


def moment(seconds: float | None) -> int | None:
    return NOW + round(seconds * SECOND) if seconds is not None else None


def test_only_what_is_asked_sooner_because_of_a_callback_takes_a_turn():
    turns = Turns(2)
    for planned, asked_at in ((NOW, None), (NOW + SECOND, NOW)):
        assert ask_at(planned, asked_at, 1, turns, now=NOW) == planned
    assert ask_at(NOW + 9 * MINUTE, None, 1, turns, now=NOW) == NOW
    assert ask_at(NOW + 9 * MINUTE, None, 1, turns, now=NOW) == NOW + MINUTE
    assert ask_at(NOW + MINUTE, None, 1, turns, now=NOW) == NOW + MINUTE
    assert ask_at(None, None, 1, turns, now=NOW) == NOW + 2 * MINUTE
