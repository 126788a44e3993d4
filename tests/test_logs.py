"""What is logged: one wide line for each attempt and for each generation that has ended."""

import json
import logging

import pytest

from relay.logs import LONGEST_FIELD, WideFormatter
from relay.redact import BLOT, Redactor
from tests.conftest import World


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def said(lines: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    formatter = WideFormatter(as_json=True, clean=Redactor())
    return [json.loads(formatter.format(one)) for one in lines.records if one.getMessage() == event]


async def test_each_attempt_and_each_end_is_one_line_that_says_all(world: World, lines):
    world.subscriber.answer(503, 204)
    async with world.running(delivery={"timeout": "2s", "schedule": ["50ms"]}) as relay:
        endpoint = await world.endpoint(relay)
        made = await world.watch(relay, "pixellabs")
        await world.subscriber.got(2)
    [ended] = said(lines, "generation.ended")
    first, second = said(lines, "delivery.attempted")
    assert (
        ended
        | {
            "level": "info",
            "generation": made["id"],
            "provider": "pixellabs",
            "account": "pixellabs",
            "job": made["job_id"],
            "status": "completed",
            "learned_by": "poll",
            "outputs": 1,
            "late": False,
        }
        == ended
    )
    assert ended["asks"] >= 1
    assert ended["known_lag_ms"] >= 0
    assert (
        first
        | {
            "generation": made["id"],
            "event_id": ended["event_id"],
            "type": "generation.completed",
            "endpoint": endpoint["id"],
            "attempt": 1,
            "trigger": "scheduled",
            "status": "pending",
            "response": 503,
            "code": "http_status",
        }
        == first
    )
    assert first["again_at"] > first["at"][:10]
    assert second | {"attempt": 2, "status": "delivered", "response": 204} == second
    assert "again_at" not in second
    # An end is told once, not as a move as well.
    assert "completed" not in {one["to"] for one in said(lines, "generation.moved")}


async def test_a_generation_that_failed_says_why(world: World, lines):
    async with world.running() as relay:
        await world.endpoint(relay)
        await world.watch(relay, "luma", outcome="failed")
        await world.subscriber.got(1)
    [ended] = said(lines, "generation.ended")
    assert (ended["status"], ended["outputs"]) == ("failed", 0)
    assert ended["code"]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_field_is_cut_but_never_in_the_middle_of_a_secret(as_json: bool):
    secret = "a-secret-of-forty-characters-or-even-more"
    record = logging.makeLogRecord({"msg": "said"})
    record.error = "x" * (LONGEST_FIELD - 20) + secret + "y" * 100_000
    record.short = "short"
    line = WideFormatter(as_json=as_json, clean=Redactor(secret)).format(record)
    assert len(line) < LONGEST_FIELD + 200
    assert BLOT in line
    assert "a-secret" not in line
    assert "short" in line
