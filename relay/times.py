"""Times and durations: unix milliseconds inside, RFC 3339 and `15s` at the edges."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(at: int) -> str:
    """Unix milliseconds as `2026-03-16T14:30:12.000Z`."""
    return (_EPOCH + timedelta(milliseconds=at)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_rfc3339(text: object) -> int | None:
    """Unix milliseconds of an ISO 8601 time, None for what is not one; without an offset it is UTC."""
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
        return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        return None


def parse_duration(text: str) -> int:
    """Milliseconds of `500ms`, `5s`, `0.5s`, `10m`, `2h` or `30d`. Raises ValueError for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write 500ms, 5s, 10m, 2h or 30d")
    return round(float(match[1]) * _UNITS[match[2]])


def parse_retry_after(text: str | None, now: int) -> int | None:
    """Milliseconds to wait by a Retry-After header (seconds or an HTTP date), None for nonsense.

    RFC 9110 section 10.2.3. Callers put their own cap on it.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d{1,12}", text.strip()):
        return int(text) * 1000
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    wait = round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000) - now
    return wait if wait > 0 else None
