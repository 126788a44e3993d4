"""Whatever comes in, from providers and from strangers, is understood or refused cleanly, and soon.

What is tried: recorded answers damaged byte by byte and value by value, the providers' own field names with
anything in them, any JSON, any bytes, and named bombs.
"""

import copy
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relay import event
from relay.asker import LARGEST_ANSWER, Asker
from relay.body import parse, storable
from relay.budget import Budget
from relay.callback import Callbacks
from relay.errors import Malformed, ProviderError
from relay.generation import Generation, LearnedBy, Status, Update
from relay.providers import MOST_OUTPUTS, PROVIDERS, Account, Reply, load, understand
from relay.store import Store
from relay.store.events import Change
from relay.store.generations import Watch
from relay.times import rfc3339
from tests.conftest import RunningRelay, World
from tests.program import THOROUGH
from tests.test_openapi import operations
from tests.test_providers import FOLDER, NOW, read
from tests.test_store import NOTHING_HANDED_OVER, a_generation, listed, prepared

EXAMPLES = 100_000 if THOROUGH else 300
OVER_THE_WIRE = 25_000 if THOROUGH else 150  # to a relay or a database, several inputs each
SECONDS_PER_MEBIBYTE = 1.0
MEBIBYTE = 1024 * 1024
SHARED = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
ENDLESS = pytest.mark.timeout(7200 if THOROUGH else 120)
SECRET = "the-secret-of-the-webhook"
REPLIES = {name: [read(path)[1] for path in sorted(FOLDER.glob(f"{name}/*.json"))] for name in PROVIDERS}
ASKER = Asker(httpx.AsyncBaseTransport(), capability="https://relay.test/hooks/", now=lambda: NOW)
WATCHED = Generation(
    id="gen_1", tenant="t", account="a", provider="p", job_id="j", status=Status.QUEUED,
    created_at=NOW, deadline_at=NOW + 600_000, due_at=NOW,
)  # fmt: skip

# What providers could say at their oddest: their own field names with anything in them.
WORDS = [
    "queued", "pending", "processing", "in-progress", "completed", "failed", "dreaming", "",
    "https://a.test/1.png", "https://[", "data:image/png;base64,AA", "2026-06-01T12:00:00Z",
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-23:59",
    "5000", "1e400", "nan", "-1", "1_0", "١٢", "\ud800", "a\0b", "\ufeff", "https://relay.test/hooks/a/b",
    "https://a.test/1.png?X-Amz-Date=20260601T120000Z&X-Amz-Expires=999999999&X-Amz-Signature=a",
    "https://a.test/1.png?Expires=9999999999&Signature=a", "https://a.test/1.png?se=9999-12-31&sig=a",
]  # fmt: skip
NUMBERS = [10**400, -(2**63), 2**63, 2**53, 2**53 - 1, 1e308, 5e-324, -0.0]
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
    | st.integers()
    | st.sampled_from(NUMBERS)
    | st.floats(allow_nan=False)  # infinity is written as 1e999, which is JSON
)
FIELDS = (
    "status state success data type model metadata output output_url output_urls url videoURL imageUrl"
    " arweaveUrl width height duration duration_ms progress renderProgress aiCreditsUsed credits_used error"
    " message error_code error_message failure_code failure_reason detail created_at createdAt completed_at"
    " completedAt elapsed_ms estimatedTime job_id generation_id"
)
NAMES = st.sampled_from(FIELDS.split())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=12) | st.builds(
    lambda outer, data, status, state: {"status": status, "state": state, "data": data, **outer},
    st.dictionaries(NAMES, VALUES, max_size=8),
    st.dictionaries(NAMES, VALUES, max_size=8),
    *[st.sampled_from(["completed", "failed", "processing"])] * 2,
)
# As they come from the wire: each byte is a character.
HEADERS = st.dictionaries(
    st.sampled_from(
        ["retry-after", "x-ratelimit-remaining", "x-ratelimit-reset", "x-vivix-signature", "date"]
    ),
    st.text(st.characters(codec="latin-1"), max_size=12)
    | st.sampled_from([word for word in WORDS if word.isascii()])
    | st.integers().map(str)
    | st.floats().map(str)
    | st.from_regex(r"Mon, 01 Jun [0-9]{1,25} 12:00:00 [+-][0-9]{1,25}"),
)
STATUSES = st.just(200) | st.integers(100, 999)


def written(value: Any) -> bytes:
    return json.dumps(value).replace("Infinity", "1e999").encode()


@st.composite
def damaged(draw: st.DrawFn, bodies: list[bytes]) -> bytes:
    """A recorded body, cut, gnawed, stuffed and repeated."""
    body = bytearray(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        end = at + draw(st.integers(1, 12))
        match draw(st.sampled_from(["cut", "gnaw", "stuff", "repeat"])):
            case "cut":
                del body[at:]
            case "gnaw":
                del body[at:end]
            case "stuff":
                body[at:at] = draw(
                    st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"[", b"\\ud800", b"\0"])
                )
            case "repeat":
                body[at:at] = body[at:end]
    return bytes(body)


@st.composite
def changed(draw: st.DrawFn, answers: list[Any]) -> bytes:
    """A recorded answer in which other values stand in some places."""
    answer = copy.deepcopy(draw(st.sampled_from(answers)))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(places(answer)))
        if isinstance(holder, dict) and draw(st.booleans()):
            holder[draw(NAMES)] = holder.pop(key) if draw(st.booleans()) else draw(VALUES)
        else:
            holder[key] = draw(VALUES)
    return written(answer)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value, as what holds it and where."""
    found = [([value], 0)]
    for holder, key in found:
        inner = holder[key]
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        found += [(inner, one) for one in keys]
    return found[1:]


def replies(name: str) -> st.SearchStrategy[Reply]:
    recorded = [one.body for one in REPLIES[name]]
    answers = [answer for body in recorded if isinstance(answer := json_of(body), dict) and answer]
    bodies = (
        damaged(recorded)
        | changed(answers)
        | OBJECTS.map(written)
        | VALUES.map(written)
        | st.binary(max_size=40)
    )
    return st.builds(Reply, STATUSES, bodies, HEADERS)


def json_of(body: bytes) -> Any:
    try:
        return parse(body)
    except Malformed:
        return None


def account_of(name: str) -> Account:
    provider = load(name)
    return Account(
        name, provider, "K-secret-key", provider.base_url, provider.pace, webhook_secrets=(SECRET,)
    )


def reject(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def check(name: str, reply: Reply) -> Update | None:
    """Gives a reply to everything that reads replies and callbacks; the update, None when it is refused."""
    limit = SECONDS_PER_MEBIBYTE * max(1.0, len(reply.body) / MEBIBYTE)
    for _ in range(10):
        begun = time.process_time()
        update = understood(account_of(name), reply)
        took = time.process_time() - begun
        # Looking for the garbage of so many examples may take a second by itself, but not always.
        if took < limit:
            return update
    raise AssertionError(f"{took:.1f} s for {len(reply.body)} bytes")


def understood(account: Account, reply: Reply) -> Update | None:
    account.provider.signed(reply.headers, reply.body, account.webhook_secrets)
    claimed = account.provider.claimed_job(json_of(reply.body))
    assert claimed is None or isinstance(claimed, str)
    Budget(per_minute=60, per_day=1000).hear(reply.status, reply.headers, NOW)
    try:
        understand(account.provider, reply, now=NOW)
    except ProviderError:
        with pytest.raises(ProviderError) as refused:
            ASKER.read(account, reply)
        said, retry_after = str(refused.value), refused.value.retry_after
        assert said == storable(said) and len(said) < 1000
        assert retry_after is None or retry_after >= 0
        return None
    # What a provider of ours has understood is never found to be unreadable afterwards.
    update = ASKER.read(account, reply)
    assert len(update.outputs) <= MOST_OUTPUTS
    check_announcement(update)
    return update


def ended_by(generation: Generation, update: Update) -> Generation:
    return replace(
        generation, status=Status.FAILED, update=update, known_at=NOW, learned_by=LearnedBy.POLL, due_at=None
    )


def check_announcement(update: Update) -> None:
    for generation in (ended_by(WATCHED, update), replace(WATCHED, update=update)):
        announced = event.envelope("generation.failed", rfc3339(NOW), event.describe(generation))
        data = json.loads(announced.decode("utf-8"), parse_constant=reject)["data"]
        assert data["progress"] is None or 0 <= data["progress"] <= 1
        assert data["kind"] in {"image", "video", "audio", "3d", "text", None}


def with_date(field: str, value: str) -> Reply:
    return Reply(200, written({"status": "processing", "state": "processing", field: value}), {})


@ENDLESS
@pytest.mark.parametrize("name", PROVIDERS)
def test_any_reply_is_an_update_that_can_be_announced_or_a_provider_error(tidy: None, name: str):
    @SHARED
    @given(replies(name))
    @example(Reply(200, b'{"state": "queued", "status": "queued", "x": 1e999}', {}))
    @example(with_date("created_at", "0001-01-01T00:00:00+23:59"))
    @example(with_date("completed_at", "9999-12-31T23:59:59-23:59"))
    @example(Reply(503, b"", {"retry-after": f"Mon, 01 Jun {10**20} 12:00:00 GMT"}))
    def tried(reply: Reply) -> None:
        check(name, reply)

    tried()


def everywhere(value: Any, odd: Any, kinds: tuple[type, ...]) -> Any:
    """The answer with this in the place of every value of these types, but for what says its status."""
    if isinstance(value, dict):
        return {
            key: one if key in ("status", "state") else everywhere(one, odd, kinds)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [everywhere(one, odd, kinds) for one in value]
    return odd if isinstance(value, kinds) and not isinstance(value, bool) else value


BOMBS = {
    "endless list": b"[" * 200_000,
    "endless object": b'{"a":' * 100_000,
    "list that is just too deep": b"[" * 101 + b"]" * 101,
    "list that is just not": b"[" * 100 + b"]" * 100,
    "object that is just not": b'{"data":' * 99 + b"{}" + b"}" * 99,
    "integer of 100,000 digits": b'{"progress":' + b"9" * 100_000 + b"}",
    "fraction of 100,000 digits": b'{"progress":0.' + b"9" * 100_000 + b"}",
    "exponent of 100,000 digits": b'{"progress":1e' + b"9" * 100_000 + b"}",
    "integer in a string": b'{"duration_ms":"' + b"9" * 100_000 + b'"}',
    "mark of UTF-8": b"\xef\xbb\xbf{}",
    "UTF-16": '{"status":"completed"}'.encode("utf-16"),
    "NUL": b"\0",
    "NUL in a string": b'{"status":"\0"}',
    "same names": b'{"status":"failed","state":"failed","status":"completed","state":"completed"}',
    "not a number": b'{"progress":NaN}',
    "infinity": b'{"progress":-Infinity}',
    "bad UTF-8": b'{"status":"\xff"}',
    "surrogates in bytes": b'{"status":"\xed\xa0\x80"}',
    "names that are surrogates": b'{"\\ud800":1,"\\udfff":2,"status":"completed","state":"completed"}',
    "nothing": b"",
    "space": b" " * 1000,
    "null": b"null",
    "number": b"1",
    "string": b'"completed"',
}  # fmt: skip


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_understood_or_refused_whatever_the_status(name: str, bomb: str):
    for status in (200, 404, 429, 500):
        check(name, Reply(status, BOMBS[bomb], {}))


@pytest.mark.parametrize("name", PROVIDERS)
def test_an_odd_value_in_every_place_of_every_recorded_answer_is_understood_or_refused(name: str):
    for reply in REPLIES[name]:
        answer = json_of(reply.body)
        for word in WORDS:
            check(name, replace(reply, body=written(everywhere(answer, word, (str,)))))
        for number in [*NUMBERS, 10**4000, float("inf")]:
            check(name, replace(reply, body=written(everywhere(answer, number, (int, float)))))
            check(name, replace(reply, body=written(everywhere(answer, number, (str,)))))


# What costs the most where it is read, as many of it as there is room for.
FLOODS: Mapping[str, Any] = {
    "outputs": [{"url": "a"}],
    "URLs": ["a"],
    "nested lists": [[[[]]]],
    "objects": [{"a": {}}],
    "words": ["completed"],
    "our own callback URLs": "https://relay.test/hooks/ ",
    "a list of our own callback URLs": ["https://relay.test/hooks/"],
    "the credential": "K-secret-key",
    "a query": "https://a.test/?&a=1&b=",
    "an extension": "https://a.test/.png.gz.tgz",
    "a path": "https://a.test//../",
    "digits": "2026",
    "surrogates": "\ud800",
    "zeros": "\0",
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("name", PROVIDERS)
def test_no_answer_is_read_and_announced_for_longer_than_a_second_for_each_mebibyte(
    tidy: None, name: str, flood: str
):
    size = LARGEST_ANSWER if THOROUGH else LARGEST_ANSWER // 8
    account, one = account_of(name), FLOODS[flood]
    many = one * ((size - 1000) // (len(json.dumps(one)) + 2))
    ends = [reply.body for reply in REPLIES[name] if b'"completed"' in reply.body]
    answer = json_of(max(ends, key=len))
    for holder, key in places(answer):
        if key not in ("status", "state"):
            kept, holder[key] = holder[key], many
            body = written(answer)
            holder[key] = kept
            limit = SECONDS_PER_MEBIBYTE * len(body) / MEBIBYTE
            # A busy machine may be slow for a moment.
            assert any(seconds_for(account, body) < limit for _ in range(10)), key


def seconds_for(account: Account, body: bytes) -> float:
    """How long the processor has to do with an answer, from its bytes to those of the event."""
    begun = time.process_time()
    update = ASKER.read(account, Reply(200, body, {}))
    event.ending(ended_by(WATCHED, update), now=NOW)
    return time.process_time() - begun


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with prepared(database_url) as store:
        yield store


async def stored(store: Store, updates: list[Update]) -> None:
    """Ends a generation by each update, and finds each as it was said."""
    made = [a_generation(None) for _ in updates]
    await store.generations.create([Watch(one) for one in made])
    ended = [ended_by(one, update) for one, update in zip(made, updates, strict=True)]
    changes = [Change(one, [event.ending(one, now=NOW)]) for one in ended]
    fresh, _ = await store.events.record(changes, [], NOTHING_HANDED_OVER, now=NOW)
    assert len(fresh) == len(updates)
    kept = {one.id: one for one in await store.generations.get_many([one.id for one in made])}
    for one in ended:
        assert kept[one.id].update == one.update
        found = await listed(store.events, {"generation_id": one.id})
        assert [each.body for each in found] == [event.ending(one, now=NOW).body]


ANY = st.one_of([st.tuples(st.just(name), replies(name)) for name in PROVIDERS])


@ENDLESS
@settings(SHARED, max_examples=OVER_THE_WIRE // 5)
@given(st.lists(ANY, max_size=20))
async def test_what_was_understood_is_stored_and_found_as_it_was(store: Store, said: list[tuple[str, Reply]]):
    updates = [check(name, replace(reply, status=200)) for name, reply in said]
    await stored(store, [one for one in updates if one is not None])


async def test_an_odd_value_in_every_place_is_stored_and_found_as_it_was(store: Store):
    for name, known in REPLIES.items():
        answers = [json_of(reply.body) for reply in known if reply.status == 200]
        odd = [
            everywhere(answer, word, (str,)) for answer in answers for word in ("\ud800", "a\0b", "\ufeff")
        ]
        odd += [everywhere(answer, number, (int, float, str)) for answer in answers for number in NUMBERS]
        updates = [check(name, Reply(200, written(one), {})) for one in odd]
        await stored(store, [one for one in updates if one is not None])


@st.composite
def tokens(draw: st.DrawFn, genuine: str) -> str:
    """The genuine one, a spoiled one, or something. (The end of base64 may be written in several ways.)"""
    at = draw(st.integers(0, len(genuine) // 2))
    spoiled = genuine[:at] + draw(st.sampled_from("AZaz09._-")) + genuine[at + 1 :]
    return draw(st.sampled_from([genuine, spoiled, genuine[:at], genuine * 2]) | st.text(max_size=20))


@ENDLESS
@SHARED
@given(st.data())
def test_a_token_is_that_of_one_generation_or_of_none(data: st.DataObject):
    callbacks = Callbacks("https://relay.test", ["secret-key-of-the-tests-0123456789"])
    genuine = callbacks.url("pictory", "gen_1").rpartition("/")[2]
    token = data.draw(tokens(genuine))
    assert callbacks.generation("pictory", token) == ("gen_1" if token == genuine else None)
    assert callbacks.generation("luma", token) is None


@dataclass
class Hooked:
    """A relay that waits for callbacks, a client without a key, and a token that is right."""

    relay: RunningRelay
    stranger: httpx.AsyncClient
    genuine: str
    known: Mapping[str, str]  # ids of what is there, by kind
    operations: Sequence[tuple[str, str, Mapping[str, Any]]]  # those that read a body


@pytest.fixture
async def hooked(world: World, database_url: str) -> AsyncIterator[Hooked]:
    accounts = {name: {**one, "poll_interval": "10m"} for name, one in world.document()["accounts"].items()}
    accounts["vivix"]["webhook_secret"] = SECRET
    async with (
        world.confined(database=database_url, accounts=accounts) as relay,
        httpx.AsyncClient(base_url=relay.origin, timeout=30) as stranger,
    ):
        made = await relay.api.post("/v1/generations", json={"account": "pictory"})
        watched = await relay.api.post("/v1/generations", json={"account": "vivix", "job_id": "5b91a581"})
        assert (made.status_code, watched.status_code) == (201, 201)
        known = {"generations": made.json()["id"], "endpoints": (await world.endpoint(relay))["id"]}
        document = (await relay.api.get("/openapi.json")).json()
        read_a_body = [
            one for one in operations(document) if "requestBody" in one[2] and one[2].get("security") != []
        ]
        yield Hooked(relay, stranger, made.json()["webhook_url"].rpartition("/")[2], known, read_a_body)
        assert (await relay.api.get("/readyz")).status_code == 200


BODIES = (
    ANY.map(lambda said: said[1].body)
    | st.fixed_dictionaries(
        {"job_id": VALUES | st.just("4d82d040"), "generation_id": VALUES | st.just("5b91a581")}
    ).map(written)
    | st.sampled_from(sorted(BOMBS.values()))
)
MEDIA_TYPES = st.sampled_from(["application/json", "text/html", "application/json; charset=utf-16"])


@ENDLESS
@settings(SHARED, max_examples=OVER_THE_WIRE)
@given(st.data(), BODIES, st.sampled_from([None, SECRET, "another"]), MEDIA_TYPES)
async def test_any_callback_is_heard_or_refused(
    hooked: Hooked, data: st.DataObject, body: bytes, secret: str | None, media_type: str
):
    headers = {"content-type": media_type}
    if secret is not None:
        headers["x-vivix-signature"] = f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}"
    # They may not come too often.
    hooked.relay.clock.forward(seconds=0.02)
    answer = await hooked.stranger.post("/hooks/vivix", content=body, headers=headers)
    assert answer.status_code == (200 if secret == SECRET else 401)
    token = data.draw(tokens(hooked.genuine))
    path = f"/hooks/pictory/{quote(token, safe='')}"
    answer = await hooked.stranger.post(path, content=body, headers=headers)
    assert answer.status_code == (200 if token == hooked.genuine else 404)
    nobody = quote("x" + data.draw(st.text(max_size=20) | st.just("\0")), safe="")
    for path in (f"/hooks/{nobody}", f"/hooks/{nobody}/{hooked.genuine}"):
        answer = await hooked.stranger.post(path, content=body, headers=headers)
        assert answer.status_code == 404


@ENDLESS
@settings(SHARED, max_examples=OVER_THE_WIRE)
@given(st.data())
async def test_any_body_is_taken_or_refused_as_the_document_says(hooked: Hooked, data: st.DataObject):
    method, path, operation = data.draw(st.sampled_from(hooked.operations))
    sample = operation["requestBody"]["content"]["application/json"]["example"]
    body = data.draw(changed([sample]) | damaged([written(sample)]) | VALUES.map(written) | BODIES)
    url = path.replace("{id}", hooked.known.get(path.split("/")[2], "unknown"))
    answer = await hooked.relay.api.request(
        method, url, content=body, headers={"content-type": "application/json"}
    )
    assert str(answer.status_code) in operation["responses"], (method, path, body, answer.text)
    assert answer.status_code < 500, (method, path, body, answer.text)
