"""Vivix Atelier images and videos. https://getvivix.com/docs/api (GET /api/v1/generations/{id})"""

import hmac
from collections.abc import Mapping, Sequence
from typing import Any

from relay.generation import Code, Output, Problem, Status, Update
from relay.providers import MOST_OUTPUTS, Provider, number, output, text, whole
from relay.schedule import Pace
from relay.times import parse_rfc3339


class Vivix(Provider):
    """Polled. About 12 s for an image, 90 s for a video; a failed job's credits are refunded.

    Each webhook of the account's settings is called for every job and signed with a secret of its own
    (https://getvivix.com/docs/api/webhooks). The time is not signed: what was sent once can be sent again.
    """

    name = "vivix"
    base_url = "https://vivix-atelier.vercel.app/api/v1"
    pace = Pace(interval=1_000, timeout=30 * 60_000, typical=(15_000, 1.0))
    signs = True

    def path(self, job_id: str) -> str:
        return f"/generations/{job_id}"

    def not_found(self, status: int, answer: Any) -> bool:
        code = answer.get("error") if isinstance(answer, dict) else None
        return super().not_found(status, answer) or (status == 403 and code == "NOT_YOURS")

    def signed(self, headers: Mapping[str, str], body: bytes, secrets: Sequence[str]) -> bool:
        given = headers.get("x-vivix-signature", "").encode()
        expected = [f"sha256={hmac.digest(one.encode(), body, 'sha256').hex()}" for one in secrets]
        return any([hmac.compare_digest(given, one.encode()) for one in expected])

    def claimed_job(self, callback: Any) -> str | None:
        return text(callback.get("generation_id")) if isinstance(callback, dict) else None

    def read(self, answer: Mapping[str, Any], *, now: int) -> Update:
        word = text(answer.get("status"))
        status = STATUSES.get(word or "")
        outputs = _outputs(answer) if status is Status.COMPLETED else ()
        return Update(
            status=status,
            provider_status=word,
            kind=outputs[0].kind if outputs else None,
            model=text(answer.get("model")),
            outputs=outputs,
            error=_problem(answer) if status is Status.FAILED else None,
            credits=number(answer.get("credits_used")),
            created_at=parse_rfc3339(answer.get("created_at")),
            completed_at=parse_rfc3339(answer.get("completed_at")),
            duration_ms=whole(answer.get("duration_ms")),
            elapsed_ms=whole(answer.get("elapsed_ms")),
            raw=answer,
        )


def _outputs(answer: Mapping[str, Any]) -> tuple[Output, ...]:
    """`output_urls` is the full set; `output_url` alone is its first."""
    urls = answer.get("output_urls")
    given = urls[:MOST_OUTPUTS] if isinstance(urls, list) else ()
    found = tuple(one for url in given for one in output(url))
    return found or output(answer.get("output_url"))


def _problem(answer: Mapping[str, Any]) -> Problem:
    provider_code = text(answer.get("error"))
    code, retryable = ERRORS.get(provider_code or "", (Code.UNKNOWN, None))
    message = text(answer.get("message")) or provider_code or "Vivix gave no reason"
    return Problem(code, message, retryable, provider_code)


STATUSES = {
    "pending": Status.QUEUED,
    "processing": Status.PROCESSING,
    "completed": Status.COMPLETED,
    "failed": Status.FAILED,
}
# Only PROVIDER_ERROR is documented for a job; the others are the codes of the API's own errors.
ERRORS: Mapping[str, tuple[Code, bool | None]] = {
    "PROVIDER_ERROR": (Code.PROVIDER_ERROR, True),
    "RATE_LIMITED": (Code.RATE_LIMITED, True),
    "INSUFFICIENT_CREDITS": (Code.INSUFFICIENT_CREDITS, False),
    "MODEL_NOT_ALLOWED": (Code.INVALID_REQUEST, False),
    "TIER_LOCKED": (Code.INVALID_REQUEST, False),
    "NOT_FOUND": (Code.NOT_FOUND, False),
}
