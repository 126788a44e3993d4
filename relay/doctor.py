"""`relay doctor`: what is stuck at a running relay, why, and what to do; all of it from its API."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import httpx
import typer
from rich.markup import escape
from rich.table import Column, Table

from relay.console import err, out
from relay.remote import HERE, AsJson, Key, Refused, Remote, Url
from relay.times import parse_rfc3339, rfc3339

commands = typer.Typer()
_MINUTE, _DAY = 60_000, 86_400_000
# What waits for less is on its way.
_PATIENCE = 5 * _MINUTE
# A job is late after so many times of what nearly all jobs of its account take, and a while.
_TIMES, _NEARLY_ALL, _ENOUGH = 3, 0.95, 10
_SOON = 7 * _DAY
# What failed in the last day was made within so many days, when the schedule is not longer than ours.
_SCHEDULE = 6 * _DAY
_MOST = 1000  # of a list
_EXAMPLES = 20  # endpoints whose last error is looked up
_CHECKS = {
    "database": "see the relay's log: it names the error; nothing is acknowledged meanwhile, nothing is lost",
    "migrations": "run `relay migrate`, or restart the relay",
    "clock": "set the clock of the relay's machine: use NTP",
    "disk": "make room on the disk of the database, or lower min_free",
}
_LOOP = "restart the relay: what it was at is taken up again; keep its log for a bug report"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to do. `since` is RFC 3339, where it is known."""

    subject: str
    problem: str
    since: str | None
    advice: str


@commands.command()
def doctor(url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Say what is stuck at a running relay, why, and what to do; 1 when there is something."""
    remote, now = Remote(url, api_key), time.time_ns() // 1_000_000
    found = list(_not_ready(remote))
    # Without a database there is nothing more to be learned.
    if not any(one.subject == "database" for one in found):
        found += _endpoints(remote, now)
        found += _accounts(remote, now)
        found += _deliveries(remote, now)
        found += _replays(remote, now)
        found += _keys(remote, now)
    if as_json:
        out.print_json(json.dumps({"data": [asdict(one) for one in found]}))
    elif found:
        table = Table("what", Column("problem", overflow="fold"), Column("since", no_wrap=True), "what to do")
        for one in found:
            since = one.since.partition(".")[0] + "Z" if one.since else "–"
            table.add_row(escape(one.subject), escape(one.problem), since, escape(one.advice))
        out.print(table)
    else:
        out.print("[green]Nothing to do.[/]")
    raise typer.Exit(1 if found else 0)


def _not_ready(remote: Remote) -> Iterator[Finding]:
    try:
        answer = remote.send("GET", "/readyz")
        checks = _checks(answer) if answer.status_code in (200, 503) else None
        # A proxy has a 503 of its own.
        if checks is None:
            raise Refused.of(answer)
    except Refused as error:
        raise error.shown() from error
    for name, verdict in checks.items():
        if verdict != "ok":
            yield Finding(name, verdict, None, _CHECKS.get(name, _LOOP))


def _checks(answer: httpx.Response) -> Mapping[str, str] | None:
    """What a relay says of itself; None when this is no relay's answer."""
    try:
        checks = answer.json()["checks"]
    except (ValueError, KeyError, TypeError):
        return None
    return checks if isinstance(checks, dict) else None


def _endpoints(remote: Remote, now: int) -> Iterator[Finding]:
    looked_up = 0
    for one in _all(remote, "/v1/endpoints"):
        about, enable = f"endpoint {one['id']}", f"`relay endpoints enable {one['id']}`"
        if one["status"] == "disabled":
            problem = f"{one['url']} is disabled: {one['disabled_reason']}"
            advice = f"when it answers again {enable}, else delete it; nothing is sent meanwhile"
            yield Finding(about, problem, one["disabled_at"], advice)
        elif one["failing_since"] is not None:
            looked_up += 1
            error = _last_error(remote, one["id"]) if looked_up <= _EXAMPLES else None
            problem = f"every attempt at {one['url']} fails" + (f": {error}" if error else "")
            advice = "mend it: it is sent to less and less often, and after 5 days disabled"
            yield Finding(about, problem, one["failing_since"], advice)
        until = parse_rfc3339(one["previous_secret_expires_at"])
        if until is not None and now < until <= now + _SOON:
            problem = f"its previous secret signs until {one['previous_secret_expires_at']}"
            yield Finding(about, problem, None, "have all receivers take the new secret before")


def _last_error(remote: Remote, endpoint_id: str) -> str | None:
    for status in ("pending", "failed"):
        query = {"endpoint_id": endpoint_id, "status": status, "limit": 50}
        for one in remote.call("GET", "/v1/deliveries", query=query)["data"]:
            if one["attempt_count"]:
                attempts = remote.call("GET", f"/v1/deliveries/{one['id']}")["attempts"]
                error = attempts[-1]["error"] if attempts else None
                return str(error["message"]) if error is not None else None
    return None


def _accounts(remote: Remote, now: int) -> Iterator[Finding]:
    for one in _all(remote, "/v1/accounts"):
        about = f"account {one['name']}"
        if one["status"] == "unauthorized":
            advice = "give it a key that is taken: " + (
                "in the configuration, then restart" if one["configured"] else "PATCH /v1/accounts/…"
            )
            yield Finding(
                about, f"{one['provider']} refuses its key: {one['last_error']}", one["last_error_at"], advice
            )
        elif one["status"] == "failing":
            advice = "wait for its provider, which is probed; deadlines wait too, and no generation fails"
            problem = f"{one['provider']} does not answer: {one['last_error']}"
            yield Finding(about, problem, one["last_error_at"], advice)
        next_at = parse_rfc3339(one["budget"]["next_request_at"])
        if one["status"] == "ok" and next_at is not None and next_at > now + _PATIENCE:
            problem = f"its requests are used up until {one['budget']['next_request_at']}"
            yield Finding(about, problem, None, "raise requests_per_day if its provider allows more")
        yield from _late(remote, one["name"], now)


def _late(remote: Remote, account: str, now: int) -> Iterator[Finding]:
    ended = islice(_all(remote, "/v1/generations", account=account, status="completed", limit=100), 100)
    took = sorted(one["duration_ms"] for one in ended if one["duration_ms"] is not None)
    usual = took[int(len(took) * _NEARLY_ALL)] if len(took) >= _ENOUGH else None
    until = rfc3339(now - _TIMES * (usual or 0) - _PATIENCE)
    late = [
        one
        for status in ("queued", "processing")
        for one in _all(remote, "/v1/generations", account=account, status=status, until=until)
        # Without anything to compare with, only what goes wrong is worth a word.
        if usual is not None or one["last_error"] is not None or one["job_id"] is None
    ]
    if not late:
        return
    oldest = min(late, key=lambda one: str(one["watched_at"]))
    problem = f"not ended yet: {_many(len(late), 'generation')} of {account}"
    if usual is not None:
        problem += f", where nearly all take {usual / 1000:.1f} s at most"
    if oldest["last_error"]:
        problem += f"; {oldest['last_error']}"
    advice = f"look at the job at its provider; else it is timed_out at {oldest['deadline_at']}"
    if oldest["job_id"] is None:
        advice = "its provider has not called back and the job id is not known: PATCH it, or DELETE it"
    yield Finding(f"generation {oldest['id']}", problem, oldest["watched_at"], advice)


def _deliveries(remote: Remote, now: int) -> Iterator[Finding]:
    waiting: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in _all(remote, "/v1/deliveries", status="pending", until=rfc3339(now - _PATIENCE)):
        waiting[one["endpoint_id"] or one["url"]].append(one)
    for deliveries in waiting.values():
        oldest = min(deliveries, key=lambda one: str(one["created_at"]))
        problem = f"{_many(len(deliveries), 'delivery')} waiting for {oldest['url']}"
        due = parse_rfc3339(oldest["next_attempt_at"])
        if due is not None and due < now - _MINUTE:
            problem += (
                ", due and held back: its endpoint is paused, after failures or because it asked for it"
                " (Retry-After), or its rate_limit is reached"
            )
        elif oldest["next_attempt_at"] is not None:
            problem += f", the next attempt at {oldest['next_attempt_at']}"
        advice = f"`relay deliveries show {oldest['id']}` tells how its attempts went"
        yield Finding(f"delivery {oldest['id']}", problem, oldest["created_at"], advice)
    # When a delivery was made says nothing of when it failed: that may be the whole schedule later.
    failed = list(_all(remote, "/v1/deliveries", status="failed"))
    is_cut, yesterday = len(failed) >= _MOST, rfc3339(now - _DAY)
    by_url: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in failed:
        if one["updated_at"] >= yesterday:
            by_url[one["url"]].append(one)
    for url, deliveries in by_url.items():
        newest = max(deliveries, key=lambda one: str(one["updated_at"]))
        since = min(one["created_at"] for one in deliveries)
        if is_cut:
            since = min(since, rfc3339(now - _SCHEDULE))
        many = _many(len(deliveries), "delivery", is_cut=is_cut)
        problem = f"{many} to {url} failed for good in the last day"
        again = f"relay replay --endpoint {newest['endpoint_id']} --since {since}"
        if newest["endpoint_id"] is None:
            again = f"relay deliveries replay {newest['id']}"
        advice = f"when it answers again, `{again}`"
        yield Finding(f"delivery {newest['id']}", problem, newest["updated_at"], advice)


def _replays(remote: Remote, now: int) -> Iterator[Finding]:
    replays = (_all(remote, "/v1/replays", status=status) for status in ("running", "pending"))
    for one in chain.from_iterable(replays):
        moved_at = parse_rfc3339(one["updated_at"]) or now
        # A slow one rests for as long between two.
        if moved_at < now - _PATIENCE - 2000 / one["rate_limit"]:
            problem = f"{one['done']:,} of {one['total']:,} are replayed, and it does not get on"
            advice = (
                "an endpoint that it is of does not keep up: mend or disable that,"
                f" or `relay replays cancel {one['id']}`"
            )
            yield Finding(f"replay {one['id']}", problem, one["updated_at"], advice)


def _keys(remote: Remote, now: int) -> Iterator[Finding]:
    if remote.send("GET", "/v1/keys", query={"limit": 1}).status_code == 403:
        err.print("[dim]keys are not looked at: that needs a key with the scope admin[/]")
        return
    for one in _all(remote, "/v1/keys"):
        until = parse_rfc3339(one["expires_at"])
        if one["revoked_at"] is None and until is not None and now < until <= now + _SOON:
            problem = f"{one['name'] or 'a key'} of tenant {one['tenant']} expires at {one['expires_at']}"
            yield Finding(f"key {one['id']}", problem, None, "make another one: `relay keys create`")


def _all(remote: Remote, path: str, **filters: Any) -> Iterator[Any]:
    """What a list has, the newest first, up to `_MOST` of it."""

    def pages() -> Iterator[Sequence[Any]]:
        cursor = None
        while True:
            page = remote.call("GET", path, query={"limit": 200, **filters, "cursor": cursor})
            yield page["data"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    return islice((one for page in pages() for one in page), _MOST)


def _many(count: int, noun: str, *, is_cut: bool = False) -> str:
    is_cut = is_cut or count >= _MOST
    more = " or more" if is_cut else ""
    plural = (
        noun if count == 1 and not is_cut else noun.removesuffix("y") + ("ies" if noun.endswith("y") else "s")
    )
    return f"{count}{more} {plural}"
