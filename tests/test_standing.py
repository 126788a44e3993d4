"""How an account stands: its room, what its jobs teach, and what survives a restart."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.budget import AT_ONCE, Budget
from relay.durations import Seen
from relay.errors import ProviderError
from relay.generation import FINAL, Code, Generation, Problem, Status, Update
from relay.schedule import Pace
from relay.standing import ENOUGH, TOLERANCE, Standing, how_long

NOW = 1_700_000_000_000
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
DOWN, REFUSED = ProviderError("unavailable", "…"), ProviderError("unauthorized", "…")
PACE = Pace(interval=SECOND, timeout=30 * MINUTE)
TYPICAL = replace(PACE, typical=(MINUTE, 0.6))


def ended(
    *,
    at: int = 20 * SECOND,
    open_at: int | None = 18 * SECOND,
    status: Status = Status.COMPLETED,
    **told: int | str | None,
) -> Generation:
    """A generation that was watched since NOW and known to have ended after `at`."""
    return Generation(
        id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=status,
        created_at=NOW, deadline_at=NOW + HOUR, due_at=None,
        update=Update(status=status, **told), known_at=NOW + at,
        open_at=NOW + open_at if open_at is not None else None,
    )  # fmt: skip


def standing(
    *, pace: Pace = PACE, budget: Budget | None = None, errors: list[ProviderError] = ()
) -> Standing:
    one = Standing(pace, budget or Budget())
    for error in errors:
        one.health = one.health.after(error, now=NOW, spread=0.0)
    return one


# Room.


@given(
    st.sampled_from([[], [REFUSED], [DOWN] * 4, [DOWN] * 5]),
    st.none() | st.integers(1, 600),
    st.integers(0, 50),
    st.integers(0, HOUR),
)
def test_room_is_what_budget_and_health_allow_less_what_is_under_way(errors, per_minute, under_way, later):
    one = standing(budget=Budget(per_minute), errors=errors)
    one.under_way = under_way
    room, now = one.room(NOW + later), NOW + later
    assert 0 <= room <= one.budget.available(now)
    assert room == 0 or room + under_way <= AT_ONCE
    if one.health.status != "ok":
        assert room == (one.health.may_ask(now) and under_way == 0 and one.budget.available(now) > 0)


def test_an_account_without_limits_has_room_for_so_many_at_once():
    assert standing().room(NOW) == AT_ONCE


@pytest.mark.parametrize("errors", [[REFUSED], [DOWN] * 5])
def test_an_account_that_is_out_of_order_is_probed_one_at_a_time(errors):
    one = standing(errors=errors)
    assert one.room(NOW) == 0
    assert one.room(NOW + 6 * MINUTE) == 1
    one.under_way = 1
    assert one.room(NOW + 6 * MINUTE) == 0


def test_there_is_no_room_while_the_provider_wants_us_to_wait():
    one = standing()
    one.budget.hear(429, {"retry-after": "60"}, NOW)
    assert one.room(NOW + MINUTE - 1) == 0
    assert one.room(NOW + MINUTE) == AT_ONCE


# How long a job took.


@pytest.mark.parametrize(
    ("told", "seen"),
    [
        ({"duration_ms": 19_000}, Seen(19_000, 19_000)),
        ({"duration_ms": 18_000 - TOLERANCE}, Seen(13_000, 13_000)),
        ({"duration_ms": 20_000 + TOLERANCE}, Seen(25_000, 25_000)),
        ({"duration_ms": 18_000 - TOLERANCE - 1}, Seen(18_000, 20_000)),
        ({"duration_ms": 20_000 + TOLERANCE + 1}, Seen(18_000, 20_000)),
        ({"duration_ms": 2**53}, Seen(18_000, 20_000)),
        ({"created_at": NOW, "completed_at": NOW + 19_500}, Seen(19_500, 19_500)),
        ({"created_at": NOW + 1_000, "completed_at": NOW + 19_500}, Seen(18_500, 18_500)),
        ({"created_at": NOW, "completed_at": NOW - 500}, Seen(18_000, 20_000)),
        ({"completed_at": NOW + 19_500}, Seen(18_000, 20_000)),
        ({}, Seen(18_000, 20_000)),
    ],
)
def test_a_job_took_as_long_as_its_provider_says_if_that_can_be_else_it_ended_between_two_asks(told, seen):
    assert how_long(ended(**told)) == seen


def test_a_job_that_took_no_time_as_its_provider_says_is_not_believed():
    assert how_long(ended(at=2_000, open_at=1_000, duration_ms=0)) == Seen(1_000, 2_000)


def test_a_job_that_was_never_seen_open_may_have_ended_at_any_time_before():
    assert how_long(ended(at=20 * SECOND, open_at=None)) == Seen(0, 20 * SECOND)


def test_a_job_that_was_watched_long_after_it_had_ended_took_as_long_as_its_provider_says():
    began = NOW - HOUR
    told = ended(at=2 * SECOND, open_at=None, created_at=began, completed_at=began + 10 * SECOND)
    assert how_long(told) == Seen(10 * SECOND, 10 * SECOND)
    untold = ended(at=2 * SECOND, open_at=None, created_at=began)
    assert how_long(untold) == Seen(0, HOUR + 2 * SECOND)


@pytest.mark.parametrize("status", sorted(set(Status) - FINAL))
def test_what_has_not_ended_at_its_provider_teaches_nothing(status):
    assert how_long(ended(status=status)) is None
    assert how_long(replace(ended(), update=None)) is None
    assert how_long(replace(ended(), known_at=None)) is None


@given(
    st.integers(-DAY // 2, 0),
    st.integers(0, HOUR),
    st.booleans(),
    st.lists(st.integers(0, MINUTE), min_size=1, max_size=20),
)
def test_what_is_learned_of_a_job_is_true(begins, takes, tells_begin, pauses):
    """A job began at `begins` and took `takes`; it was watched since 0 and asked about after each pause."""
    ends, asked_at, open_at = begins + takes, 0, None
    for pause in pauses:
        asked_at += pause
        if asked_at >= ends:
            break
        open_at = asked_at
    if asked_at < ends:
        return
    began = NOW + begins if tells_begin else None
    seen = how_long(ended(at=asked_at, open_at=open_at, created_at=began))
    took = takes if tells_begin else max(0, ends)
    assert seen is None or seen.low <= took <= seen.high


# What is known.


def test_nothing_is_known_until_enough_jobs_have_ended():
    one = standing()
    for k in range(ENOUGH):
        assert one.plan() is None
        one.learn(ended(duration_ms=19_000 + k))
    assert one.plan().median == pytest.approx(19_000, rel=0.1)


def test_what_is_typical_is_known_from_the_beginning_and_corrected_by_what_is_seen():
    one = standing(pace=TYPICAL)
    assert one.plan().median == pytest.approx(MINUTE, rel=0.1)
    for k in range(50):
        one.learn(ended(duration_ms=19_000 + k))
    assert one.plan().median == pytest.approx(19_000, rel=0.1)


def test_what_did_not_end_teaches_nothing():
    one = standing()
    for _ in range(2 * ENOUGH):
        one.learn(ended(status=Status.TIMED_OUT))
    assert one.plan() is None


@pytest.mark.parametrize("by", ["model", "kind"])
def test_jobs_are_known_by_their_model_or_else_by_their_kind(by):
    one = standing(pace=TYPICAL)
    for k in range(50):
        one.learn(ended(duration_ms=19_000 + k, **{by: "image"}))
        one.learn(ended(at=300_000, open_at=290_000, duration_ms=295_000 + k, **{by: "video"}))
    image, video = (one.plan(ended(**{by: name})) for name in ("image", "video"))
    assert image.median == pytest.approx(19_000, rel=0.1)
    assert video.median == pytest.approx(295_000, rel=0.1)
    assert image.median < one.plan(replace(ended(), update=None)).median < video.median


# Restarts.


@given(
    st.lists(st.none() | st.just(DOWN), max_size=10),
    st.integers(0, 40),
    st.sampled_from([200, 429]),
    st.sampled_from([{}, {"retry-after": "90"}]),
    st.integers(0, 2 * DAY),
)
def test_room_survives_a_restart(outcomes, requests, status, headers, later):
    one = Standing(PACE, Budget(per_minute=60, per_day=100))
    for outcome in outcomes:
        one.health = one.health.after(outcome, now=NOW, spread=0.0)
    for _ in range(requests):
        one.budget.take(NOW)
    one.budget.hear(status, headers, NOW)
    again = Standing(PACE, Budget(per_minute=60, per_day=100))
    again.resume(json.loads(json.dumps(one.kept())))
    assert (again.health, again.budget) == (one.health, one.budget)
    assert again.room(NOW + later) == one.room(NOW + later)


def test_nothing_that_was_kept_is_a_fresh_start():
    one = standing()
    one.resume({})
    assert (one.health, one.budget) == (standing().health, Budget())


def test_requests_under_way_end_with_the_process():
    one, again = standing(), standing()
    one.under_way = 5
    again.resume(one.kept())
    assert again.under_way == 0


def test_a_job_that_never_was_teaches_nothing():
    never_was = Update(Status.FAILED, error=Problem(Code.NOT_FOUND, "no such job"))
    assert how_long(replace(ended(status=Status.FAILED), update=never_was)) is None
