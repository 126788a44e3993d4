"""`relay check`: what is wrong, before it matters."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relay.app import wall_clock
from relay.asker import Asker
from relay.body import parse
from relay.config import Settings, accounts
from relay.errors import ConfigError, DatabaseInUse, Malformed, ProviderError, StoreError
from relay.guard import Guard
from relay.keyring import KeyRing
from relay.providers import Account
from relay.signature import TOLERANCE
from relay.store import open_database
from relay.store.accounts import Accounts
from relay.store.migrate import pending
from relay.store.sealed import Sealed
from relay.store.tables import check_whole
from relay.tracing import MISSING, is_installed

SHORTEST_SECRET = 32
SHORTEST_ADMIN_KEY = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """`failed` keeps Relay from doing its work; `warning` is for somebody to look at."""

    subject: str
    verdict: Literal["ok", "warning", "failed"]
    message: str


async def check(settings: Settings) -> AsyncIterator[Finding]:
    """One finding after the other: configuration, database, each account's credential, the clock."""
    for finding in _configuration(settings):
        yield finding
    yield await _database(settings)
    asker = Asker.open(
        Guard(settings.network.allow),
        capability=f"{settings.origin}/hooks/",
        proxy=settings.network.proxy,
        now=wall_clock,
    )
    try:
        for account in accounts(settings).values():
            yield await _account(asker, account)
            await _draw(settings.database, account.name)
    finally:
        await asker.close()
    yield _clock(asker.skew)


def _configuration(settings: Settings) -> list[Finding]:
    found = []
    if len(settings.secret_key) < SHORTEST_SECRET:
        message = f"is shorter than {SHORTEST_SECRET} characters: make one with `openssl rand -hex 32`"
        found.append(Finding("secret_key", "warning", message))
    if settings.admin_key is not None and len(settings.admin_key) < SHORTEST_ADMIN_KEY:
        message = f"is shorter than {SHORTEST_ADMIN_KEY} characters: make one with `openssl rand -hex 32`"
        found.append(Finding("admin_key", "warning", message))
    if not settings.accounts:
        found.append(Finding("accounts", "warning", "there are none: nothing can be watched"))
    configured = accounts(settings)
    for name, one in configured.items():
        if one.webhook_secrets and not one.provider.signs:
            message = f"is of no use: {one.provider.name} does not sign its callbacks"
            found.append(Finding(f"accounts.{name}.webhook_secret", "warning", message))
    if settings.tracing.endpoint is not None and not is_installed():
        found.append(Finding("tracing.endpoint", "failed", MISSING))
    calling = [
        name for name, one in configured.items() if one.provider.calls_back or one.takes_signed_callbacks
    ]
    if calling and settings.public_url is None:
        message = f"is not set: {', '.join(calling)} cannot call {settings.origin} back, and will be polled"
        found.append(Finding("public_url", "warning", message))
    return found or [Finding("configuration", "ok", f"{len(settings.accounts)} accounts")]


async def _database(settings: Settings) -> Finding:
    url = settings.database
    if missing := _missing_file(url):
        return missing
    try:
        database = await open_database(url)
    except DatabaseInUse:
        return Finding("database", "ok", f"{url.removeprefix('sqlite:///')} is in use by a running relay")
    except ConfigError as error:
        return Finding("database", "failed", str(error).removeprefix("database: "))
    try:
        names = await pending(database)
        if not names:
            await check_whole(database)
            await Sealed(database, KeyRing(settings.secret_keys)).check()
    except (ConfigError, StoreError) as error:
        return Finding("database", "failed", str(error).removeprefix("database: "))
    finally:
        await database.close()
    message = f"will be migrated at the next start: {', '.join(names)}" if names else "is up to date"
    return Finding("database", "ok", f"{database.name} {message}")


def _missing_file(url: str) -> Finding | None:
    path = Path(url.removeprefix("sqlite:///"))
    if not url.startswith("sqlite:///") or path.exists():
        return None
    if path.resolve().parent.is_dir():
        return Finding("database", "ok", f"{path} will be created")
    return Finding("database", "failed", f"the directory of {path} does not exist: create it")


async def _account(asker: Asker, account: Account) -> Finding:
    """Asks about a job that cannot exist: only a credential that works is told so."""
    subject = f"accounts.{account.name}"
    try:
        reply = await asker.fetch(account, str(uuid.uuid4()))
    except ProviderError as error:
        return Finding(subject, "failed", f"{account.base_url} {error}")
    try:
        answer = parse(reply.body)
    except Malformed:
        answer = None
    if reply.status == 401:
        return Finding(subject, "failed", f"{account.provider.name} refuses this api_key (401)")
    if reply.status == 403 and not account.provider.not_found(403, answer):
        message = f"{account.provider.name} refuses this machine or this api_key (403)"
        return Finding(subject, "failed", message)
    is_answer = 200 <= reply.status <= 299 and isinstance(answer, dict)
    if not is_answer and not account.provider.not_found(reply.status, answer):
        message = f"{account.base_url} answers {reply.status}: it may be wrong, the credential was not tried"
        return Finding(subject, "warning", message)
    return Finding(subject, "ok", f"{account.provider.name} takes this api_key")


async def _draw(url: str, account: str) -> None:
    """The request just made counts for the relay that uses this account, if there is one."""
    if _missing_file(url) is not None:
        return
    try:
        database = await open_database(url, alone=False)
    except ConfigError:
        return
    try:
        await Accounts(database).draw(account)
    except StoreError:
        return  # it has not been migrated yet: nobody uses it
    finally:
        await database.close()


def _clock(skew: int | None) -> Finding:
    if skew is None:
        return Finding("clock", "ok", "no provider told the time, so it was not compared")
    if abs(skew) > TOLERANCE * 1000 / 2:
        message = f"is {skew / 1000:+.0f} s off: subscribers refuse webhooks {TOLERANCE} s off; use NTP"
        return Finding("clock", "failed", message)
    return Finding("clock", "ok", f"within {abs(skew) / 1000:.0f} s of the providers'")
