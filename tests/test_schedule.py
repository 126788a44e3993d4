"""When a provider is asked next."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ProviderError
from relay.generation import FINAL, Generation, Status
from relay.schedule import Pace, first_ask, next_ask

SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000
DAY = 24 * HOUR
START = 1_000_000_000
PACE = Pace(first=6 * SECOND, interval=4 * SECOND, timeout=30 * MINUTE, backstop=60 * SECOND)
WATCHED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.PROCESSING,
    created_at=START, deadline_at=START + 30 * MINUTE, due_at=START,
)  # fmt: skip

PACES = st.builds(
    Pace,
    first=st.integers(0, HOUR),
    interval=st.integers(500, HOUR),
    timeout=st.just(30 * MINUTE),
    backstop=st.integers(0, HOUR),
)
OPEN = st.builds(
    lambda status, **given: replace(WATCHED, status=status, **given),
    status=st.sampled_from([Status.QUEUED, Status.PROCESSING]),
    deadline_at=st.integers(START, START + 2 * DAY),
    awaits_callback=st.booleans(),
    errors=st.integers(0, 2000),
    missing=st.integers(0, 10),
)
ERRORS = st.none() | st.builds(
    ProviderError, st.just("rate_limited"), st.just("…"), retry_after=st.none() | st.integers(0, 2 * DAY)
)
AGES = st.integers(0, 3 * DAY)
SPREADS = st.floats(0, 1, exclude_max=True)


@given(OPEN, PACES, AGES, SPREADS, ERRORS, st.sampled_from([None, 1, 2, 3, 4]))
def test_an_open_generation_is_always_asked_again_and_never_later_than_its_deadline(
    generation, pace, age, spread, error, hint_asks
):
    now = START + age
    due_at = next_ask(replace(generation, hint_asks=hint_asks), pace, now=now, spread=spread, error=error)
    assert now <= due_at <= max(now, generation.deadline_at)


@given(OPEN, PACES, AGES, SPREADS, ERRORS)
def test_never_earlier_than_the_interval_unless_the_deadline_is(generation, pace, age, spread, error):
    now = START + age
    due_at = next_ask(generation, pace, now=now, spread=spread, error=error)
    assert due_at >= min(now + pace.interval, max(now, generation.deadline_at))


@pytest.mark.parametrize(("asks", "pause"), [(1, 1), (2, 2), (3, 5), (4, 10), (None, 60)])
def test_after_a_callback_the_asks_come_quickly_and_then_the_backstop_again(asks, pause):
    hinted = replace(WATCHED, awaits_callback=True, hint_asks=asks)
    assert next_ask(hinted, PACE, now=START, spread=0.0) == START + pause * SECOND


@pytest.mark.parametrize(
    ("age", "pause"),
    [(0, 4), (40 * SECOND, 4), (2 * MINUTE, 12), (10 * MINUTE, 60), (20 * MINUTE, 60)],
)
def test_pauses_grow_to_a_tenth_of_the_age_and_at_most_a_minute(age, pause):
    assert next_ask(WATCHED, PACE, now=START + age, spread=0.0) == START + age + pause * SECOND


@given(SPREADS, st.integers(0, 29 * MINUTE))
def test_spread_adds_at_most_a_tenth_and_takes_nothing(spread, age):
    now = START + age
    earliest = next_ask(WATCHED, PACE, now=now, spread=0.0)
    due_at = next_ask(WATCHED, PACE, now=now, spread=spread)
    assert earliest <= due_at <= now + (earliest - now) * 1.1 + 1


@pytest.mark.parametrize(("missing", "pause"), [(1, 4), (2, 12), (3, 32), (4, 32)])
def test_a_job_that_is_not_visible_yet_is_asked_about_ever_more_slowly(missing, pause):
    assert next_ask(replace(WATCHED, missing=missing), PACE, now=START, spread=0.0) == START + pause * SECOND


@pytest.mark.parametrize(("errors", "pause"), [(1, 8), (2, 16), (3, 32), (6, 256), (7, 300), (5000, 300)])
def test_errors_in_a_row_double_the_pause_up_to_five_minutes(errors, pause):
    error = ProviderError("unavailable", "…")
    due_at = next_ask(replace(WATCHED, errors=errors), PACE, now=START, spread=0.0, error=error)
    assert due_at == START + pause * SECOND


@pytest.mark.parametrize("status", [Status.PROCESSING, Status.TIMED_OUT])
@pytest.mark.parametrize(
    ("retry_after", "pause"), [(20 * MINUTE, 20 * MINUTE), (HOUR, HOUR), (3 * HOUR, HOUR), (10**15, HOUR)]
)
def test_retry_after_is_honoured_up_to_an_hour(status, retry_after, pause):
    generation = replace(WATCHED, status=status, deadline_at=START + 12 * HOUR, errors=1)
    error = ProviderError("rate_limited", "…", retry_after=retry_after)
    assert next_ask(generation, PACE, now=START, spread=0.0, error=error) == START + pause


def test_a_short_retry_after_does_not_shorten_the_pause():
    error = ProviderError("rate_limited", "…", retry_after=1)
    due_at = next_ask(replace(WATCHED, errors=1), PACE, now=START, spread=0.0, error=error)
    assert due_at == next_ask(
        replace(WATCHED, errors=1), PACE, now=START, spread=0.0, error=ProviderError("unavailable", "…")
    )


@given(st.integers(0, 3 * DAY), PACES, SPREADS)
def test_the_late_watch_ends_a_day_after_the_deadline(after, pace, spread):
    timed_out = replace(WATCHED, status=Status.TIMED_OUT)
    now = timed_out.deadline_at + after
    due_at = next_ask(timed_out, pace, now=now, spread=spread)
    if due_at is None:
        assert now + max(pace.interval, HOUR) > timed_out.deadline_at + DAY
    else:
        assert now + pace.interval <= due_at <= timed_out.deadline_at + DAY


@pytest.mark.parametrize(
    ("before_the_end", "asked"), [(DAY, True), (10 * MINUTE, True), (10 * MINUTE - 1, False)]
)
def test_the_late_watch_asks_every_ten_minutes_up_to_its_very_end(before_the_end, asked):
    timed_out = replace(WATCHED, status=Status.TIMED_OUT)
    now = timed_out.deadline_at + DAY - before_the_end
    assert next_ask(timed_out, PACE, now=now, spread=0.0) == (now + 10 * MINUTE if asked else None)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_a_final_ending_is_never_asked_about(status):
    assert next_ask(replace(WATCHED, status=status), PACE, now=START, spread=0.0) is None


def test_without_a_job_id_there_is_nothing_to_ask_before_the_deadline():
    nameless = replace(WATCHED, job_id=None)
    assert next_ask(nameless, PACE, now=START, spread=0.5) == nameless.deadline_at
    claimed = replace(nameless, claimed_job_id="j", hint_asks=1)
    assert next_ask(claimed, PACE, now=START, spread=0.0) == START + SECOND


@pytest.mark.parametrize(
    ("job_known", "awaits_callback", "after"),
    [(True, False, 6 * SECOND), (True, True, 60 * SECOND), (False, False, HOUR), (False, True, HOUR)],
)
def test_the_first_ask_waits_for_the_job_or_for_the_callback(job_known, awaits_callback, after):
    asked = first_ask(
        PACE, now=START, deadline_at=START + HOUR, job_known=job_known, awaits_callback=awaits_callback
    )
    assert asked == START + after


@given(PACES, st.integers(0, HOUR), st.booleans(), st.booleans())
def test_the_first_ask_is_never_later_than_the_deadline(pace, timeout, job_known, awaits_callback):
    deadline_at = START + timeout
    asked = first_ask(
        pace, now=START, deadline_at=deadline_at, job_known=job_known, awaits_callback=awaits_callback
    )
    assert START <= asked <= deadline_at
