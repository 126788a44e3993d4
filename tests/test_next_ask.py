"""When to ask next, by all that is known: durations, the provider's hints, scarcity, pauses, the deadline."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.durations import Plan, log_normal
from relay.errors import ProviderError
from relay.generation import FINAL, OPEN, Generation, Status, Update
from relay.schedule import HINT_REACH, Ask, Pace, called_interval, first_ask, next_ask

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
START = 1_000_000_000
PACE = Pace(interval=SECOND, timeout=30 * MINUTE)
# Jobs of a minute, more or less.
PLAN = Plan(log_normal(MINUTE, 0.3))
WATCHED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.PROCESSING,
    created_at=START, deadline_at=START + 30 * MINUTE, due_at=START,
)  # fmt: skip


def up_to(most: int, least: int = 0) -> st.SearchStrategy[int]:
    """Milliseconds; also whole seconds, as large integers are mostly drawn small."""
    seconds = st.integers(-(-least // SECOND), most // SECOND).map(lambda one: one * SECOND)
    return seconds | st.integers(least, most)


PACES = st.builds(
    Pace,
    interval=up_to(HOUR, least=100),
    timeout=st.just(30 * MINUTE),
    backstop=up_to(HOUR),
)
PLANS = st.none() | st.builds(log_normal, st.floats(500, HOUR), st.floats(0.05, 2.0)).map(Plan)
OPEN_ONES = st.builds(
    lambda status, **given: replace(WATCHED, status=status, **given),
    status=st.sampled_from(sorted(OPEN)),
    job_id=st.sampled_from(["j", "j", "j", None]),
    claimed_job_id=st.sampled_from([None, "claimed"]),
    deadline_at=up_to(8 * DAY).map(lambda timeout: START + timeout),
    awaits_callback=st.booleans(),
    errors=st.integers(0, 2000),
    missing=st.integers(0, 10),
    hint_asks=st.none() | st.integers(0, 5),
)
ERRORS = st.builds(
    ProviderError, st.just("rate_limited"), st.just("…"), retry_after=st.none() | up_to(2 * HOUR)
)
MILLISECONDS = up_to(10 * MINUTE) | st.integers(0, 2**53)
HEARD = st.builds(
    Update,
    status=st.just(Status.PROCESSING),
    progress=st.none() | st.floats(0, 1),
    elapsed_ms=st.none() | MILLISECONDS,
    remaining_ms=st.none() | MILLISECONDS,
    created_at=st.none() | up_to(START + DAY),
)
# What an ask brought: news, an error, or neither.
BROUGHT = st.none() | HEARD | ERRORS
AGES = up_to(20 * MINUTE) | up_to(9 * DAY, least=-DAY)
SPREADS = st.floats(0, 1, exclude_max=True)
SCARCITIES = st.floats(1, 4)


def ask(
    generation: Generation,
    pace: Pace,
    plan: Plan | None,
    brought: Update | ProviderError | None = None,
    *,
    age: int,
    spread: float = 0.5,
    scarcity: float = 1.0,
) -> Ask:
    heard = brought if isinstance(brought, Update) else None
    if heard is not None:
        generation = replace(generation, update=heard)
    return next_ask(
        generation,
        pace,
        plan,
        now=START + age,
        spread=spread,
        scarcity=scarcity,
        heard=heard,
        error=brought if isinstance(brought, ProviderError) else None,
    )


def pause(
    brought: Update | ProviderError | None = None,
    *,
    age: int,
    plan: Plan | None = PLAN,
    scarcity: float = 1.0,
    pace: Pace = PACE,
) -> int:
    """Until an ordinary job is asked about again."""
    generation = replace(WATCHED, deadline_at=START + 90 * DAY)
    return ask(generation, pace, plan, brought, age=age, scarcity=scarcity).due_at - START - age


def heard(**hints: float) -> Update:
    return Update(status=Status.PROCESSING, **hints)


# Never too early, never too late, never for ever.


@given(OPEN_ONES, PACES, PLANS, BROUGHT, AGES, SPREADS, SCARCITIES)
def test_an_open_generation_is_always_asked_about_again_by_its_deadline(
    generation, pace, plan, brought, age, spread, scarcity
):
    due_at = ask(generation, pace, plan, brought, age=age, spread=spread, scarcity=scarcity).due_at
    assert isinstance(due_at, int)
    if generation.job_id or generation.claimed_job_id:
        assert START + age <= due_at <= max(START + age, generation.deadline_at)
    else:
        assert due_at == generation.deadline_at


@given(OPEN_ONES, PACES, PLANS, BROUGHT, AGES, SPREADS, SCARCITIES)
def test_never_before_the_documented_pause_and_a_retry_after_unless_the_deadline_is(
    generation, pace, plan, brought, age, spread, scarcity
):
    due_at = ask(generation, pace, plan, brought, age=age, spread=spread, scarcity=scarcity).due_at
    told = min(brought.retry_after or 0, HOUR) if isinstance(brought, ProviderError) else 0
    shortest = called_interval(pace.interval) if generation.hint_asks else pace.interval
    assert due_at >= min(START + age + max(shortest, told), generation.deadline_at)


@given(PACES, PLANS, ERRORS | st.none(), up_to(3 * DAY), SPREADS)
def test_a_late_watch_asks_with_the_same_pauses_for_a_day(pace, plan, error, after, spread):
    late = replace(WATCHED, status=Status.TIMED_OUT)
    age = late.deadline_at - START + after
    due_at = ask(late, pace, plan, error, age=age, spread=spread).due_at
    told = min(error.retry_after or 0, HOUR) if error is not None else 0
    least = START + age + max(pace.interval, told, 10 * MINUTE)
    assert due_at == (least if least <= late.deadline_at + DAY else None)


@given(st.sampled_from(sorted(FINAL)), PACES, PLANS, BROUGHT, AGES)
def test_what_is_over_is_never_asked_about(status, pace, plan, brought, age):
    assert ask(replace(WATCHED, status=status), pace, plan, brought, age=age).due_at is None


@given(OPEN_ONES, PACES, PLANS, BROUGHT, AGES, SPREADS, SCARCITIES)
def test_how_likely_an_end_is_is_known_of_every_ask(generation, pace, plan, brought, age, spread, scarcity):
    likely = ask(generation, pace, plan, brought, age=age, spread=spread, scarcity=scarcity)
    assert 0 <= likely.chance < 100
    assert 0 < likely.rate < 100


# Scarcity and chance.


@given(OPEN_ONES, PACES, PLANS, BROUGHT, AGES, SPREADS, st.lists(SCARCITIES, min_size=2, max_size=5))
def test_scarcity_only_ever_makes_it_later(generation, pace, plan, brought, age, spread, scarcities):
    due = [
        ask(generation, pace, plan, brought, age=age, spread=spread, scarcity=one).due_at
        for one in sorted([1.0, *scarcities])
    ]
    assert due == sorted(due)


def test_when_requests_are_twice_as_scarce_half_as_many_are_made():
    def asks(scarcity: float) -> int:
        age, number = 0, 0
        while age < 2 * MINUTE:
            age, number = (
                age + pause(age=age, scarcity=scarcity, pace=Pace(interval=1, timeout=HOUR)),
                number + 1,
            )
        return number

    assert asks(2.0) == pytest.approx(asks(1.0) / 2, abs=1)
    assert asks(4.0) == pytest.approx(asks(1.0) / 4, abs=1)


@given(OPEN_ONES, PACES, PLANS, BROUGHT, AGES, SPREADS)
def test_chance_moves_it_by_a_twentieth_at_most(generation, pace, plan, brought, age, spread):
    even, varied = (ask(generation, pace, plan, brought, age=age, spread=one).due_at for one in (0.5, spread))
    assert abs(varied - even) <= 0.05 * max(0, even - START - age) / 0.95 + 1


# Durations.


def test_the_first_ask_is_at_the_early_edge_and_the_densest_are_where_an_end_is_likeliest():
    ages = [0]
    while ages[-1] < 10 * MINUTE:
        ages.append(ages[-1] + pause(age=ages[-1]))
    pauses = {age: after - age for age, after in pairwise(ages)}
    assert 20 * SECOND < pauses[0] < 50 * SECOND
    assert min(pauses.values()) == min(one for age, one in pauses.items() if MINUTE / 2 < age < 3 * MINUTE)
    assert 4 <= sum(40 * SECOND < age < 90 * SECOND for age in ages) <= 12


@given(PLANS.filter(bool), up_to(8 * DAY), SCARCITIES)
def test_nobody_who_is_late_waits_for_more_than_a_minute_or_a_quarter_of_the_usual_time(plan, late, scarcity):
    waits = pause(age=round(plan.median) + 1 + late, plan=plan, scarcity=scarcity)
    assert waits <= scarcity * max(MINUTE, plan.median / 4) + 1


@pytest.mark.parametrize("scarcity", [1.0, 2.5, 4.0])
def test_scarcity_makes_the_pauses_of_the_tail_longer_too(scarcity):
    assert pause(age=2 * HOUR, scarcity=scarcity) == scarcity * MINUTE


@pytest.mark.parametrize("age", [0, 2 * SECOND, 15 * SECOND, 2 * MINUTE, 5 * MINUTE])
def test_while_nothing_is_known_the_news_is_a_tenth_of_the_age_late_at_most(age):
    assert pause(age=age, plan=None) == max(SECOND, age // 10)


def test_while_nothing_is_known_pauses_grow_to_a_minute():
    assert pause(age=DAY, plan=None) == MINUTE


def test_a_job_that_began_before_it_was_watched_is_as_old_as_its_provider_says():
    began = heard(created_at=START - 40 * SECOND)
    assert pause(began, age=10 * SECOND) == pause(age=50 * SECOND)


def test_the_provider_s_word_for_how_long_it_has_taken_is_its_age():
    assert pause(heard(elapsed_ms=50 * SECOND), age=10 * SECOND) == pause(age=50 * SECOND)
    assert pause(heard(elapsed_ms=0), age=50 * SECOND) == pause(age=0)


def test_a_clock_that_was_set_back_makes_a_job_new():
    assert pause(age=-HOUR) == pause(age=0)


# The provider's hints.


@given(PLANS, up_to(20 * MINUTE), MILLISECONDS)
def test_what_is_left_as_the_provider_says_moves_it_that_way_and_only_so_far(plan, age, left):
    without = pause(age=age, plan=plan)
    told = pause(heard(remaining_ms=left), age=age, plan=plan)
    if left / 2 > without:
        assert without - 1 <= told <= min(left / 2, HINT_REACH * without) + HINT_REACH
    else:
        assert min(without, max(left / 2, without / HINT_REACH, SECOND)) - 2 <= told <= without + 1


@given(PLANS, up_to(20 * MINUTE), st.lists(MILLISECONDS, min_size=2, max_size=5))
def test_the_more_is_left_the_later(plan, age, lefts):
    due = [pause(heard(remaining_ms=left), age=age, plan=plan) for left in sorted(lefts)]
    assert due == sorted(due)


@given(PLANS, up_to(20 * MINUTE), st.lists(st.floats(0.05, 1), min_size=2, max_size=5))
def test_the_further_it_is_the_sooner(plan, age, progress):
    due = [pause(heard(progress=one), age=age, plan=plan) for one in sorted(progress)]
    assert due == sorted(due, reverse=True)


@pytest.mark.parametrize("plan", [PLAN, None], ids=["known", "unknown"])
def test_a_job_that_is_nearly_done_is_asked_about_sooner_and_one_that_has_hardly_begun_later(plan):
    without = pause(age=30 * SECOND, plan=plan)
    assert pause(heard(progress=0.97), age=30 * SECOND, plan=plan) < without / 2
    assert pause(heard(progress=0.06), age=30 * SECOND, plan=plan) > 2 * without


@pytest.mark.parametrize("progress", [0, 0.01, 0.049])
def test_hardly_any_progress_says_nothing(progress):
    assert pause(heard(progress=progress), age=30 * SECOND) == pause(age=30 * SECOND)


def test_what_is_left_counts_more_than_the_progress():
    both = heard(progress=0.99, remaining_ms=HOUR)
    assert pause(both, age=30 * SECOND) == pause(heard(remaining_ms=HOUR), age=30 * SECOND)


# Errors and callbacks.


@pytest.mark.parametrize(("errors", "waits"), [(1, 2), (2, 4), (5, 32), (6, 60), (2000, 60)])
def test_errors_in_a_row_double_the_pause_up_to_a_minute(errors, waits):
    failed = ask(replace(WATCHED, errors=errors), PACE, PLAN, ProviderError("unavailable", "…"), age=0)
    assert failed.due_at == START + waits * SECOND


@given(PLANS, SCARCITIES, st.integers(1, 10))
def test_after_a_callback_it_is_asked_soon_whatever_is_known(plan, scarcity, asks):
    hinted = replace(WATCHED, awaits_callback=True, hint_asks=asks)
    due_at = ask(hinted, PACE, plan, age=0, scarcity=scarcity).due_at
    assert due_at == START + [1, 2, 5, 10][min(asks, 4) - 1] * SECOND


@given(PLANS, PACES, AGES)
def test_while_a_callback_is_awaited_it_is_only_the_backstop(plan, pace, age):
    awaiting = replace(WATCHED, awaits_callback=True, deadline_at=START + 90 * DAY)
    assert ask(awaiting, pace, plan, age=age).due_at == START + age + max(pace.backstop, pace.interval)


# The first ask.


@given(PACES, PLANS, up_to(8 * DAY), st.booleans(), st.booleans())
def test_the_first_ask_keeps_the_pause_and_the_deadline(pace, plan, timeout, job_known, awaits_callback):
    due_at = first_ask(
        pace,
        plan,
        now=START,
        deadline_at=START + timeout,
        job_known=job_known,
        awaits_callback=awaits_callback,
    ).due_at
    if job_known:
        assert START + min(pace.interval, timeout) <= due_at <= START + timeout
    else:
        assert due_at == START + timeout


@pytest.mark.parametrize(
    ("plan", "awaits_callback", "least", "most"),
    [
        (PLAN, False, 20 * SECOND, 50 * SECOND),
        (None, False, SECOND, SECOND),
        (PLAN, True, MINUTE, MINUTE),
        (None, True, MINUTE, MINUTE),
    ],
)
def test_the_first_ask_waits_for_the_early_edge_or_for_the_callback(plan, awaits_callback, least, most):
    due_at = first_ask(
        PACE, plan, now=START, deadline_at=START + HOUR, job_known=True, awaits_callback=awaits_callback
    ).due_at
    assert least <= due_at - START <= most
