"""When a callback has its generation asked about."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.generation import Generation, Status
from relay.hints import LONGEST_WAIT, Turns, ask_at, hint_asks, pause

SECOND, MINUTE, NOW = 1_000, 60_000, 1_000_000_000
WATCHED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.PROCESSING,
    created_at=NOW, deadline_at=NOW + 30 * MINUTE, due_at=NOW + 10 * MINUTE,
)  # fmt: skip


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
    assert pause(callbacks) == seconds * SECOND


@pytest.mark.parametrize(("callbacks", "begin"), [(1, 0), (2, 1), (5, 4), (6, 4), (10_000, 4)])
def test_each_callback_brings_fewer_quick_asks_than_the_one_before(callbacks, begin):
    assert hint_asks(callbacks) == begin


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({}, 0),
        ({"due_at": None}, 0),
        ({"hints": 100}, 0),  # never asked: it waits for nothing
        ({"asked_at": NOW - 100}, 900),
        ({"asked_at": NOW - 100, "hints": 2}, 9 * SECOND - 100),
        ({"asked_at": NOW - 61 * SECOND, "hints": 100}, 0),
        ({"asked_at": NOW, "hints": 2, "due_at": NOW + 5 * SECOND}, 5 * SECOND),  # planned sooner anyway
        ({"due_at": NOW - 5}, -5),
        ({"lease": "lease", "due_at": NOW + 7}, 7),
    ],
)
def test_a_callback_has_it_asked_after_its_pause_but_never_later_than_planned(fields, at):
    assert ask_at(replace(WATCHED, **fields), None, now=NOW) == NOW + at


def test_only_what_is_asked_sooner_because_of_a_callback_takes_a_turn():
    turns = Turns(2)
    for fields in ({"lease": "lease"}, {"due_at": NOW}, {"asked_at": NOW, "due_at": NOW + SECOND}):
        ask_at(replace(WATCHED, **fields), turns, now=NOW)
    assert ask_at(WATCHED, turns, now=NOW) == NOW
    assert ask_at(WATCHED, turns, now=NOW) == NOW + MINUTE
    assert ask_at(replace(WATCHED, due_at=NOW + MINUTE), turns, now=NOW) == NOW + MINUTE
    assert ask_at(WATCHED, turns, now=NOW) == NOW + 2 * MINUTE
