"""Times and durations at the edges."""

from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.times import parse_duration, parse_retry_after, parse_rfc3339, rfc3339

FIRST = 0
LAST = round(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp() * 1000)
NOW = 1_773_671_412_000


@given(st.integers(FIRST, LAST))
def test_a_time_survives_the_round_trip(at):
    assert parse_rfc3339(rfc3339(at)) == at


def test_a_time_is_written_in_utc_with_milliseconds():
    assert rfc3339(NOW) == "2026-03-16T14:30:12.000Z"
    assert rfc3339(NOW + 7) == "2026-03-16T14:30:12.007Z"


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-16T14:30:12Z",
        "2026-03-16T14:30:12.000+00:00",
        "2026-03-16T16:30:12+02:00",
        "2026-03-16T14:30:12",
        "2026-03-16 14:30:12.000000Z",
    ],
)
def test_spellings_of_one_time(text):
    assert parse_rfc3339(text) == NOW


@pytest.mark.parametrize("value", ["created_at", "", "2026-13-01T00:00:00Z", "1e9", None, 5, 1.5, [], {}])
def test_what_is_not_a_time_is_none(value):
    assert parse_rfc3339(value) is None


@given(
    st.text()
    | st.datetimes(timezones=st.timezones() | st.none()).map(datetime.isoformat)
    | st.from_regex(r"(0001-01-01|9999-12-31)T\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", fullmatch=True)
)
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
@example("9999-12-31T23:59:59.9999999Z")
def test_a_time_that_is_read_can_be_written(text):
    at = parse_rfc3339(text)
    if at is not None:
        assert parse_rfc3339(rfc3339(at)) == at


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("500ms", 500), ("5s", 5_000), ("0.5s", 500), ("10m", 600_000), ("2h", 7_200_000),
        ("30d", 2_592_000_000), ("0s", 0), ("1.5h", 5_400_000),
    ],
)  # fmt: skip
def test_durations(text, milliseconds):
    assert parse_duration(text) == milliseconds


@pytest.mark.parametrize(
    "text", ["", "5", "s", "-5s", "5 sec", "1h30m", "5S", ".5s", "1e3s", "nans", "9" * 400 + "d"]
)
def test_what_is_not_a_duration_is_refused(text):
    with pytest.raises(ValueError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("120", 120_000), ("0", 0), (" 7 ", 7_000), ("7\x1f", 7_000), ("١٢", None),
        ("Mon, 16 Mar 2026 14:31:12 GMT", 60_000), ("Monday, 16-Mar-26 14:31:12 GMT", 60_000),
        ("Mon, 16 Mar 2026 14:29:12 GMT", None), (None, None), ("", None), ("-5", None), ("1.5", None),
        ("soon", None), (f"Mon, 16 Mar {10**20} 14:31:12 GMT", None),
        (f"Mon, 16 Mar 2026 14:31:12 +{10**20}", None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(text, wait):
    assert parse_retry_after(text, NOW) == wait


@given(
    st.text() | st.from_regex(r"Mon, \d{1,22} Mar \d{1,22} \d\d:\d\d:\d\d ([+-]\d{1,22}|GMT)"),
    st.integers(0, LAST),
)
def test_any_retry_after_is_a_wait_or_nonsense(text, now):
    wait = parse_retry_after(text, now)
    assert wait is None or wait >= 0
