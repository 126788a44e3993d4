"""So many a second, and some at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.limit import Limit

START = 1_790_000_000_000
RATES = st.sampled_from([0.01, 0.3, 1, 3, 7.5, 10, 100, 999, 12_345])
PAUSES = st.lists(
    st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 5_000), st.integers(0, 10**9)), max_size=120
)


@given(RATES, st.integers(1, 20), PAUSES)
def test_in_any_window_no_more_is_let_in_than_the_burst_and_the_rate(rate, burst, pauses):
    limit, now, let_in = Limit(rate, burst), START, []
    for pause in pauses:
        now += pause
        if limit.take("key", now) == 0:
            let_in.append(now)
    for first, since in enumerate(let_in):
        for last, until in enumerate(let_in[first:], first):
            assert last - first + 1 <= burst + rate * (until - since) / 1000


@given(RATES, st.integers(1, 20), PAUSES)
def test_who_waits_as_long_as_was_said_is_let_in_and_not_sooner(rate, burst, pauses):
    limit, now = Limit(rate, burst), START
    for pause in pauses:
        now += pause
        wait = limit.take("key", now)
        if wait:
            assert limit.take("key", now + wait - 1) > 0
            now += wait
            assert limit.take("key", now) == 0


@given(RATES, st.integers(1, 20))
def test_who_was_quiet_for_long_enough_has_the_whole_burst_again(rate, burst):
    limit, now = Limit(rate, burst), START
    for _ in range(3):
        assert [limit.take("key", now) for _ in range(burst)] == [0] * burst
        assert limit.take("key", now) > 0
        now += round(burst * 1000 / rate) + 1


@given(RATES, st.integers(1, 20), PAUSES, st.integers(0, 10**12))
def test_a_clock_that_is_set_back_locks_nobody_out_and_gives_nothing_away(rate, burst, pauses, back):
    limit, now = Limit(rate, burst), START
    for pause in pauses:
        now += pause
        limit.take("key", now)
    while limit.take("key", now) == 0:
        pass
    now -= back
    wait = limit.take("key", now)
    assert 0 < wait <= 1000 / rate + 1 or (wait == 0 and back == 0)
    assert limit.take("key", now + wait) == 0


def test_each_key_has_its_own():
    limit = Limit(1, 2)
    assert [limit.take(key, START) for key in ("a", "a", "a", "b", "b", ("a", 1))] == [0, 0, 1000, 0, 0, 0]


def test_what_is_refused_is_not_counted():
    limit = Limit(1, 1)
    assert limit.take("key", START) == 0
    assert {limit.take("key", START + at) for at in range(0, 1000, 10)} == set(range(10, 1010, 10))
    assert limit.take("key", START + 1000) == 0


def test_it_remembers_no_more_keys_than_it_may():
    limit = Limit(1, 1, most_keys=100)
    for number in range(5000):
        assert limit.take(number, START) == 0
        assert len(limit._whole) <= 100


def test_keys_that_are_whole_again_are_forgotten_first():
    limit = Limit(1, 1, most_keys=10)
    for number in range(9):
        limit.take(f"old {number}", START)
    limit.take("used", START + 1500)
    for number in range(8):
        assert limit.take(f"new {number}", START + 1500) == 0
    assert limit.take("used", START + 1500) == 1000


def test_after_the_clock_was_set_back_the_keys_of_before_make_room_as_well():
    limit = Limit(1, 1, most_keys=10)
    for number in range(10):
        limit.take(f"before {number}", START + 10**9)
    limit.take("new", START)  # what is from before looks as if it were just used up
    for number in range(8):
        limit.take(f"new {number}", START + 1001)
    assert not [key for key in limit._whole if key.startswith("before")]


@pytest.mark.parametrize("given", [(0, 1), (-1, 1), (1, 0)])
def test_a_limit_that_lets_nothing_in_is_refused(given):
    with pytest.raises(ValueError, match="lets something in"):
        Limit(*given)
