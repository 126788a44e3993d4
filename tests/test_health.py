"""How an account is, for every course that its answers may take."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.errors import ProviderError
from relay.health import Health, Status

NOW = 1_700_000_000_000
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
ILL = ["unreachable", "unavailable", "blocked", "unreadable"]

DOWN, REFUSED, LIMITED = (
    ProviderError(code, "…") for code in ("unavailable", "unauthorized", "rate_limited")
)
SPREADS = st.floats(0, 1, exclude_max=True)
OUTCOMES = st.none() | st.sampled_from([DOWN, REFUSED, LIMITED, ProviderError("unreachable", "…")])
# Outcomes come in rows, or nothing would ever be out of order.
COURSES = st.lists(
    st.tuples(OUTCOMES, st.integers(1, 6), st.integers(0, HOUR) | st.integers(0, MINUTE), SPREADS),
    max_size=20,
)


def after(health: Health, *outcomes: ProviderError | None, now: int = NOW, spread: float = 0.0) -> Health:
    for one in outcomes:
        health = health.after(one, now=now, spread=spread)
    return health


def follow(course) -> list[tuple[int, ProviderError | None, Health]]:
    """When, what happened, and how the account was then."""
    health, now, seen = Health(), NOW, [(NOW, None, Health())]
    for outcome, times, passes, spread in course:
        for _ in range(times):
            health = health.after(outcome, now=now, spread=spread)
            seen.append((now, outcome, health))
            now += passes
    return seen


@given(COURSES)
def test_after_a_success_it_is_well_and_may_be_asked(course):
    for now, outcome, health in follow(course):
        if outcome is None:
            assert health.status is Status.OK
            assert health.may_ask(now)
            assert after(health, *[DOWN] * 4, now=now).status is Status.OK


@given(COURSES)
def test_an_account_that_is_well_may_always_be_asked_and_one_that_is_not_after_six_minutes(course):
    for now, _, health in follow(course):
        assert health.may_ask(now) or health.status is not Status.OK
        assert health.may_ask(now + 6 * MINUTE)


@given(COURSES)
def test_only_five_failures_in_a_row_put_it_out_of_order(course):
    row = 0
    for _, outcome, health in follow(course):
        row = 0 if outcome is None else row + (outcome not in (REFUSED, LIMITED))
        if health.status is Status.FAILING:
            assert row >= 5


@pytest.mark.parametrize("code", ILL)
def test_the_fifth_failure_in_a_row_puts_it_out_of_order(code):
    health = after(Health(), *[ProviderError(code, "…")] * 4)
    assert health.status is Status.OK
    health = after(health, ProviderError(code, "…"))
    assert health.status is Status.FAILING
    assert not health.may_ask(NOW)


def test_a_refused_credential_is_believed_at_once_and_tried_again_every_five_minutes():
    health = after(Health(), REFUSED)
    assert health.status is Status.UNAUTHORIZED
    assert not health.may_ask(NOW + 5 * MINUTE - 1)
    assert health.may_ask(NOW + 5 * MINUTE)
    again = after(health, REFUSED, now=NOW + 5 * MINUTE)
    assert again.paused_until == NOW + 10 * MINUTE


@pytest.mark.parametrize("error", [DOWN, REFUSED])
def test_a_refused_credential_stays_refused_until_a_success(error):
    health = after(Health(), REFUSED, *[error] * 20)
    assert health.status is Status.UNAUTHORIZED
    assert after(health, None).status is Status.OK


def test_throttling_is_no_failure():
    assert after(Health(), *[LIMITED] * 100).status is Status.OK
    assert after(Health(), *[DOWN] * 4, LIMITED, DOWN).status is Status.FAILING


def test_a_provider_that_throttles_is_there_but_has_not_taken_the_credential():
    assert after(after(Health(), *[DOWN] * 5), LIMITED, now=NOW + SECOND).status is Status.OK
    refused = after(after(Health(), REFUSED), LIMITED, now=NOW + SECOND)
    assert (refused.status, refused.failing_since) == (Status.UNAUTHORIZED, NOW)
    assert not refused.may_ask(NOW + MINUTE)


def test_what_is_wrong_with_one_job_only_is_no_failure_and_shows_that_the_provider_answers():
    refused = ProviderError("refused", "luma answered 400: no such kind of id")
    assert after(Health(), *[refused] * 100).status is Status.OK
    down = after(Health(), *[DOWN] * 5)
    assert after(down, refused, now=NOW + MINUTE).status is Status.OK


def test_the_last_error_is_kept_with_its_time_through_a_recovery():
    health = after(after(Health(), ProviderError("unavailable", "503, said the gateway")), None, now=NOW + 1)
    assert (health.last_error, health.last_error_at) == ("unavailable: 503, said the gateway", NOW)


# Probes.


def probes(error: ProviderError, *, number: int, spread: float = 0.0) -> list[int]:
    """When it is probed, if each probe is made as early as can be."""
    health, now, times = after(Health(), *[error] * 5), NOW, []
    for _ in range(number):
        now = health.paused_until
        assert health.may_ask(now)
        assert not health.may_ask(now - 1)
        times.append(now)
        health = after(health, error, now=now, spread=spread)
    return times


def test_pauses_between_probes_double_from_a_quarter_of_a_minute_to_five_minutes():
    times = [NOW, *probes(DOWN, number=8)]
    assert [(b - a) // SECOND for a, b in pairwise(times)] == [15, 30, 60, 120, 240, 300, 300, 300]


@given(st.sampled_from([DOWN, REFUSED]), SPREADS)
def test_a_pause_is_up_to_a_fifth_longer_and_never_shorter(error, spread):
    even = [b - a for a, b in pairwise(probes(error, number=8))]
    varied = [b - a for a, b in pairwise(probes(error, number=8, spread=spread))]
    for pause, longer in zip(even, varied, strict=True):
        assert pause <= longer <= 1.2 * pause + 1


@given(
    st.lists(st.tuples(st.sampled_from([DOWN, REFUSED]), st.integers(0, 2 * MINUTE), SPREADS), max_size=60)
)
def test_probes_that_bring_nothing_are_a_quarter_of_a_minute_apart_at_least(course):
    health, now, asked = after(Health(), *[DOWN] * 5), NOW, [NOW]
    for error, passes, spread in course:
        now += passes
        if health.may_ask(now):
            asked.append(now)
            health = health.after(error, now=now, spread=spread)
    assert all(b - a >= 15 * SECOND for a, b in pairwise(asked))


def test_what_was_in_flight_when_it_went_out_of_order_does_not_make_the_pause_longer():
    health = after(Health(), *[DOWN] * 30)
    assert health.paused_until == NOW + 15 * SECOND


def test_after_a_recovery_the_first_pause_is_short_again():
    health = after(after(Health(), *[DOWN] * 5), *[DOWN] * 3, now=NOW + HOUR)
    health = after(health, None, *[DOWN] * 5, now=NOW + 2 * HOUR)
    assert health.paused_until == NOW + 2 * HOUR + 15 * SECOND


@given(st.sampled_from([DOWN, REFUSED]), st.integers(0, 30 * DAY))
def test_a_clock_that_is_set_back_delays_no_probe_by_more_than_six_minutes(error, back):
    health = after(Health(), *[error] * 5)
    assert health.may_ask(NOW - back) or health.may_ask(NOW - back + 6 * MINUTE)


@given(st.integers(6 * MINUTE, 30 * DAY))
def test_with_a_clock_that_was_set_back_probes_are_as_rare_as_ever(back):
    health = after(Health(), *[DOWN] * 5)
    assert health.may_ask(NOW - back)
    health = after(health, DOWN, now=NOW - back)
    assert not health.may_ask(NOW - back + 15 * SECOND - 1)


# Outages.

SPANS = st.tuples(st.integers(-HOUR, 5 * HOUR), st.integers(0, 5 * HOUR))


@given(COURSES, SPANS)
def test_an_outage_takes_no_longer_than_the_time_it_is_within(course, span):
    since, until = NOW + span[0], NOW + span[0] + span[1]
    for _, _, health in follow(course):
        assert 0 <= health.outage(since, until) <= until - since


@given(COURSES, st.lists(st.integers(0, 30 * HOUR), min_size=1))
def test_an_outage_is_counted_once_however_the_time_is_cut(course, cuts):
    now, _, health = follow(course)[-1]
    cuts = sorted({NOW, now, *(at for cut in cuts if (at := NOW + cut) < now)})
    assert sum(health.outage(a, b) for a, b in pairwise(cuts)) == health.outage(NOW, now)


@given(COURSES)
@example([(REFUSED, 2, HOUR, 0.0), (DOWN, 1, 0, 0.0)])
def test_what_happens_next_takes_nothing_from_an_outage_that_has_been(course):
    for (before, _, health), (now, _, then) in pairwise(follow(course)):
        assert then.outage(NOW, before) >= health.outage(NOW, before) or len(health.outages) == 50
        if health.status is not Status.OK:
            assert then.outage(NOW, now) == health.outage(NOW, now)


@given(COURSES)
def test_whoever_is_well_throughout_has_no_outage(course):
    seen = follow(course)
    if all(health.status is Status.OK for _, _, health in seen):
        now, _, health = seen[-1]
        assert health.outage(NOW, now) == 0


@pytest.mark.parametrize(("error", "number"), [(DOWN, 5), (REFUSED, 1)])
def test_an_outage_lasts_from_the_first_failure_to_the_first_success(error, number):
    health = Health()
    for k in range(number):
        health = after(health, error, now=NOW + k * MINUTE)
    assert health.outage(NOW - HOUR, NOW + HOUR) == HOUR
    health = after(health, None, now=NOW + 2 * HOUR)
    assert health.outage(NOW - HOUR, NOW + DAY) == 2 * HOUR
    assert health.outage(NOW + HOUR, NOW + DAY) == HOUR
    assert health.outage(NOW + 2 * HOUR, NOW + DAY) == 0


def test_failures_that_a_success_ends_in_time_are_no_outage():
    health = after(after(Health(), *[DOWN] * 4), None, now=NOW + HOUR)
    assert health.outage(NOW, NOW + HOUR) == 0


@given(st.lists(st.tuples(st.integers(-DAY, DAY), OUTCOMES, st.integers(1, 6)), max_size=20), SPANS)
def test_a_clock_that_is_never_right_makes_no_outage_longer_than_the_time_it_is_within(course, span):
    since, until = NOW + span[0], NOW + span[0] + span[1]
    health = Health()
    for shift, outcome, times in course:
        health = after(health, *[outcome] * times, now=NOW + shift)
        assert 0 <= health.outage(since, until) <= until - since


def test_of_many_outages_the_last_fifty_are_remembered():
    health = Health()
    for k in range(60):
        health = after(health, REFUSED, now=NOW + k * HOUR)
        health = after(health, None, now=NOW + k * HOUR + MINUTE)
    assert len(health.outages) == 50
    assert health.outage(NOW, NOW + 60 * HOUR) == 50 * MINUTE


# Restarts.


@given(COURSES)
def test_health_survives_a_restart(course):
    for _, _, health in follow(course):
        again = Health.resumed(json.loads(json.dumps(health.kept())))
        if health.status is Status.UNAUTHORIZED:
            again = replace(again, paused_until=health.paused_until)
        assert again == health


def test_nothing_that_was_kept_is_a_fresh_start():
    assert Health.resumed({}) == Health()


def test_what_another_version_kept_is_no_error():
    kept = {**after(Health(), REFUSED).kept(), "of_another_version": 1}
    del kept["trips"]
    assert Health.resumed(kept).status is Status.UNAUTHORIZED


def test_a_restart_tries_a_refused_credential_at_once_for_it_may_be_another_one():
    refused = after(Health(), REFUSED)
    again = Health.resumed(refused.kept())
    assert (again.status, again.failing_since) == (refused.status, refused.failing_since)
    assert again.may_ask(NOW)


def test_a_status_of_another_release_is_none():
    assert Health.resumed({**after(Health(), REFUSED).kept(), "status": "drowsy"}) == Health()
