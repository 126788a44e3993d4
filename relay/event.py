"""An event is the immutable fact that is announced; its id is the `webhook-id`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from relay import account
from relay.body import compact
from relay.generation import Generation, Output, Status
from relay.ids import new_id
from relay.times import parse_rfc3339, rfc3339

TYPE = re.compile(r"[a-zA-Z0-9_]+(\.[a-zA-Z0-9_]+)*")
ENDINGS = {
    Status.COMPLETED: "generation.completed",
    Status.FAILED: "generation.failed",
    Status.CANCELED: "generation.canceled",
    Status.TIMED_OUT: "generation.timed_out",
}
PROCESSING = "generation.processing"
PROGRESS = "generation.progress"
UNKNOWN_STATUS = "generation.unknown_status"
TEST = "endpoint.test"
DISABLED = "endpoint.disabled"
FAILING = "account.failing"
RECOVERED = "account.recovered"
# True for a moment only: nothing of them is kept unless somebody wants it, and a newer one of the same
# generation, or its ending, takes their place.
FLEETING = (PROCESSING, PROGRESS)
# Not tried again for days: a newer one comes instead, or somebody looks at it now.
TRIED_ONCE = frozenset({*FLEETING, TEST})
# What only Relay says: nobody else may announce these.
RESERVED = ("generation.", "endpoint.", "account.")


@dataclass(frozen=True, slots=True)
class Event:
    """`body` is what is signed, sent and stored, byte for byte. `account` is what its tenant calls it.
    `announces` is what a generation is said to be only once (a status, or `unknown_status`), `source_id` its
    publisher's own name for the event: the database takes each only once. `expires_at` is when the first of
    its outputs' URLs stops to work, None when there is nothing to renew."""

    id: str
    tenant: str
    type: str
    body: bytes
    created_at: int
    generation_id: str | None = None
    account: str | None = None
    announces: str | None = None
    source_id: str | None = None
    expires_at: int | None = None


def news(before: Generation, after: Generation, *, now: int, progress_interval: int) -> Sequence[Event]:
    """What is to be announced of a generation that was as `before` and is as `after`: its ending, which
    leaves nothing else to say, or what is new while it runs."""
    if after.ended:
        return [ending(after, now=now)] if after.status is not before.status else []
    events = []
    if after.status is Status.PROCESSING and before.status is not Status.PROCESSING:
        events.append(_running(PROCESSING, after, now=now, announces=after.status.value))
    if _says_an_unknown_word(before, after):
        events.append(_running(UNKNOWN_STATUS, after, now=now, announces="unknown_status"))
    # What came too soon after the last one is told later, also when the provider says nothing new then.
    may_tell = after is not before or after.progress_at is not None
    if may_tell and after.has_progress_to_tell(now=now, interval=progress_interval):
        events.append(_running(PROGRESS, after, now=now))
    return events


def ending(generation: Generation, *, now: int) -> Event:
    """The announcement of a generation that has just ended."""
    data = describe(generation)
    return _of(
        ENDINGS[generation.status], generation, data, data["completed_at"], now, generation.status.value
    )


def _running(type_: str, generation: Generation, *, now: int, announces: str | None = None) -> Event:
    return _of(type_, generation, describe(generation), rfc3339(now), now, announces)


def _of(
    type_: str, generation: Generation, data: Mapping[str, Any], at: str, now: int, announces: str | None
) -> Event:
    return Event(
        id=new_id("evt", now),
        tenant=generation.tenant,
        type=type_,
        body=envelope(type_, at, data),
        created_at=now,
        generation_id=generation.id,
        account=account.shown(generation.account),
        announces=announces,
        expires_at=_first_expiry(generation),
    )


def _says_an_unknown_word(before: Generation, after: Generation) -> bool:
    said = before.update.provider_status if before.update is not None else None
    update = after.update
    return update is not None and update.status is None and update.provider_status != said


def renewed(event: Event, outputs: Sequence[Output], *, by: int, now: int) -> Event:
    """The same event with what its provider gives now, if any of that outlives `by`; otherwise with what it
    had. URLs that do not live so long are marked, and nobody waits for them any more."""
    content = json.loads(event.body)
    data = content["data"]
    if any(one.expires_at is None or one.expires_at > by for one in outputs):
        data["outputs"] = [_output(one) for one in outputs]
        data["refreshed_at"] = rfc3339(now)
    left = []
    for output in data["outputs"]:
        expires_at = parse_rfc3339(output["expires_at"])
        if expires_at is not None and expires_at <= by:
            output["expired"] = True
        elif expires_at is not None:
            left.append(expires_at)
    return replace(event, body=compact(content), expires_at=min(left, default=None))


def _first_expiry(generation: Generation) -> int | None:
    outputs = generation.update.outputs if generation.ended and generation.update else ()
    return min((one.expires_at for one in outputs if one.expires_at is not None), default=None)


def test(tenant: str, endpoint_id: str, *, now: int) -> Event:
    """A made-up event that says which endpoint was tested."""
    data = {"endpoint_id": endpoint_id, "message": "This is a test: your endpoint can be reached."}
    return Event(new_id("evt", now), tenant, TEST, envelope(TEST, rfc3339(now), data), now)


def is_test_of(event: Event, endpoint_id: str) -> bool:
    """Whether it is that endpoint's test, which no other one is sent."""
    return event.type == TEST and json.loads(event.body)["data"]["endpoint_id"] == endpoint_id


def disabled(tenant: str, endpoint_id: str, url: str, reason: str, *, now: int) -> Event:
    """What the other endpoints of a tenant may hear when Relay gives one up."""
    data = {"endpoint_id": endpoint_id, "url": url, "reason": reason, "disabled_at": rfc3339(now)}
    return Event(new_id("evt", now), tenant, DISABLED, envelope(DISABLED, rfc3339(now), data), now)


def account_failing(tenant: str, account_name: str, provider_name: str, reason: str, *, now: int) -> Event:
    """What those who ask for it hear when an account's provider has stopped answering Relay."""
    return _of_account(FAILING, tenant, account_name, provider_name, {"reason": reason}, now)


def account_recovered(tenant: str, account_name: str, provider_name: str, *, now: int) -> Event:
    """And when it answers again."""
    return _of_account(RECOVERED, tenant, account_name, provider_name, {"status": "ok"}, now)


def _of_account(
    type_: str, tenant: str, name: str, provider: str, said: Mapping[str, str], now: int
) -> Event:
    data = {"account": name, "provider": provider, **said, "since": rfc3339(now)}
    return Event(new_id("evt", now), tenant, type_, envelope(type_, rfc3339(now), data), now, account=name)


def published(tenant: str, type_: str, data: Mapping[str, Any], source_id: str | None, *, now: int) -> Event:
    """Somebody's own event."""
    body = envelope(type_, rfc3339(now), data)
    return Event(new_id("evt", now), tenant, type_, body, now, source_id=source_id)


def envelope(type_: str, timestamp: str, data: Mapping[str, Any]) -> bytes:
    """The body that subscribers receive."""
    return compact({"type": type_, "timestamp": timestamp, "data": data})


def told(event: Event) -> tuple[str, bytes]:
    """When its body says that it happened, and the JSON of its data: what `envelope` wrote, unparsed."""
    head, _, data = event.body.partition(b',"data":')
    return json.loads(head + b"}")["timestamp"], data[:-1]


def describe(generation: Generation) -> dict[str, Any]:
    """A generation in the words of the contract: the `data` of its events, the heart of its API resource."""
    update = generation.update
    created_at = generation.created_at
    completed_at = duration_ms = None
    if update is not None and update.created_at is not None:
        created_at = update.created_at
    if generation.ended:
        completed_at = (update.completed_at if update else None) or generation.known_at
        duration_ms = update.duration_ms if update else None
        if duration_ms is None and completed_at is not None:
            duration_ms = max(0, completed_at - created_at)
    return {
        "id": generation.id,
        "provider": generation.provider,
        "account": account.shown(generation.account),
        "job_id": generation.job_id,
        "status": generation.status.value,
        "provider_status": update.provider_status if update else None,
        "kind": update.kind if update else None,
        "model": update.model if update else None,
        "progress": update.progress if update else None,
        "outputs": [_output(output) for output in update.outputs] if update else [],
        "error": asdict(update.error) if update and update.error else None,
        "usage": {"credits": update.credits if update else None},
        "created_at": rfc3339(created_at),
        "completed_at": rfc3339(completed_at) if completed_at is not None else None,
        "duration_ms": duration_ms,
        "late": generation.late,
        "learned_by": generation.learned_by.value if generation.learned_by else None,
        "metadata": dict(generation.metadata),
        "raw": update.raw if update else None,
    }


def _output(output: Output) -> dict[str, Any]:
    return {
        "url": output.url,
        "kind": output.kind,
        "content_type": output.content_type,
        "width": output.width,
        "height": output.height,
        "expires_at": rfc3339(output.expires_at) if output.expires_at is not None else None,
        "permanent_url": output.permanent_url,
    }
