"""Pictory AI Studio images, and the other jobs behind the same route.

https://docs.pictory.ai/api-reference/ai-studio/get-image-job (GET /pictoryapis/v1/jobs/{jobid})
"""

from collections.abc import Mapping
from typing import Any

from relay.generation import Code, Output, Problem, Status, Update
from relay.providers import Provider, missing, number, output, text
from relay.schedule import Pace


class Pictory(Provider):
    """Calls back, unsigned, to the `webhook` of the create request. Asks for 10 to 30 s between polls."""

    name = "pictory"
    base_url = "https://api.pictory.ai/pictoryapis/v1"
    pace = Pace(interval=10_000, timeout=30 * 60_000, typical=(45_000, 1.0))
    calls_back = True

    def path(self, job_id: str) -> str:
        return f"/jobs/{job_id}"

    def authorization(self, api_key: str) -> str:
        return api_key

    def claimed_job(self, callback: Any) -> str | None:
        return text(callback.get("job_id")) if isinstance(callback, dict) else None

    def complaint(self, answer: Mapping[str, Any]) -> tuple[str | None, str | None]:
        data = _data(answer)
        code = data.get("error_code", answer.get("error_code"))
        message = data.get("error_message", answer.get("error_message", answer.get("message")))
        return (None if code is None else str(code)), text(message)

    def read(self, answer: Mapping[str, Any], *, now: int) -> Update:
        data = _data(answer)
        word = text(data.get("status"))
        status = STATUSES.get(word or "")
        code, message = self.complaint(answer)
        if code == UNKNOWN_JOB or message == "JOB_NOT_FOUND":
            return missing(answer, message or "JOB_NOT_FOUND", code, word)
        if answer.get("success") is False:
            status = Status.FAILED
        outputs = _outputs(data) if status is Status.COMPLETED else ()
        return Update(
            status=status,
            provider_status=word,
            kind=outputs[0].kind if outputs else None,
            outputs=outputs,
            error=_problem(code, message) if status is Status.FAILED else None,
            credits=number(data.get("aiCreditsUsed")),
            raw=answer,
        )


def _data(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    data = answer.get("data")
    return data if isinstance(data, dict) else {}


def _outputs(data: Mapping[str, Any]) -> tuple[Output, ...]:
    """An image job has `url`, documented to be a PNG; a video job has `duration` too; a render `videoURL`."""
    if text(data.get("videoURL")):
        return output(data["videoURL"], kind="video")
    size = {"width": data.get("width"), "height": data.get("height")}
    if "duration" in data:
        return output(data.get("url"), kind="video", **size)
    return output(data.get("url"), kind="image", content_type="image/png", **size)


def _problem(code: str | None, message: str | None) -> Problem:
    known = Code.PROVIDER_ERROR if (code or "").endswith("_FAILED") else Code.UNKNOWN
    return Problem(known, message or code or "Pictory gave no reason", provider_code=code)


UNKNOWN_JOB = "5000"
STATUSES = {
    "in-progress": Status.PROCESSING,
    "completed": Status.COMPLETED,
    "failed": Status.FAILED,
}
