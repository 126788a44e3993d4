"""Luma Agents images and videos. https://docs.agents.lumalabs.ai (GET /v1/generations/{id})"""

from collections.abc import Mapping
from typing import Any

from relay.generation import Code, Output, Problem, Status, Update
from relay.providers import KINDS, MOST_OUTPUTS, Provider, output, text
from relay.schedule import Pace
from relay.times import parse_rfc3339

OUTPUT_LIFETIME = 3_600_000


class Luma(Provider):
    """Polled only. Output URLs are presigned and expire an hour after they were given."""

    name = "luma"
    base_url = "https://agents.lumalabs.ai/v1"
    pace = Pace(interval=1_000, timeout=30 * 60_000, typical=(20_000, 1.0))

    def path(self, job_id: str) -> str:
        return f"/generations/{job_id}"

    def read(self, answer: Mapping[str, Any], *, now: int) -> Update:
        word = text(answer.get("state"))
        status = STATUSES.get(word or "")
        outputs = _outputs(answer.get("output"), now) if status is Status.COMPLETED else ()
        # `image_edit` and `video_reframe` are kinds of work; the medium is the first word.
        kind = (text(answer.get("type")) or "").partition("_")[0]
        return Update(
            status=status,
            provider_status=word,
            kind=kind if kind in KINDS else next((one.kind for one in outputs if one.kind in KINDS), None),
            model=text(answer.get("model")),
            outputs=outputs,
            error=_problem(answer) if status is Status.FAILED else None,
            created_at=parse_rfc3339(answer.get("created_at")),
            raw=answer,
        )


def _outputs(given: Any, now: int) -> tuple[Output, ...]:
    return tuple(
        one
        for item in (given[:MOST_OUTPUTS] if isinstance(given, list) else ())
        if isinstance(item, dict)
        for one in output(item.get("url"), kind=text(item.get("type")), expires_at=now + OUTPUT_LIFETIME)
    )


def _problem(answer: Mapping[str, Any]) -> Problem:
    provider_code = text(answer.get("failure_code"))
    code, retryable = FAILURES.get(provider_code or "", (Code.UNKNOWN, None))
    message = text(answer.get("failure_reason")) or provider_code or "Luma gave no reason"
    return Problem(code, message, retryable, provider_code)


STATUSES = {
    "queued": Status.QUEUED,
    "processing": Status.PROCESSING,
    "completed": Status.COMPLETED,
    "failed": Status.FAILED,
}
# Retryable by Luma's own table (guides/error-handling); it is not readable for the last two.
FAILURES: Mapping[str, tuple[Code, bool | None]] = {
    "content_moderated": (Code.CONTENT_MODERATED, False),
    "generation_failed": (Code.PROVIDER_ERROR, True),
    "budget_exhausted": (Code.INSUFFICIENT_CREDITS, False),
    "output_not_found": (Code.NO_OUTPUT, True),
    "image_too_large": (Code.INVALID_REQUEST, False),
    "unsupported_format": (Code.INVALID_REQUEST, False),
    "corrupt_input": (Code.INVALID_REQUEST, False),
    "invalid_request": (Code.INVALID_REQUEST, False),
    "rate_limited": (Code.RATE_LIMITED, True),
}
