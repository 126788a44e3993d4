"""What is learned from a generation that has ended."""

from dataclasses import replace

from relay.generation import Code, Generation, Problem, Status, Update
from relay.standing import how_long

START = 1_000_000
ENDED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.FAILED,
    created_at=START, deadline_at=START + 600_000, due_at=None, known_at=START + 65_000,
    update=Update(Status.FAILED, error=Problem(Code.PROVIDER_ERROR, "…")),
)  # fmt: skip


def test_a_job_that_failed_took_some_time_and_one_that_never_was_took_none():
    assert how_long(ENDED) is not None
    never_was = Update(Status.FAILED, error=Problem(Code.NOT_FOUND, "no such job"))
    assert how_long(replace(ENDED, update=never_was)) is None
