"""Secrets in the database: sealed, bound to their rows, and sealed anew while relays run."""

import asyncio
import hashlib
import json
import signal
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from relay.app import running
from relay.config import read_config
from relay.errors import ConfigError
from relay.keyring import KeyRing
from relay.rekey import rekey
from relay.store import Store, open_database, store_on
from relay.store.migrate import migrate
from relay.store.sealed import PAGE
from tests.conftest import World
from tests.program import Program, Receiver, seeded
from tests.serving import Received, serving
from tests.test_api_endpoints import SECRET, accepts, send_test
from tests.test_cli import relay as command
from tests.test_store import NOW, TENANT, Secret, an_event, claimed_deliveries, published, registered, rows

OLD, NEW = "an old secret key of the tests, long", "a new secret key of the tests, long"
PLAIN = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@asynccontextmanager
async def opened(url: str, *secret_keys: str, alone: bool = True) -> AsyncIterator[Store]:
    database = await open_database(url, alone=alone)
    try:
        await migrate(database, now=NOW)
        yield store_on(database, KeyRing(secret_keys))
    finally:
        await database.close()


async def execute(store: Store, sql: str, **values: Any) -> None:
    async with store.database.write() as tx:
        await tx.execute(sql, **values)


async def test_no_secret_and_no_header_stands_in_the_database_in_clear(database_url: str) -> None:
    async with opened(database_url, NEW) as store:
        await store.tenants.found("acme", PLAIN, now=NOW)
        made = await registered(store, secrets=[Secret(PLAIN, "whsk_private")], headers={"x-token": "hidden"})
        [endpoint] = await rows(store, "SELECT * FROM endpoints")
        [tenant] = await rows(store, "SELECT * FROM tenants WHERE id = 'acme'")
        written = repr([dict(endpoint), dict(tenant)])
        for secret in (PLAIN, "whsk_private", "hidden", "x-token"):
            assert secret not in written
        assert await store.tenants.signing_secrets("acme") == (Secret(PLAIN),)
        found = await store.endpoints.get(TENANT, made.id)
        assert found is not None and found.headers == {"x-token": "hidden"}
        assert list(found.secrets) == [Secret(PLAIN, "whsk_private")]


async def test_a_secret_of_another_row_signs_nothing_and_stops_nobody(database_url: str) -> None:
    async with opened(database_url, NEW) as store:
        await store.tenants.found(TENANT, PLAIN, now=NOW)
        good = await registered(store, event_types=["a.b"])
        bad = await registered(store, event_types=["a.b"], headers={"x-token": "hidden"})
        [row] = await rows(store, "SELECT secrets FROM endpoints WHERE id = :id", id=good.id)
        move = "UPDATE endpoints SET secrets = :secrets WHERE id = :id"
        await execute(store, move, secrets=row["secrets"], id=bad.id)
        await published(store, an_event())
        claimed = {one.endpoint_id: one for one in await claimed_deliveries(store)}
        assert claimed[good.id].secrets and not claimed[bad.id].secrets
        assert claimed[bad.id].headers == {"x-token": "hidden"}


async def test_an_endpoint_whose_secret_was_tampered_with_fails_says_so_and_works_once_rotated(
    world: World,
) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay, event_types=["a.b"])
    other = await world.endpoint(relay, "/other", event_types=["a.b"])
    async with opened(relay.settings.database, relay.settings.secret_key, alone=False) as store:
        await execute(store, "UPDATE endpoints SET secrets = 'whsec_evil' WHERE id = :id", id=endpoint["id"])
    event = (await relay.api.post("/v1/events", json={"type": "a.b", "data": {}})).json()
    await world.subscriber.until(lambda received: any(one.path == "/other" for one in received))
    assert other["id"] != endpoint["id"]
    found = await relay.eventually(
        f"/v1/deliveries?event_id={event['id']}&endpoint_id={endpoint['id']}",
        lambda page: page["data"] and page["data"][0]["attempt_count"] == 1,
    )
    delivery = (await relay.api.get(f"/v1/deliveries/{found['data'][0]['id']}")).json()
    assert "secret cannot be opened" in delivery["attempts"][0]["error"]["message"]
    path = f"/v1/endpoints/{endpoint['id']}/secret"
    assert (await relay.api.get(path)).status_code == 409
    rotated = await relay.api.post(f"{path}/rotate", json={"secret": SECRET})
    assert rotated.status_code == 200
    assert accepts(SECRET, await send_test(world, relay, endpoint["id"]))


async def test_a_signing_secret_that_was_tampered_with_is_not_shown_and_works_once_rotated(
    database_url: str, world: World
) -> None:
    relay = await world.relay(database=database_url)
    async with opened(database_url, relay.settings.secret_key, alone=False) as store:
        await execute(store, "UPDATE tenants SET signing_secrets = 'whsec_evil'")
    refused = await relay.api.get("/v1/signing-secret")
    assert (refused.status_code, "rotate it" in refused.json()["detail"]) == (409, True)
    rotated = await relay.api.post("/v1/signing-secret/rotate")
    assert rotated.json() == (await relay.api.get("/v1/signing-secret")).json()
    async with opened(database_url, relay.settings.secret_key, alone=False) as store:
        [tenant] = await rows(store, "SELECT signing_secrets FROM tenants")
        assert rotated.json()["secret"] not in tenant["signing_secrets"]
        assert await store.tenants.signing_secrets("default") == (
            Secret(rotated.json()["secret"], is_rotated=True),
        )


async def test_a_relay_with_another_secret_key_does_not_start(world: World) -> None:
    async with world.running(secret_key=OLD):
        pass
    with pytest.raises(ConfigError, match=r"secret_key: .* previous_secret_keys"):
        async with running(read_config(world.document(secret_key=NEW), {}), now=world.clock):
            pass
    async with world.running(secret_key=NEW, previous_secret_keys=[OLD]) as relay:
        assert (await relay.api.get("/v1/signing-secret")).status_code == 200


async def test_what_an_idempotency_key_was_used_for_cannot_be_guessed_and_is_known_after_a_new_secret_key(
    database_url: str, world: World
) -> None:
    path, key = "/v1/endpoints", {"idempotency-key": "k"}
    body = json.dumps({"url": "https://a.example/", "headers": {"x-pin": "1234"}})
    async with world.running(database=database_url, secret_key=OLD) as relay:
        made = await relay.api.post(path, content=body, headers=key)
        async with opened(database_url, OLD, alone=False) as store:
            [kept] = await rows(store, "SELECT request_hash FROM idempotency_keys")
    assert kept["request_hash"] == KeyRing([OLD]).fingerprints(f"POST {path}\n{body}".encode())[0]
    assert kept["request_hash"] != hashlib.sha256(f"POST {path}\n{body}".encode()).hexdigest()
    async with world.running(database=database_url, secret_key=NEW, previous_secret_keys=[OLD]) as relay:
        again = await relay.api.post(path, content=body, headers=key)
        assert (again.status_code, again.json()["id"]) == (201, made.json()["id"])
        other = await relay.api.post(path, content=body.replace("1234", "1235"), headers=key)
        assert (other.status_code, other.json()["errors"][0]["field"]) == (422, "Idempotency-Key")


async def test_rekeying_seals_everything_anew_goes_on_where_it_was_and_leaves_broken_rows(
    database_url: str,
) -> None:
    async with opened(database_url, OLD) as store:
        await store.tenants.found(TENANT, PLAIN, now=NOW)
        await store.tenants.rotate(TENANT, "whsec_2", expires_at=NOW + 9, now=NOW)
        made = [await registered(store, secrets=[Secret(f"whsec_{n}")]) for n in range(PAGE + 5)]
        tampered = "UPDATE endpoints SET secrets = secrets || 'x' WHERE id = :id"
        await execute(store, tampered, id=made[3].id)
    seen: list[tuple[str, int]] = []
    async with opened(database_url, NEW, OLD) as store:
        # Interrupted after one page, and begun anew.
        await store.sealed.rekey("endpoints", "")
        done = await rekey(store.sealed, show=lambda *far: seen.append(far))
        assert done.left == 0
        assert done.broken == [f"endpoints.secrets of {made[3].id}"]
        assert ("endpoints", PAGE + 5) in seen
    async with opened(database_url, NEW) as store:
        with pytest.raises(ConfigError):  # the one that could not be opened
            await store.sealed.check()
        await execute(store, "DELETE FROM endpoints WHERE id = :id", id=made[3].id)
        await store.sealed.check()
        assert await store.tenants.signing_secrets(TENANT) == (
            Secret("whsec_2", is_rotated=True),
            Secret(PLAIN, expires_at=NOW + 9),
        )
        found = await store.endpoints.get(TENANT, made[PAGE + 4].id)
        assert found is not None and found.secrets == (Secret(f"whsec_{PAGE + 4}"),)


async def test_rekeying_while_a_relay_serves_fails_no_delivery(tmp_path: Path, database_url: str) -> None:
    program = Program.placed(
        tmp_path / "relay", database_url, secret_key=NEW, previous_secret_keys=[OLD], log_level="info"
    )
    async with opened(database_url, OLD) as store:
        await store.tenants.found("default", PLAIN, now=NOW)
        for _ in range(3 * PAGE):
            await registered(store, event_types=["never.sent"])
    receiver = Receiver(seeded(1), secrets={"/": PLAIN})
    await program.start()
    async with serving(receiver.app) as origin, program.api() as api:
        body = {"url": origin, "event_types": ["a.b"], "secret": PLAIN, "headers": {"x-token": "hidden"}}
        endpoint = (await api.post("/v1/endpoints", json=body)).json()

        async def publish(count: int) -> None:
            for _ in range(count):
                assert (await api.post("/v1/events", json={"type": "a.b", "data": {}})).status_code == 201

        config = str(program.directory / "config.yaml")
        ended, _ = await asyncio.gather(command("rekey", "--config", config, cwd=tmp_path), publish(200))
        assert (ended.code, "newest secret_key" in ended.out) == (0, True), ended
        await publish(5)
        await receiver.got("/", 205)
        assert (receiver.came["/"], receiver.forged) == (205, [])
        rotated = await api.post(f"/v1/endpoints/{endpoint['id']}/secret/rotate")
        shown = (await api.get(f"/v1/endpoints/{endpoint['id']}/secret")).json()
        assert shown["secret"] == rotated.json()["secret"]
        assert shown["previous_secret_expires_at"] is not None
        assert await program.end(signal.SIGTERM) == 0
    async with opened(database_url, NEW) as store:
        await store.sealed.check()


async def test_ed25519_signatures_stand_beside_the_others_and_rotate_with_them(world: World) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay, ed25519=True)
    public = endpoint["public_key"]
    assert public.startswith("whpk_")
    received = await send_test(world, relay, endpoint["id"])
    assert accepts(endpoint["secret"], received)
    assert verdicts(received, public) == [True]
    rotated = (await relay.api.post(f"/v1/endpoints/{endpoint['id']}/secret/rotate")).json()
    assert rotated["public_key"] != public
    received = await send_test(world, relay, endpoint["id"])
    assert verdicts(received, public, rotated["public_key"]) == [True, True]
    versions = [token.partition(",")[0] for token in received.headers["webhook-signature"].split(" ")]
    assert versions == ["v1", "v1a", "v1", "v1a"]
    changed = await relay.api.patch(f"/v1/endpoints/{endpoint['id']}", json={"ed25519": False})
    assert changed.json()["public_key"] is None
    received = await send_test(world, relay, endpoint["id"])
    assert "v1a" not in received.headers["webhook-signature"]
    changed = await relay.api.patch(f"/v1/endpoints/{endpoint['id']}", json={"ed25519": True})
    received = await send_test(world, relay, endpoint["id"])
    assert verdicts(received, changed.json()["public_key"], public) == [True, False]


def verdicts(received: Received, *publics: str) -> list[bool]:
    """What `cryptography` itself says to each public key."""
    head = received.headers
    content = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + received.body
    tokens = [one[4:] for one in head["webhook-signature"].split(" ") if one.startswith("v1a,")]

    def good(public: str, token: str) -> bool:
        key = Ed25519PublicKey.from_public_bytes(b64decode(public.removeprefix("whpk_")))
        try:
            key.verify(b64decode(token), content)
        except InvalidSignature:
            return False
        return True

    return [any(good(public, token) for token in tokens) for public in publics]
