"""When a provider is asked next."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.durations import Plan, log_normal
from relay.errors import ProviderError
from relay.generation import FINAL, Generation, Status, Update
from relay.providers import PROVIDERS, load
from relay.schedule import MISSING_PAUSES, Pace, called_interval, first_ask, next_ask

SECOND, MINUTE, HOUR = 1_000, 60_000, 3_600_000
DAY = 24 * HOUR
START = 1_000_000_000
PACE = Pace(interval=4 * SECOND, timeout=30 * MINUTE, backstop=60 * SECOND)
EVEN = 0.5  # the spread that makes a pause neither longer nor shorter
WATCHED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.PROCESSING,
    created_at=START, deadline_at=START + 30 * MINUTE, due_at=START,
)  # fmt: skip

PACES = st.builds(
    Pace,
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
PLANS = st.none() | st.sampled_from(
    [Plan(log_normal(*one)) for one in ((100, 0.1), (13_000, 0.6), (HOUR, 2.0))]
)
HEARD = st.none() | st.builds(
    Update,
    status=st.just(Status.PROCESSING),
    progress=st.none() | st.floats(0, 1),
    elapsed_ms=st.none() | st.integers(0, DAY),
    remaining_ms=st.none() | st.integers(0, DAY),
)
AGES = st.integers(0, 3 * DAY)
SCARCITIES = st.floats(1, 4)
SPREADS = st.floats(0, 1, exclude_max=True)


@given(OPEN, PACES, PLANS, AGES, SPREADS, SCARCITIES, HEARD, ERRORS, st.sampled_from([None, 1, 2, 3, 4]))
def test_an_open_generation_is_always_asked_again_and_never_later_than_its_deadline(
    generation, pace, plan, age, spread, scarcity, heard, error, hint_asks
):
    now = START + age
    hinted = replace(generation, hint_asks=hint_asks)
    ask = next_ask(hinted, pace, plan, now=now, spread=spread, scarcity=scarcity, heard=heard, error=error)
    assert now <= ask.due_at <= max(now, generation.deadline_at)
    assert 0 <= ask.chance < math.inf and 0 < ask.rate < math.inf


@given(OPEN, PACES, PLANS, AGES, SPREADS, SCARCITIES, HEARD, ERRORS, st.sampled_from([None, 1, 2, 3, 4]))
def test_never_earlier_than_the_interval_unless_the_deadline_is(
    generation, pace, plan, age, spread, scarcity, heard, error, hint_asks
):
    now = START + age
    hinted = replace(generation, hint_asks=hint_asks)
    ask = next_ask(hinted, pace, plan, now=now, spread=spread, scarcity=scarcity, heard=heard, error=error)
    shortest = called_interval(pace.interval) if hint_asks else pace.interval
    assert ask.due_at >= min(now + shortest, max(now, generation.deadline_at))


def due(generation, *, pace=PACE, now=START, spread=EVEN, **known):
    """When it is asked next while nobody knows how long such jobs take."""
    return next_ask(generation, pace, None, now=now, spread=spread, **known).due_at


@pytest.mark.parametrize(("asks", "pause"), [(1, 1), (2, 2), (3, 5), (4, 10), (None, 60)])
def test_after_a_callback_the_asks_come_quickly_and_then_the_backstop_again(asks, pause):
    hinted = replace(WATCHED, awaits_callback=True, hint_asks=asks)
    assert due(hinted, pace=replace(PACE, interval=SECOND // 2)) == START + pause * SECOND


@pytest.mark.parametrize("asks", [1, 2, 3, 4])
def test_a_callback_makes_no_pause_shorter_than_the_documented_one(asks):
    hinted = replace(WATCHED, awaits_callback=True, hint_asks=asks)
    assert due(hinted, pace=load("pictory").pace, spread=0.0) == START + 10 * SECOND


@pytest.mark.parametrize(
    ("age", "pause"),
    [(0, 4), (40 * SECOND, 4), (2 * MINUTE, 12), (10 * MINUTE, 60), (20 * MINUTE, 60)],
)
def test_with_nothing_to_expect_pauses_grow_to_a_tenth_of_the_age_and_at_most_a_minute(age, pause):
    assert due(WATCHED, now=START + age) == START + age + pause * SECOND


@given(SPREADS, st.integers(0, 28 * MINUTE))
def test_spread_makes_a_pause_a_twentieth_shorter_or_longer_but_never_shorter_than_the_interval(spread, age):
    now = START + age
    pause = due(WATCHED, now=now) - now
    due_at = due(WATCHED, now=now, spread=spread)
    assert max(PACE.interval, pause * 0.95 - 1) <= due_at - now <= pause * 1.05 + 1


@pytest.mark.parametrize(("missing", "pause"), [(1, 5), (2, 15), (3, 45), (4, 45)])
def test_a_job_that_is_not_visible_yet_is_asked_about_ever_more_slowly(missing, pause):
    assert due(replace(WATCHED, missing=missing)) == START + pause * SECOND


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_sightings_that_make_a_job_not_found_take_more_than_a_minute_everywhere(name):
    now = START
    for missing, _ in enumerate(MISSING_PAUSES, start=1):
        now = due(replace(WATCHED, missing=missing), pace=load(name).pace, now=now, spread=0.0)
    assert MINUTE <= now - START <= 2 * MINUTE


@pytest.mark.parametrize(("errors", "pause"), [(1, 8), (2, 16), (3, 32), (4, 60), (5000, 60)])
def test_errors_in_a_row_double_the_pause_up_to_a_minute(errors, pause):
    error = ProviderError("unavailable", "…")
    assert due(replace(WATCHED, errors=errors), error=error) == START + pause * SECOND


@pytest.mark.parametrize("status", [Status.PROCESSING, Status.TIMED_OUT])
@pytest.mark.parametrize(
    ("retry_after", "pause"), [(20 * MINUTE, 20 * MINUTE), (HOUR, HOUR), (3 * HOUR, HOUR), (10**15, HOUR)]
)
def test_retry_after_is_honoured_up_to_an_hour(status, retry_after, pause):
    generation = replace(WATCHED, status=status, deadline_at=START + 12 * HOUR, errors=1)
    error = ProviderError("rate_limited", "…", retry_after=retry_after)
    assert due(generation, spread=0.0, error=error) == START + pause


def test_a_short_retry_after_does_not_shorten_the_pause():
    generation = replace(WATCHED, errors=1)
    told = due(generation, error=ProviderError("rate_limited", "…", retry_after=1))
    assert told == due(generation, error=ProviderError("unavailable", "…"))


def test_what_is_known_of_durations_puts_the_asks_where_the_ends_are():
    plan, pace = Plan(log_normal(60_000, 0.3)), replace(PACE, interval=500)

    def pause(age):
        return next_ask(WATCHED, pace, plan, now=START + age, spread=EVEN).due_at - START - age

    first = first_ask(pace, plan, now=START, deadline_at=START + HOUR, job_known=True, awaits_callback=False)
    assert 20 * SECOND < first.due_at - START < 60 * SECOND
    assert pause(60 * SECOND) < pause(30 * SECOND) < first.due_at - START


def test_what_the_provider_says_is_left_makes_a_pause_shorter_or_longer_within_reason():
    plan = Plan(log_normal(60_000, 1.0))

    def pause(**said):
        heard = Update(status=Status.PROCESSING, **said)
        pace, now = replace(PACE, interval=10), START + 30 * SECOND
        return next_ask(WATCHED, pace, plan, now=now, spread=EVEN, heard=heard).due_at - now

    usual = pause()
    assert usual / 4 - 1 <= pause(remaining_ms=0) < usual < pause(remaining_ms=DAY) <= usual * 4 + 1
    assert pause(progress=0.99) < usual
    assert pause(progress=0.0) == usual


@given(st.integers(0, 3 * DAY), PACES, SPREADS)
def test_the_late_watch_ends_a_day_after_the_deadline(after, pace, spread):
    timed_out = replace(WATCHED, status=Status.TIMED_OUT)
    now = timed_out.deadline_at + after
    due_at = due(timed_out, pace=pace, now=now, spread=spread)
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
    assert due(timed_out, now=now) == (now + 10 * MINUTE if asked else None)


def test_who_was_found_overdue_late_is_watched_for_a_day_from_then():
    found_at = WATCHED.deadline_at + 3 * DAY  # the relay was down until then
    timed_out = replace(WATCHED, status=Status.TIMED_OUT, known_at=found_at)
    assert due(timed_out, now=found_at) == found_at + 10 * MINUTE
    assert due(timed_out, now=found_at + DAY - 10 * MINUTE) == found_at + DAY
    assert due(timed_out, now=found_at + DAY - 10 * MINUTE + 1) is None


@pytest.mark.parametrize("status", sorted(FINAL))
def test_a_final_ending_is_never_asked_about(status):
    assert due(replace(WATCHED, status=status)) is None


def test_without_a_job_id_there_is_nothing_to_ask_before_the_deadline():
    nameless = replace(WATCHED, job_id=None)
    assert due(nameless) == nameless.deadline_at
    claimed = replace(nameless, claimed_job_id="j", hint_asks=1)
    assert due(claimed, pace=replace(PACE, interval=SECOND)) == START + SECOND


@pytest.mark.parametrize(
    ("job_known", "awaits_callback", "after"),
    [(True, False, 4 * SECOND), (True, True, 60 * SECOND), (False, False, HOUR), (False, True, HOUR)],
)
def test_the_first_ask_waits_for_the_job_or_for_the_callback(job_known, awaits_callback, after):
    asked = first_ask(
        PACE, None, now=START, deadline_at=START + HOUR, job_known=job_known, awaits_callback=awaits_callback
    )
    assert asked.due_at == START + after


@pytest.mark.parametrize(("job_known", "age"), [(True, PACE.backstop), (False, HOUR)])
def test_who_awaits_a_callback_is_as_likely_to_have_ended_as_others_of_that_age(job_known, age):
    plan = Plan(log_normal(45 * SECOND, 1.0))
    asked = first_ask(
        PACE, plan, now=START, deadline_at=START + HOUR, job_known=job_known, awaits_callback=True
    )
    assert asked.chance == pytest.approx(-math.log(1 - plan.ended_since(0, age)))


@given(PACES, PLANS, st.integers(0, HOUR), st.booleans(), st.booleans())
def test_the_first_ask_is_never_later_than_the_deadline(pace, plan, timeout, job_known, awaits_callback):
    deadline_at = START + timeout
    asked = first_ask(
        pace, plan, now=START, deadline_at=deadline_at, job_known=job_known, awaits_callback=awaits_callback
    )
    assert START <= asked.due_at <= deadline_at
