"""PixelLabs images. https://docs.pixellabsai.app (GET /v1/generate/{id})"""

from collections.abc import Mapping
from typing import Any

from relay.generation import Code, Problem, Status, Update
from relay.providers import Provider, number, output, text
from relay.schedule import Pace
from relay.times import parse_rfc3339


class PixelLabs(Provider):
    """Polled only. The free tier allows 60 requests a minute; an image takes about 12 s."""

    name = "pixellabs"
    base_url = "https://api.pixellabsai.app/v1"
    pace = Pace(interval=1_000, timeout=15 * 60_000, typical=(13_000, 0.6))
    requests_per_minute = 60
    requests_per_day = 1_000

    def path(self, job_id: str) -> str:
        return f"/generate/{job_id}"

    def read(self, answer: Mapping[str, Any], *, now: int) -> Update:
        word = text(answer.get("status"))
        status = STATUSES.get(word or "")
        metadata = answer.get("metadata")
        progress = number(answer.get("progress"))
        outputs = output(answer.get("imageUrl"), permanent_url=answer.get("arweaveUrl"))
        return Update(
            status=status,
            provider_status=word,
            kind=outputs[0].kind if outputs else None,
            model=text(metadata.get("model")) if isinstance(metadata, dict) else None,
            progress=min(progress / 100, 1.0) if progress is not None else None,
            outputs=outputs if status is Status.COMPLETED else (),
            error=_problem(answer) if status is Status.FAILED else None,
            created_at=parse_rfc3339(answer.get("createdAt")),
            completed_at=parse_rfc3339(answer.get("completedAt")),
            remaining_ms=_remaining(answer, now),
            raw=answer,
        )


def _remaining(answer: Mapping[str, Any], now: int) -> int | None:
    """`estimatedTime` is in seconds, from the beginning."""
    estimated, created_at = number(answer.get("estimatedTime")), parse_rfc3339(answer.get("createdAt"))
    if estimated is None or created_at is None:
        return None
    return max(0, round(created_at + estimated * 1000 - now))


def _problem(answer: Mapping[str, Any]) -> Problem:
    # No failure field of a job is documented; these two are the ones of the API's own errors.
    code = text(answer.get("error"))
    message = text(answer.get("message")) or code or "PixelLabs gave no reason"
    return Problem(ERRORS.get(code or "", Code.UNKNOWN), message, provider_code=code)


STATUSES = {
    "queued": Status.QUEUED,
    "processing": Status.PROCESSING,
    "completed": Status.COMPLETED,
    "failed": Status.FAILED,
}
ERRORS = {
    "validation_error": Code.INVALID_REQUEST,
    "rate_limit_exceeded": Code.RATE_LIMITED,
    "internal_error": Code.PROVIDER_ERROR,
    "not_found": Code.NOT_FOUND,
}
