"""How many requests an account may make, whatever the clock does and the provider says."""

import json
from bisect import bisect_left
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.budget import Budget

NOW = 1_700_000_000_000
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000

PER_MINUTE = st.integers(1, 300)
PER_DAY = st.integers(1, 400)
BUDGETS = st.builds(Budget, st.none() | PER_MINUTE, st.none() | PER_DAY)
# Somebody wants so many requests; then time passes: as long as is told to wait, or anyhow.
STEPS = st.lists(
    st.tuples(st.integers(1, 40), st.none() | st.integers(0, 20 * SECOND) | st.integers(0, 30 * HOUR)),
    min_size=1,
    max_size=60,
)


def use(budget: Budget, wanted: int, now: int) -> int:
    """Takes as many as are wanted and may be had."""
    got = min(wanted, budget.available(now))
    for _ in range(got):
        budget.take(now)
    return got


def exhaust(budget: Budget, until: int, now: int = NOW) -> list[int]:
    """The times of all the requests that can be had until then."""
    times = []
    while now < until:
        times += [now] * use(budget, 10_000, now)
        now += budget.wait(now)
    return times


def most_within(times: list[int], span: int) -> int:
    """How many there are at most in a span that begins with one of them, its end not included."""
    return max(bisect_left(times, at + span) - k for k, at in enumerate(times))


# The limits.

# Nine tenths of the limit flow evenly, and a tenth of it can be had at once: 0.9 + 0.1 of it in any minute.


@given(PER_MINUTE, st.none() | PER_DAY, STEPS)
def test_no_minute_ever_sees_more_requests_than_its_limit(per_minute, per_day, steps):
    budget, now, times = Budget(per_minute, per_day), NOW, [NOW]
    budget.take(NOW)
    for wanted, passes in steps:
        times += [now] * use(budget, wanted, now)
        now += budget.wait(now) if passes is None else passes
    assert most_within(times, MINUTE) <= per_minute


@pytest.mark.parametrize("per_minute", [1, 5, 9, 10, 11, 60, 97, 1000])
@pytest.mark.parametrize("per_day", [None, 300, 2000])
def test_whoever_takes_all_that_can_be_had_stays_within_the_limit_of_each_minute(per_minute, per_day):
    times = exhaust(Budget(per_minute, per_day), NOW + HOUR)
    assert most_within(times, MINUTE) <= per_minute


@pytest.mark.parametrize("per_minute", [1, 5, 60, 1000])
def test_nine_tenths_of_the_limit_can_be_used_for_ever(per_minute):
    times = exhaust(Budget(per_minute), NOW + HOUR)
    assert len(times) >= int(0.9 * 60 * per_minute)


@pytest.mark.parametrize(("per_minute", "at_once"), [(1, 1), (9, 1), (10, 1), (20, 2), (100, 10), (300, 30)])
def test_a_tenth_of_the_limit_can_be_had_at_once(per_minute, at_once):
    assert Budget(per_minute).available(NOW) == at_once


def test_without_a_limit_there_is_always_something():
    budget = Budget()
    for _ in range(1000):
        budget.take(NOW)
    assert budget.available(NOW) > 0
    assert budget.wait(NOW) == 0


# A day begins with the first request after the end of the last one, so that any 24 hours touch two at most.


@given(st.none() | PER_MINUTE, PER_DAY, STEPS)
def test_no_day_ever_sees_more_requests_than_its_limit_and_no_24_hours_more_than_twice_as_many(
    per_minute, per_day, steps
):
    budget, now, times = Budget(per_minute, per_day), NOW, []
    for wanted, passes in steps:
        times += [now] * use(budget, wanted, now)
        now += budget.wait(now) if passes is None else passes
    begins = 0
    while begins < len(times):
        ends = bisect_left(times, times[begins] + DAY)
        assert ends - begins <= per_day
        begins = ends
    assert most_within(times, DAY) <= 2 * per_day


@pytest.mark.parametrize("per_minute", [None, 10, 600])
@pytest.mark.parametrize("per_day", [10, 101, 500])
def test_the_second_half_of_a_day_s_requests_is_spread_over_what_is_left_of_the_day(per_minute, per_day):
    times = exhaust(Budget(per_minute, per_day), NOW + DAY)
    assert per_day - 1 <= len(times) <= per_day
    half = per_day // 2 + 1
    begins = times[half - 1]
    assert begins < NOW + HOUR
    gap = (NOW + DAY - begins) / (per_day - half)
    for k, at in enumerate(times[half:], 1):
        assert at == pytest.approx(begins + k * gap, abs=0.2 * gap)


def test_a_new_day_begins_when_the_last_one_is_over():
    budget = Budget(per_day=5)
    for _ in range(5):
        budget.take(NOW)
    assert budget.available(NOW + DAY - 1) == 0
    assert budget.wait(NOW) == DAY
    assert budget.available(NOW + DAY) == Budget(per_day=5).available(NOW) == 3


@pytest.mark.parametrize("per_minute", [None, 10, 600])
def test_whoever_takes_all_that_can_be_had_has_each_day_s_requests(per_minute):
    times = exhaust(Budget(per_minute, per_day=100), NOW + 3 * DAY)
    for day in range(3):
        begins, ends = (bisect_left(times, NOW + k * DAY) for k in (day, day + 1))
        assert 99 <= ends - begins <= 100


@given(BUDGETS, STEPS)
def test_waiting_is_for_when_nothing_is_available_and_always_ends_it(budget, steps):
    now = NOW
    for wanted, passes in steps:
        use(budget, wanted, now)
        wait = budget.wait(now)
        assert (wait > 0) == (budget.available(now) == 0)
        assert budget.available(now + wait) > 0
        now += wait if passes is None else passes


@given(BUDGETS, STEPS, st.sampled_from([200, 429, 503]), st.integers(1, 5000))
def test_waiting_is_enough_after_a_retry_after_too(budget, steps, status, seconds):
    now = NOW
    for wanted, passes in steps:
        use(budget, wanted, now)
        budget.hear(status, {"retry-after": str(seconds)}, now)
        assert budget.available(now) == 0
        assert budget.available(now + budget.wait(now)) > 0
        now += budget.wait(now) if passes is None else passes


@pytest.mark.parametrize(("made", "wait"), [(1, 0), (6, 0), (7, SECOND), (36, 30 * SECOND)])
def test_requests_that_others_made_are_booked_like_our_own(made, wait):
    budget = Budget(per_minute=round(60 / 0.9))  # one a second, and six at once
    for _ in range(made):
        budget.take(NOW)
    assert budget.wait(NOW) == pytest.approx(wait, abs=1.5 * SECOND)


# The clock.


@given(BUDGETS, STEPS, st.integers(-30 * DAY, 30 * DAY))
def test_a_clock_that_is_set_anew_blocks_for_no_longer_than_the_limits_say(budget, steps, shift):
    now = NOW
    for wanted, passes in steps:
        use(budget, wanted, now)
        now += budget.wait(now) if passes is None else passes
    now += shift
    wait = budget.wait(now)
    assert wait <= (DAY + 1 if budget.per_day else 67 * SECOND if budget.per_minute else 0)
    assert budget.available(now + wait) > 0


@given(BUDGETS, st.lists(st.tuples(st.integers(-5 * DAY, 5 * DAY), st.integers(1, 40)), max_size=20))
def test_a_clock_that_is_never_right_blocks_nobody_for_ever(budget, steps):
    for shift, wanted in steps:
        now = NOW + shift
        use(budget, wanted, now)
        assert budget.wait(now) <= (DAY + 1 if budget.per_day else 67 * SECOND)
        assert budget.available(now + budget.wait(now)) > 0


@given(st.integers(0, 30 * DAY))
def test_a_pause_lasts_an_hour_at_most_though_the_clock_is_set_back(back):
    budget = Budget()
    budget.hear(429, {"retry-after": "3600"}, NOW)
    assert budget.wait(NOW - back) <= HOUR


# What the provider says.

DATES = st.datetimes(timezones=st.just(UTC)).map(lambda at: format_datetime(at, usegmt=True))
NONSENSE = st.sampled_from(
    ["", "-", "-1", "0", "0.0", "1e400", "-1e400", "nan", "inf", "-inf", "1_0", "0x10", "٣", "²", "9" * 40,
     "1" * 400, "soon", "1;w=60", "Thu, 99 Nov 9999 99:99:99 GMT", "Mon, 01 Jan 0001 00:00:00 +9999"]
)  # fmt: skip
VALUES = NONSENSE | DATES | st.text(max_size=20) | st.integers().map(str) | st.floats().map(str)
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"]),
    VALUES,
)
ANSWERS = st.lists(
    st.tuples(st.sampled_from([200, 404, 429, 503]) | st.integers(0, 999), HEADERS, st.integers(0, HOUR))
)


@given(BUDGETS, ANSWERS)
@example(Budget(), [(200, {"retry-after": "60"}, 0), (429, {}, 0)])
@example(Budget(), [(200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "9e9"}, 0)])
def test_whatever_headers_say_it_is_never_an_error_and_never_a_pause_of_more_than_an_hour(budget, answers):
    now = NOW
    for status, headers, passes in answers:
        budget.hear(status, headers, now)
        assert budget.paused_until <= now + HOUR
        assert isinstance(budget.paused_until, int)
        now += passes


@given(BUDGETS, ANSWERS)
def test_a_pause_is_never_cut_short_by_another_answer(budget, answers):
    for status, headers, _ in answers:
        before = budget.paused_until
        budget.hear(status, headers, NOW)
        assert budget.paused_until >= before


@pytest.mark.parametrize("status", [200, 429, 503])
@pytest.mark.parametrize(
    ("said", "pause"),
    [
        ("7", 7 * SECOND),
        ("3601", HOUR),
        (format_datetime(datetime.fromtimestamp(NOW // 1000 + 90, UTC), usegmt=True), 90 * SECOND),
    ],
)
def test_retry_after_is_heeded_up_to_an_hour(status, said, pause):
    budget = Budget()
    budget.hear(status, {"retry-after": said}, NOW)
    assert budget.wait(NOW) == pause
    assert budget.available(NOW + pause - 1) == 0
    assert budget.available(NOW + pause) > 0


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0"}, {"retry-after": "soon"}])
def test_refusals_in_a_row_double_the_pause_from_five_seconds_to_five_minutes(headers):
    budget, now, pauses = Budget(), NOW, []
    for _ in range(9):
        budget.hear(429, headers, now)
        pauses.append(budget.wait(now) // SECOND)
        now += budget.wait(now)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    budget.hear(200, {}, now)
    budget.hear(429, headers, now)
    assert budget.wait(now) == 5 * SECOND


def test_refusals_that_were_in_flight_together_count_as_one():
    budget = Budget()
    for _ in range(30):
        budget.hear(429, {}, NOW)
    assert budget.wait(NOW) == 5 * SECOND


def test_a_refusal_that_was_in_flight_when_the_limit_was_reached_changes_nothing():
    budget = Budget()
    budget.hear(200, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "60"}, NOW)
    budget.hear(429, {}, NOW)
    assert budget.wait(NOW) == MINUTE


@pytest.mark.parametrize(
    ("remaining", "reset", "pause"),
    [
        ("0", "30", 30 * SECOND),
        ("0", f"{NOW // 1000 + 45}", 45 * SECOND),
        ("0", f"{NOW + 45_000}", 45 * SECOND),
        ("0", f"{NOW // 1000 - 45}", 0),
        ("0", "86400", HOUR),
        ("0", f"{NOW // 1000 + 86400}", HOUR),
        ("0", "-30", 0),
        ("0", "nan", 0),
        ("1", "30", 0),
        ("0", None, MINUTE),
        (None, "30", 0),
    ],
)
def test_when_no_request_remains_it_waits_for_the_reset(remaining, reset, pause):
    said = {"x-ratelimit-remaining": remaining, "x-ratelimit-reset": reset}
    budget = Budget()
    budget.hear(200, {name: value for name, value in said.items() if value is not None}, NOW)
    assert budget.wait(NOW) == pause


def test_what_the_provider_says_is_left_is_counted_down_until_its_reset():
    budget = Budget()
    budget.hear(200, {"x-ratelimit-remaining": "3", "x-ratelimit-reset": "30"}, NOW)
    assert budget.available(NOW) == 3
    for _ in range(3):
        budget.take(NOW)
    assert (budget.available(NOW), budget.wait(NOW)) == (0, 30 * SECOND)
    assert budget.available(NOW + 30 * SECOND) > 3


def test_an_answer_that_was_overtaken_gives_nothing_back_but_a_new_window_does():
    budget = Budget()
    for remaining in (5, 2, 4):
        budget.hear(200, {"x-ratelimit-remaining": f"{remaining}", "x-ratelimit-reset": "30"}, NOW)
    assert budget.available(NOW) == 2
    budget.hear(200, {"x-ratelimit-remaining": "20", "x-ratelimit-reset": "60"}, NOW + 10 * SECOND)
    assert budget.available(NOW + 10 * SECOND) == 20


# Scarcity.


@given(BUDGETS, STEPS)
def test_scarcity_is_one_to_four_and_only_ever_of_a_day(budget, steps):
    now = NOW
    for wanted, passes in steps:
        use(budget, wanted, now)
        assert 1 <= budget.scarcity(now) <= 4
        assert budget.per_day or budget.scarcity(now) == 1
        now += budget.wait(now) if passes is None else passes


def test_requests_are_scarce_while_more_of_them_are_used_than_of_the_day():
    budget, half_past = Budget(per_day=100), NOW + DAY // 2
    scarcity = []
    budget.take(NOW)
    for _ in range(99):
        scarcity.append(budget.scarcity(half_past))
        budget.take(half_past)
    assert scarcity == sorted(scarcity)
    assert scarcity[:50] == [1] * 50
    assert scarcity[74] == pytest.approx(1.5)
    assert budget.scarcity(NOW + DAY) == 1


# Restarts.


@given(BUDGETS, STEPS, ANSWERS, st.integers(0, 2 * DAY))
def test_a_budget_survives_a_restart(budget, steps, answers, later):
    now = NOW
    for wanted, passes in steps:
        use(budget, wanted, now)
        now += budget.wait(now) if passes is None else passes
    for status, headers, passes in answers:
        budget.hear(status, headers, now)
        now += passes
    again = Budget(budget.per_minute, budget.per_day)
    again.resume(json.loads(json.dumps(budget.kept())))
    assert again == budget
    for at in (now, now + later):
        assert (again.available(at), again.wait(at), again.scarcity(at)) == (
            budget.available(at),
            budget.wait(at),
            budget.scarcity(at),
        )


def test_a_restart_with_other_limits_takes_those():
    budget = Budget(per_minute=1000, per_day=1000)
    for _ in range(50):
        budget.take(NOW)
    again = Budget(per_minute=10, per_day=50)
    again.resume(budget.kept())
    assert (again.per_minute, again.per_day) == (10, 50)
    assert again.available(NOW + MINUTE) == 0
    assert again.available(NOW + DAY) == 1


def test_nothing_that_was_kept_is_a_fresh_start():
    budget = Budget(per_minute=20)
    budget.resume({})
    assert budget == Budget(per_minute=20)
