"""What an attempt does to its delivery."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.delivery import MOVES, Answer, Claimed, Code, Status, Trigger, settle
from relay.times import parse_duration

NOW = 1_700_000_000_000
DAY = 86_400_000
SCHEDULE = [parse_duration(text) for text in ["5s", "5m", "30m", "2h", "5h", "10h", "14h", "20h", "24h"]]
CLAIMED = Claimed(
    id="dlv_1", event_id="evt_1", event_type="generation.completed", endpoint_id="ep_1",
    destination="ep_1", url="https://a.test/",
    secrets=("s",), body=b"{}", attempts=0, run_attempts=0, trigger=Trigger.SCHEDULED, lease="l",
    lease_until=NOW + 60_000,
)  # fmt: skip


def answer(status: int | None = None, code: Code | None = None, retry_after: int | None = None) -> Answer:
    return Answer(started_at=NOW, duration_ms=5, status=status, code=code, retry_after=retry_after)


def settled(given: Answer, *, attempts: int = 0, run_attempts: int = 0, spread: float = 0.0, **claimed):
    claim = replace(CLAIMED, attempts=attempts, run_attempts=run_attempts, **claimed)
    return settle(claim, given, schedule=SCHEDULE, now=NOW, spread=spread)


ANSWERS = st.builds(
    answer,
    status=st.none() | st.integers(100, 999),
    code=st.none() | st.sampled_from(list(Code)),
    retry_after=st.none() | st.integers(0, 10**13),
)
RUNS = st.integers(0, 12)
SPREADS = st.floats(0, 1, exclude_max=True)


@given(ANSWERS, RUNS, SPREADS)
def test_every_settlement_is_a_move_and_only_a_pending_one_is_due_again(given_answer, run, spread):
    settlement = settled(given_answer, run_attempts=run, spread=spread)
    assert settlement.status in MOVES[Status.SENDING]
    assert (settlement.due_at is not None) == (settlement.status is Status.PENDING)


@pytest.mark.parametrize("code", [None, Code.HTTP_STATUS])
def test_2xx_and_nothing_else_is_delivered(code):
    delivered = {
        status
        for status in range(100, 1000)
        if settled(answer(status, None if 200 <= status <= 299 else code)).status is Status.DELIVERED
    }
    assert delivered == set(range(200, 300))


@pytest.mark.parametrize("code", sorted(set(Code)))
def test_an_attempt_that_went_wrong_is_not_delivered_whatever_its_status_line_said(code):
    assert settled(answer(200, code)).status is not Status.DELIVERED


def test_every_refusal_but_410_is_retried():
    retried = {status for status in range(100, 1000) if settled(answer(status)).status is Status.PENDING}
    assert retried == set(range(100, 1000)) - set(range(200, 300)) - {410}


@pytest.mark.parametrize("code", sorted(set(Code) - {Code.BLOCKED_ADDRESS}))
def test_every_fault_but_a_blocked_address_is_retried(code):
    assert settled(answer(code=code)).status is Status.PENDING


def test_a_blocked_address_is_never_retried():
    settlement = settled(answer(code=Code.BLOCKED_ADDRESS, retry_after=1000))
    assert (settlement.status, settlement.due_at, settlement.disable_endpoint) == (Status.FAILED, None, None)


@pytest.mark.parametrize("endpoint_id", ["ep_1", None])
def test_410_ends_the_delivery_and_disables_its_endpoint(endpoint_id):
    settlement = settled(answer(410, Code.HTTP_STATUS, retry_after=1000), endpoint_id=endpoint_id)
    assert (settlement.status, settlement.disable_endpoint) == (Status.FAILED, endpoint_id)


@given(ANSWERS, RUNS)
def test_nothing_but_410_disables_an_endpoint(given_answer, run):
    disabled = settled(given_answer, run_attempts=run).disable_endpoint
    assert disabled is None or given_answer.status == 410


@given(st.sampled_from(range(len(SCHEDULE))), SPREADS)
def test_jitter_is_between_nothing_and_a_fifth_and_never_early(run, spread):
    pause = settled(answer(500), run_attempts=run, spread=spread).due_at - NOW
    assert SCHEDULE[run] <= pause <= SCHEDULE[run] * 1.2


def test_jitter_uses_its_whole_range():
    pauses = [
        settled(answer(500), run_attempts=8, spread=spread).due_at - NOW for spread in (0.0, 0.5, 0.999)
    ]
    assert pauses[0] == DAY
    assert pauses[1] == pytest.approx(1.1 * DAY)
    assert pauses[2] == pytest.approx(1.2 * DAY, rel=0.001)


@pytest.mark.parametrize("status", [429, 500, 503, 301])
@pytest.mark.parametrize(
    ("retry_after", "pause"),
    [(None, 5_000), (0, 5_000), (4_999, 5_000), (60_000, 60_000), (DAY, DAY), (DAY + 1, DAY), (10**15, DAY)],
)
def test_retry_after_lengthens_a_pause_up_to_a_day_and_never_shortens_it(status, retry_after, pause):
    assert settled(answer(status, Code.HTTP_STATUS, retry_after)).due_at == NOW + pause


def run(attempts: int, trigger: Trigger) -> tuple[list[int], int]:
    """The numbers of the attempts of one fresh run that is always refused, and the time it takes."""
    now, numbers = NOW, []
    for run_attempts in range(100):
        claim = replace(CLAIMED, attempts=attempts + run_attempts, run_attempts=run_attempts, trigger=trigger)
        settlement = settle(claim, answer(500, Code.HTTP_STATUS), schedule=SCHEDULE, now=now, spread=0.0)
        numbers.append(settlement.number)
        assert settlement.trigger is trigger
        if settlement.due_at is None:
            assert settlement.status is Status.FAILED
            return numbers, now - NOW
        now = settlement.due_at
    raise AssertionError("the attempts never ran out")


def test_the_default_schedule_ends_failed_after_ten_attempts_and_75_hours():
    numbers, took = run(0, Trigger.SCHEDULED)
    assert numbers == list(range(1, 11))
    assert took == (75 * 3600 + 35 * 60 + 5) * 1000


def test_a_replay_gets_its_own_fresh_run_with_the_numbers_going_on():
    numbers, took = run(10, Trigger.REPLAY)
    assert numbers == list(range(11, 21))
    assert took == (75 * 3600 + 35 * 60 + 5) * 1000


def test_an_empty_schedule_means_one_attempt():
    assert settle(CLAIMED, answer(500), schedule=[], now=NOW, spread=0.0).status is Status.FAILED


@given(ANSWERS)
def test_a_settlement_is_fenced_by_the_lease_it_was_claimed_with(given_answer):
    settlement = settled(given_answer)
    assert (settlement.delivery_id, settlement.lease, settlement.answer) == ("dlv_1", "l", given_answer)
