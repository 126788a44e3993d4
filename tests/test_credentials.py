"""Accounts that tenants have added, at rest, on both databases."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from relay.errors import Conflict, Invalid
from relay.roster import Roster
from relay.store import Store
from relay.store.credentials import MOST, Credential
from relay.store.idempotency import Idempotency
from tests.test_store import NOW, SECOND, TENANT, prepared, watched


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with prepared(database_url) as store:
        yield store


def a_credential(name: str = "luma", *, tenant: str = TENANT, at: int = NOW, **changes: Any) -> Credential:
    made = Credential(
        f"{tenant}.{name}",
        tenant,
        "luma",
        "the-key",
        at,
        at,
        webhook_secrets=("s-1", "s-2"),
        timeout=5 * SECOND,
    )
    return replace(made, **changes)


async def test_a_credential_is_kept_as_it_was_given_and_changed_in_what_is_named(store: Store):
    made = a_credential(base_url="https://a.test/v1", requests_per_day=7)
    assert await store.credentials.create(made, None) == made.name
    [kept] = await store.credentials.get_many([made.name, "nobody.luma"])
    assert kept == made
    for secret in ("the-key", "s-1"):
        assert secret not in repr(kept)
    for key, after in (("second", NOW + 1), ("third", NOW + 2)):
        # Within the same millisecond, and still another version.
        assert await store.credentials.change(
            made.name, lambda one, key=key: replace(one, api_key=key), now=NOW
        )
        assert await store.credentials.versions() == {made.name: after}
    [kept] = await store.credentials.get_many([made.name])
    assert kept == replace(made, api_key="third", updated_at=NOW + 2)
    assert not await store.credentials.change("nobody.luma", lambda one: one, now=NOW)


async def test_a_tenant_has_an_account_of_a_name_once_and_a_hundred_of_them_at_most(store: Store):
    await store.credentials.create(a_credential(), None)
    await store.credentials.create(a_credential(tenant="acme"), None)
    with pytest.raises(Conflict, match="of this name"):
        await store.credentials.create(a_credential(api_key="another"), Idempotency("k", "hash"))
    for number in range(MOST - 1):
        await store.credentials.create(a_credential(f"luma-{number}"), None)
    with pytest.raises(Conflict, match="100 accounts"):
        await store.credentials.create(a_credential("one-more"), None)
    await store.credentials.create(a_credential("one-more", tenant="acme"), None)
    [kept] = await store.credentials.get_many([a_credential().name])
    assert kept.api_key == "the-key"


async def test_the_same_idempotency_key_adds_one_account(store: Store):
    key = Idempotency("k", "hash")
    assert await store.credentials.create(a_credential(), key) == "default.luma"
    assert await store.credentials.create(a_credential(at=NOW + 5), key) == "default.luma"
    with pytest.raises(Invalid):
        await store.credentials.create(a_credential(), Idempotency("k", "another"))
    # It is not used up by what was refused.
    with pytest.raises(Conflict):
        await store.credentials.create(a_credential(), Idempotency("k-2", "hash"))
    assert (
        await store.credentials.create(a_credential("luma-2"), Idempotency("k-2", "hash-2"))
        == "default.luma-2"
    )


async def test_an_account_is_deleted_with_its_standing_but_not_while_it_is_needed(store: Store):
    name = a_credential().name
    await store.credentials.create(a_credential(), None)
    await store.accounts.take([name, "luma"], holder="rly", now=NOW)
    mine = await watched(store, account=name)
    with pytest.raises(Conflict, match="open generations"):
        await store.credentials.delete(name)
    assert await store.credentials.versions()
    await store.generations.delete(TENANT, mine.id)
    await watched(store, "job-2")  # of another account
    assert await store.credentials.delete(name)
    assert not await store.credentials.delete(name)
    assert set(await store.accounts.kept()) == {"luma"}
    # Added again, it begins anew, also when a relay that had not heard of it has kept it.
    await store.accounts.take([name], holder="rly", now=NOW)
    await store.credentials.create(a_credential(), None)
    assert set(await store.accounts.kept()) == {"luma"}


async def test_however_many_unknown_names_are_sought_at_once_the_database_is_asked_few_times(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """A stranger may make them up, at callback URLs."""
    reads, get_many = 0, store.credentials.get_many

    async def counted(names: Any) -> Any:
        nonlocal reads
        reads += 1
        return await get_many(names)

    monkeypatch.setattr(store.credentials, "get_many", counted)
    roster = Roster({}, store, check=print, now=lambda: NOW)
    await store.credentials.create(a_credential(), None)
    names = [f"somebody.name-{number}" for number in range(300)]
    found = await asyncio.gather(*map(roster.seek, [*names, f"{TENANT}.luma"]))
    assert [one.name for one in found if one is not None] == [f"{TENANT}.luma"]
    assert reads <= 3
