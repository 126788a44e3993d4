"""What the operations for admins do: accounts, keys, the audit log."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relay import account as accounts
from relay import signature
from relay.endpoint import origin
from relay.errors import Conflict, FieldError, Forbidden, Invalid, NotFound, Refused
from relay.key import Key, Scope, hash_of, new_key
from relay.providers import Account, load
from relay.store.credentials import Credential
from relay.tenant import DEFAULT
from relay.times import rfc3339
from relay.web import resources as r
from relay.web.context import Relay
from relay.web.operation import Call, Result, checked_url, paged

_SAME = ("api_key", "base_url", "requests_per_minute", "requests_per_day")


async def create_account(call: Call[r.AccountCreate, None]) -> Result:
    relay, now = call.relay, call.relay.now()
    given = call.body.model_dump(exclude_unset=True)
    name = call.body.name
    if (seen := relay.accounts.of(call.tenant).get(name)) is not None and seen.owner is None:
        raise Conflict(f"there is an account {name!r} already, in the relay's configuration file")
    new = Credential(
        name=accounts.inner(call.tenant, name),
        tenant=call.tenant,
        provider=call.body.provider,
        created_at=now,
        updated_at=now,
        **_settings(relay, given),
    )
    entry = call.entry("account.created", name)
    account = await _changed_account(
        relay, await relay.store.credentials.create(new, call.idempotency, entry=entry)
    )
    if account is None:
        raise Conflict("what this Idempotency-Key created is gone")
    return Result(201, _account(relay, account, call.tenant))


async def list_accounts(call: Call[None, r.PageQuery]) -> Result:
    found = call.relay.accounts.of(call.tenant)
    names = sorted(name for name in found if name > (call.query.cursor or ""))
    page, more = names[: call.query.limit], len(names) > call.query.limit
    data = [_account(call.relay, found[name], call.tenant) for name in page]
    return Result(200, r.Page[r.AccountResource](data=data, next_cursor=page[-1] if more else None))


async def get_account(call: Call[None, None]) -> Result:
    found = await call.relay.accounts.find(call.tenant, call.path["name"])
    if found is None:
        raise NotFound(f"no account {call.path['name']}")
    return Result(200, _account(call.relay, found, call.tenant))


async def change_account(call: Call[r.AccountChange, None]) -> Result:
    relay, name = call.relay, _own_account(call)
    changes = _settings(relay, call.body.model_dump(exclude_unset=True))

    def changed(before: Credential) -> Credential:
        after = replace(before, **changes)
        if after.base_url is not None:
            checked_url(relay, "base_url", after.base_url)
        if "api_key" not in changes and _host(before) != _host(after):
            problem = "is required with a base_url at another host: the one that is stored goes nowhere else"
            raise Invalid(FieldError("api_key", problem))
        return after

    given = sorted(call.body.model_fields_set)
    entry = call.entry("account.changed", call.path["name"], fields=given) if given else None
    is_there = await relay.store.credentials.change(name, changed, now=relay.now(), entry=entry)
    found = await _changed_account(relay, name) if is_there else None
    if found is None:
        raise _no_own_account(call)
    return Result(200, _account(relay, found, call.tenant))


async def delete_account(call: Call[None, None]) -> Result:
    relay, name = call.relay, _own_account(call)
    entry = call.entry("account.deleted", call.path["name"])
    if not await relay.store.credentials.delete(name, entry=entry):
        raise _no_own_account(call)
    await _changed_account(relay, name)
    return Result(204)


async def create_key(call: Call[r.KeyCreate, None]) -> Result:
    relay, body, now = call.relay, call.body, call.relay.now()
    tenant = _named_tenant(call, body.tenant)
    if body.expires_at is not None and body.expires_at <= now:
        raise Invalid(FieldError("expires_at", "must be in the future"))
    # Whoever has found a key that ends must not be able to outlast it.
    own_end = call.caller.expires_at
    if own_end is not None and (body.expires_at or math.inf) > own_end:
        problem = f"must be given, and at the latest be the end of your own key, {rfc3339(own_end)}"
        raise Invalid(FieldError("expires_at", problem))
    # Nor to be faster than it.
    own_rate = call.caller.rate_limit
    if own_rate is not None and (body.rate_limit or 0) > own_rate:
        raise Invalid(FieldError("rate_limit", f"may be that of your own key, {own_rate:g}, at most"))
    key_id, text = new_key(now)
    key = Key(
        id=key_id,
        tenant=tenant,
        name=body.name,
        scopes=[scope for scope in Scope if scope in body.scopes],
        hash=hash_of(text),
        created_at=now,
        expires_at=body.expires_at,
        rate_limit=own_rate if body.rate_limit is None else body.rate_limit,
    )
    if tenant != call.tenant:
        await relay.store.tenants.found(tenant, signature.new_secret(), now=now)
    entry = call.entry("key.created", key.id, tenant=tenant)
    made = await relay.store.keys.create(key, call.idempotency, asker=call.tenant, entry=entry)
    if made is None:
        raise Conflict("what this Idempotency-Key created is gone")
    return Result(201, r.KeyWithText.of(made, text if made.id == key.id else None))


async def list_keys(call: Call[None, r.KeyQuery]) -> Result:
    found = await call.relay.store.keys.page(
        _named_tenant(call, call.query.tenant), limit=call.query.limit + 1, cursor=call.query.cursor
    )
    return paged(found, call.query, r.KeyResource.of)


async def get_key(call: Call[None, r.TenantQuery]) -> Result:
    found = await call.relay.store.keys.get(_named_tenant(call, call.query.tenant), call.path["id"])
    if found is None:
        raise NotFound(f"no key {call.path['id']}")
    return Result(200, r.KeyResource.of(found))


async def revoke_key(call: Call[None, r.TenantQuery]) -> Result:
    tenant, id_ = _named_tenant(call, call.query.tenant), call.path["id"]
    entry = call.entry("key.revoked", id_, tenant=tenant)
    if not await call.relay.store.keys.revoke(tenant, id_, now=call.relay.now(), entry=entry):
        raise NotFound(f"no key {id_}")
    return Result(204)


async def list_audit(call: Call[None, r.AuditQuery]) -> Result:
    found = await call.relay.store.audit.page(
        _named_tenant(call, call.query.tenant),
        call.query.filters(),
        limit=call.query.limit + 1,
        cursor=call.query.cursor,
    )
    return paged(found, call.query, r.AuditResource.of)


def _named_tenant(call: Call[Any, Any], named: str | None) -> str:
    """The tenant that an admin's request is about: its own one, unless the operator names another one."""
    if named is not None and named != call.tenant and call.tenant != DEFAULT:
        raise Forbidden(f"only admins of the tenant {DEFAULT} may name another tenant than their own")
    return named or call.tenant


def _own_account(call: Call[Any, Any]) -> str:
    """What Relay calls the account of this name that a tenant may have added. Raises NotFound for no name."""
    if not accounts.is_name(call.path["name"]):
        raise _no_own_account(call)
    return accounts.inner(call.tenant, call.path["name"])


def _no_own_account(call: Call[Any, Any]) -> Refused:
    """Why there is nothing to change or delete."""
    name = call.path["name"]
    seen = call.relay.accounts.of(call.tenant).get(name)
    if seen is None or seen.owner is not None:
        return NotFound(f"no account {name}")
    return Conflict(
        f"account {name!r} is in the relay's configuration file (accounts.{name}): change it there"
    )


async def _changed_account(relay: Relay, name: str) -> Account | None:
    """The account as it is now, after this relay has changed it and told the others; None when it is gone."""
    relay.bell.ring("accounts", name)
    await relay.accounts.look([name])
    relay.poller.wake()
    return relay.accounts.get(name)


def _settings(relay: Relay, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says of an account, in the words of its credential."""
    settings = {name: given[name] for name in _SAME if name in given}
    if "webhook_secret" in given:
        settings["webhook_secrets"] = tuple(given["webhook_secret"] or ())
    if given.get("base_url") is not None:
        settings["base_url"] = checked_url(relay, "base_url", given["base_url"])
    for name in ("timeout", "poll_interval"):
        if f"{name}_seconds" in given:
            seconds = given[f"{name}_seconds"]
            settings[name] = math.ceil(seconds * 1000) if seconds is not None else None
    return settings


def _host(credential: Credential) -> tuple[str, str, int | None]:
    return origin(credential.base_url or load(credential.provider).base_url)


def _account(relay: Relay, account: Account, tenant: str) -> r.AccountResource:
    standing, now = relay.poller.standing(account), relay.now()
    health, budget = standing.health, standing.budget
    used = budget.used_today - max(0, standing.lent) if now < budget.day_ends_at else 0
    wait = standing.wait(now)
    return r.AccountResource(
        name=account.shown,
        provider=account.provider.name,
        status=health.status.value,
        configured=account.owner is None,
        api_key_hint=account.api_key_hint,
        base_url=account.base_url,
        timeout_seconds=account.pace.timeout / 1000,
        poll_interval_seconds=account.pace.interval / 1000,
        calls_back=account.provider.calls_back,
        webhook_url=relay.callbacks.account_url(account.name) if account.provider.signs else None,
        budget=r.BudgetResource(
            requests_per_minute=account.requests_per_minute,
            requests_per_day=account.requests_per_day,
            used_today=max(0, used),
            next_request_at=rfc3339(now + wait) if wait else None,
        ),
        last_error=account.told(tenant, health.last_error),
        last_error_at=rfc3339(health.last_error_at) if health.last_error_at is not None else None,
    )
