"""How much an endpoint may be sent, for every course that its answers may take."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.breaker import Breaker
from relay.delivery import Answer, Code

NOW = 1_700_000_000_000
SECOND, MINUTE, DAY = 1_000, 60_000, 86_400_000
MOST = 8
UNWELL = [Code.TIMEOUT, Code.DNS, Code.CONNECT, Code.TLS, Code.DISCONNECTED, Code.BAD_RESPONSE]
THROTTLING = [429, 502, 503, 504]


def answer(
    status: int | None = None, code: Code | None = None, *, ms: int = 5, retry_after: int | None = None
) -> Answer:
    if status is not None and code is None and not 200 <= status <= 299:
        code = Code.REDIRECT if 300 <= status <= 399 else Code.HTTP_STATUS
    return Answer(started_at=NOW, duration_ms=ms, status=status, code=code, retry_after=retry_after)


OK, ERROR, TIMEOUT = answer(204), answer(500), answer(code=Code.TIMEOUT)


def after(
    breaker: Breaker, *answers: Answer, now: int = NOW, most: int = MOST, spread: float = 0.0
) -> Breaker:
    for one in answers:
        breaker = breaker.after(one, now=now, most=most, spread=spread)
    return breaker


def opened(times: int = 1) -> tuple[Breaker, int]:
    """A breaker that has opened so often in a row, and the end of its pause."""
    breaker = after(Breaker(), *[ERROR] * 5)
    for _ in range(times - 1):
        breaker = after(breaker, ERROR, now=breaker.paused_until)
    return breaker, breaker.paused_until


STATUSES = st.integers(100, 599) | st.sampled_from([200, 204, 404, 410, 500, *THROTTLING])
DURATIONS = st.integers(0, 20_000)
RETRY_AFTER = st.none() | st.integers(0, 3 * DAY)
ANSWERED = st.builds(answer, STATUSES, ms=DURATIONS, retry_after=RETRY_AFTER)
UNANSWERED = st.builds(lambda code, ms: answer(code=code, ms=ms), st.sampled_from(UNWELL), DURATIONS)
SPREADS = st.floats(0, 1, exclude_max=True)
# Failures come in rows, or nothing would ever open.
COURSES = st.lists(
    st.tuples(ANSWERED | UNANSWERED, st.integers(1, 6), st.integers(0, 20 * MINUTE), SPREADS), max_size=12
)


@given(COURSES, st.integers(1, 20))
def test_slots_are_none_while_paused_one_when_half_open_and_never_more_than_most(course, most):
    breaker, now = Breaker(), NOW
    for one, times, wait, spread in course:
        for _ in range(times):
            breaker = breaker.after(one, now=now, most=most, spread=spread)
            for at in (now, breaker.paused_until - 1, breaker.paused_until, now + wait):
                slots = breaker.slots(at, most)
                assert (slots == 0) == (at < breaker.paused_until)
                assert slots <= most
                if slots and breaker.trips:
                    assert slots == 1
                if breaker.latency is not None and breaker.latency > 5 * SECOND:
                    assert slots <= 2
        now += wait


@given(COURSES, st.integers(1, 20))
def test_a_pause_is_never_cut_short(course, most):
    breaker, now = Breaker(), NOW
    for one, times, wait, spread in course:
        for _ in range(times):
            before = breaker
            breaker = breaker.after(one, now=now, most=most, spread=spread)
            assert breaker.paused_until >= before.paused_until
        now += wait


# Opening.


@pytest.mark.parametrize(
    "ill",
    [*(answer(code=code) for code in UNWELL), *(answer(status) for status in (500, 501, 507, 599))],
    ids=lambda one: str(one.status or one.code),
)
def test_it_opens_at_the_fifth_failure_in_a_row(ill):
    breaker = Breaker()
    for _ in range(4):
        breaker = after(breaker, ill)
        assert breaker.slots(NOW, MOST) > 0
    assert after(breaker, ill).slots(NOW, MOST) == 0


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("at_once", [True, False])
def test_failures_that_throttle_open_it_too(status, at_once):
    breaker, now = Breaker(), NOW
    for _ in range(5):
        now = now if at_once else breaker.paused_until
        breaker = after(breaker, answer(status), now=now)
    assert breaker.paused_until - now == 30 * SECOND
    assert breaker.slots(breaker.paused_until, MOST) == 1


def test_opening_does_not_cut_a_retry_after_short():
    breaker = after(Breaker(), answer(503, retry_after=DAY), *[ERROR] * 8)
    assert breaker.paused_until == NOW + DAY


@pytest.mark.parametrize("status", [301, 400, 401, 404, 408, 410, 418, 422, 499])
def test_a_refusal_never_opens_it_and_ends_a_row_of_failures(status):
    breaker = after(Breaker(), *[answer(status)] * 50)
    assert breaker.slots(NOW, MOST) == MOST
    broken_row = [*[ERROR] * 4, answer(status), *[ERROR] * 4]
    assert after(Breaker(), *broken_row).slots(NOW, MOST) == MOST


@pytest.mark.parametrize("code", [Code.BLOCKED_ADDRESS, Code.INTERNAL])
def test_a_fault_of_our_own_side_never_opens_it(code):
    assert after(Breaker(), *[answer(code=code)] * 50).slots(NOW, MOST) == MOST


@given(st.lists(st.sampled_from([OK, ERROR, TIMEOUT, answer(404), answer(302)]), max_size=40))
def test_only_five_failures_in_a_row_open_it(answers):
    breaker, row = Breaker(), 0
    for one in answers:
        breaker = after(breaker, one)
        row = row + 1 if one in (ERROR, TIMEOUT) else 0
        if row == 5:
            assert breaker.slots(NOW, MOST) == 0
            return
        assert breaker.slots(NOW, MOST) > 0


def test_a_success_ends_a_row_of_failures():
    assert after(Breaker(), *[*[ERROR] * 4, OK] * 5).slots(NOW, MOST) == MOST


# Pauses.


def test_pauses_double_from_half_a_minute_to_a_quarter_of_an_hour():
    pauses, breaker, now = [], after(Breaker(), *[ERROR] * 5), NOW
    for _ in range(9):
        pauses.append((breaker.paused_until - now) // SECOND)
        now = breaker.paused_until
        breaker = after(breaker, ERROR, now=now)
    assert pauses == [30, 60, 120, 240, 480, 900, 900, 900, 900]


@given(SPREADS, st.integers(1, 60))
def test_a_pause_is_up_to_a_fifth_longer_and_never_shorter(spread, times):
    pause = min(30 * SECOND * 2 ** (times - 1), 15 * MINUTE)
    breaker, now = after(Breaker(), *[ERROR] * 5, spread=spread), NOW
    for _ in range(times - 1):
        now = breaker.paused_until
        breaker = after(breaker, ERROR, now=now, spread=spread)
    assert pause <= breaker.paused_until - now <= 1.2 * pause + 1


@given(st.lists(st.sampled_from([ERROR, TIMEOUT, *map(answer, THROTTLING[1:])]), min_size=1, max_size=20))
def test_a_late_failure_of_what_was_in_flight_when_it_opened_changes_nothing(late):
    breaker, until = opened()
    then = after(breaker, *late, now=NOW + SECOND)
    assert (then.paused_until, then.trips) == (until, breaker.trips)
    assert then.slots(until, MOST) == 1
    second = after(then, ERROR, now=until)
    assert second.paused_until - until == MINUTE


# Half-open, and after.


@pytest.mark.parametrize("times", [1, 2, 7])
def test_a_failed_probe_opens_it_for_longer_and_at_once(times):
    breaker, until = opened(times)
    assert breaker.slots(until, MOST) == 1
    again = after(breaker, TIMEOUT, now=until)
    assert again.slots(until, MOST) == 0
    assert again.paused_until - until == min(30 * SECOND * 2**times, 15 * MINUTE)


@pytest.mark.parametrize(
    ("most", "ramp"), [(8, [2, 4, 8, 8]), (100, [2, 4, 8, 16, 32, 64, 100]), (5, [2, 4, 5]), (1, [1, 1])]
)
def test_after_a_good_probe_twice_as_many_with_each_success(most, ramp):
    breaker, now = opened()
    seen = []
    for _ in ramp:
        breaker = after(breaker, OK, now=now, most=most)
        seen.append(breaker.slots(now, most))
    assert seen == ramp


def test_after_a_good_probe_it_takes_five_failures_again_and_the_first_pause_is_short_again():
    breaker, now = opened(times=4)
    breaker = after(breaker, OK, *[ERROR] * 4, now=now)
    assert breaker.slots(now, MOST) > 0
    breaker = after(breaker, ERROR, now=now)
    assert breaker.paused_until - now == 30 * SECOND


# Throttling.


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
@pytest.mark.parametrize(
    ("told", "pause"), [(2 * MINUTE, 2 * MINUTE), (DAY, DAY), (DAY + 1, DAY), (10**15, DAY)]
)
def test_retry_after_pauses_the_whole_endpoint_for_a_day_at_most(status, told, pause):
    breaker = after(Breaker(), answer(status, retry_after=told))
    assert breaker.slots(NOW + pause - 1, MOST) == 0
    assert breaker.slots(NOW + pause, MOST) == MOST


@pytest.mark.parametrize("status", THROTTLING)
def test_a_throttling_status_pauses_for_a_second_doubling_to_a_minute(status):
    breaker, now, pauses = Breaker(), NOW, []
    for _ in range(4):
        breaker = after(breaker, answer(status), now=now)
        pauses.append((breaker.paused_until - now) // SECOND)
        now = breaker.paused_until
    assert pauses == [1, 2, 4, 8]
    assert after(breaker, OK, answer(429), now=now).paused_until == now + SECOND


def test_many_429_never_pause_for_more_than_a_minute_and_a_fifth():
    breaker, now = Breaker(), NOW
    for _ in range(40):
        breaker = after(breaker, answer(429), now=now, spread=0.999)
        assert SECOND <= breaker.paused_until - now <= 72 * SECOND
        now = breaker.paused_until
    assert breaker.slots(now, MOST) == MOST


@pytest.mark.parametrize("status", THROTTLING)
def test_answers_that_were_in_flight_together_count_as_one(status):
    breaker = after(Breaker(), *[answer(status)] * 4)
    assert breaker.paused_until == NOW + SECOND


@pytest.mark.parametrize("status", [500, 501, 404])
def test_no_other_status_pauses_by_itself(status):
    assert after(Breaker(), answer(status)).slots(NOW, MOST) == MOST


@given(st.sampled_from([None, 0, 1, 999]))
def test_a_retry_after_that_is_short_does_not_shorten_a_pause(told):
    assert after(Breaker(), answer(503, retry_after=told)).paused_until >= NOW + SECOND


# Slow answers.


def latencies(milliseconds: Iterable[int]) -> Breaker:
    return after(Breaker(), *(answer(204, ms=ms) for ms in milliseconds))


@pytest.mark.parametrize(
    ("durations", "slots"),
    [
        ([5_000] * 20, MOST),
        ([5_001], 2),
        ([10, 10, 10, 15_000], MOST),
        ([10, *[15_000] * 2], 2),
        ([15_000, *[10] * 4], 2),
        ([15_000, *[10] * 6], MOST),
    ],
)
def test_two_slots_while_answers_take_more_than_five_seconds_on_the_average(durations, slots):
    assert latencies(durations).slots(NOW, MOST) == slots
    assert latencies(durations).slots(NOW, 1) == 1
