"""The state laws of a generation, for any history."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.generation import (
    ENDINGS,
    FINAL,
    MOVES,
    OPEN,
    Code,
    Generation,
    LearnedBy,
    Output,
    Problem,
    Status,
    Update,
)

START, DEADLINE = 1_000_000, 1_600_000
QUEUED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.QUEUED,
    created_at=START, deadline_at=DEADLINE, due_at=START,
)  # fmt: skip
OUTPUT = Output(url="https://a.test/1.png")
BROKEN = Problem(Code.PROVIDER_ERROR, "broken")

UPDATES = st.builds(
    Update,
    status=st.sampled_from([None, *sorted(set(Status) - {Status.TIMED_OUT})]),
    provider_status=st.sampled_from(["a", "b", None]),
    progress=st.sampled_from([None, 0.5, 1.0]),
    outputs=st.sampled_from([(), (OUTPUT,), (OUTPUT, OUTPUT)]),
    error=st.sampled_from([None, BROKEN]),
)
DEADLINE_PASSES = "the deadline passes"


@st.composite
def histories(draw) -> list[Update | str]:
    """Updates as they may arrive: repeated, out of order, with the deadline somewhere among them."""
    told = draw(st.lists(UPDATES, max_size=8))
    repeated = draw(st.lists(st.sampled_from(told), max_size=4)) if told else []
    return draw(st.permutations([*told, *repeated, *[DEADLINE_PASSES] * draw(st.integers(0, 2))]))


def states(history: list[Update | str]) -> list[Generation]:
    """Every state the generation goes through, the first included; no news adds none."""
    passed = [QUEUED]
    for now, told in enumerate(history, START):
        generation = passed[-1]
        update, learned_by = told, LearnedBy.POLL
        if told == DEADLINE_PASSES:
            update, learned_by = generation.timed_out(), LearnedBy.DEADLINE
        after = generation.after(update, now=now, learned_by=learned_by)
        if after is not None:
            passed.append(after)
    return passed


@given(histories())
def test_a_status_moves_only_along_moves(history):
    passed = states(history)
    for before, after in pairwise(passed):
        assert after.status == before.status or after.status in MOVES[before.status]


@given(histories())
def test_there_is_at_most_one_final_ending_and_nothing_after_it(history):
    endings = [generation.status in FINAL for generation in states(history)]
    assert not any(endings[:-1])


@given(histories(), UPDATES, st.sampled_from(sorted(FINAL)))
def test_a_final_ending_is_sticky(history, update, final):
    ended = replace(states(history)[-1], status=final)
    assert ended.after(update, now=DEADLINE, learned_by=LearnedBy.CALLBACK) is None
    assert ended.after(ended.timed_out(), now=DEADLINE, learned_by=LearnedBy.DEADLINE) is None


@given(histories())
def test_only_an_answer_after_timed_out_is_late(history):
    passed = states(history)
    timed_out = [generation.status is Status.TIMED_OUT for generation in passed]
    for index, generation in enumerate(passed):
        assert generation.late == any(timed_out[:index])


@given(histories())
def test_completed_always_has_an_output_and_timed_out_never(history):
    for generation in states(history):
        if generation.status is Status.COMPLETED:
            assert generation.update.outputs
        if generation.status is Status.TIMED_OUT:
            assert not generation.update.outputs
            assert generation.update.error.code is Code.TIMED_OUT


@given(histories())
def test_an_ending_is_known_with_its_time_and_its_source_and_final_ones_are_not_asked_about(history):
    for generation in states(history):
        assert (generation.known_at is not None) == generation.ended == (generation.status in ENDINGS)
        assert (generation.learned_by is not None) == generation.ended
        assert (generation.due_at is None) == (generation.status in FINAL)


@given(histories())
def test_an_update_that_was_just_told_is_no_news(history):
    generation = states(history)[-1]
    if generation.update is not None:
        assert generation.after(generation.update, now=DEADLINE, learned_by=LearnedBy.POLL) is None


@given(UPDATES)
def test_after_timed_out_only_an_ending_is_news(update):
    timed_out = QUEUED.after(QUEUED.timed_out(), now=DEADLINE, learned_by=LearnedBy.DEADLINE)
    after = timed_out.after(update, now=DEADLINE + 1, learned_by=LearnedBy.POLL)
    assert (after is not None) == (update.status in FINAL)


@pytest.mark.parametrize("status", sorted(OPEN))
def test_completed_without_an_output_is_failed_with_no_output(status):
    after = replace(QUEUED, status=status).after(
        Update(Status.COMPLETED, "completed"), now=5, learned_by=LearnedBy.POLL
    )
    assert (after.status, after.update.status, after.update.error.code) == (
        Status.FAILED, Status.FAILED, Code.NO_OUTPUT,
    )  # fmt: skip
    assert after.update.provider_status == "completed"


def test_a_processing_that_comes_after_the_end_changes_nothing():
    completed = QUEUED.after(Update(Status.COMPLETED, outputs=(OUTPUT,)), now=5, learned_by=LearnedBy.POLL)
    assert completed.after(Update(Status.PROCESSING), now=6, learned_by=LearnedBy.CALLBACK) is None


def test_an_unknown_status_is_news_once_and_moves_nothing():
    unknown = Update(None, "dreaming")
    after = QUEUED.after(unknown, now=5, learned_by=LearnedBy.POLL)
    assert (after.status, after.update, after.ended) == (Status.QUEUED, unknown, False)
    assert after.after(unknown, now=6, learned_by=LearnedBy.POLL) is None


def test_progress_is_news():
    half = Update(Status.PROCESSING, "processing", progress=0.5)
    more = replace(half, progress=0.6)
    after = QUEUED.after(half, now=5, learned_by=LearnedBy.POLL)
    assert after.after(more, now=6, learned_by=LearnedBy.POLL).update == more


def test_timed_out_says_that_the_job_may_still_finish_and_what_went_wrong_last():
    problem = replace(QUEUED, last_error="luma answered 503").timed_out().error
    assert "may still finish" in problem.message
    assert "luma answered 503" in problem.message
    assert problem.retryable is None
