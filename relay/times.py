"""Times and durations: unix milliseconds inside, RFC 3339 and `15s` at the edges."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_LONGEST = 3650 * 86_400_000
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_YEAR_10000 = 253_402_300_800_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(at: int) -> str:
    """Unix milliseconds as `2026-03-16T14:30:12.000Z`."""
    return (_EPOCH + timedelta(milliseconds=at)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_rfc3339(text: object) -> int | None:
    """Unix milliseconds of an ISO 8601 time since 1970, else None; without an offset it is UTC."""
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
        milliseconds = round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        return None
    return milliseconds if 0 <= milliseconds < _YEAR_10000 else None


def parse_duration(text: str) -> int:
    """Milliseconds of `500ms`, `5s`, `0.5s`, `10m`, `2h` or `30d`. Raises ValueError for anything else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write 500ms, 5s, 10m, 2h or 30d")
    milliseconds = float(match[1]) * _UNITS[match[2]]
    if milliseconds > _LONGEST:
        raise ValueError(f"{text!r} is longer than ten years")
    return round(milliseconds)


def parse_retry_after(text: str | None, now: int) -> int | None:
    """Milliseconds to wait by a Retry-After header (seconds or an HTTP date), None for nonsense.

    RFC 9110 section 10.2.3. Callers put their own cap on it.
    """
    if text is None:
        return None
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,12}", text):
        return int(text) * 1000
    try:
        at = parsedate_to_datetime(text)
        wait = round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000) - now
    except (ValueError, TypeError, OverflowError):
        return None
    return wait if wait > 0 else None
