"""Who is asking, and what they may do: API keys."""

import hmac
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from relay.errors import Forbidden, Limited, StoreError, Unauthorized
from relay.key import Key, Scope, hash_of, id_of
from relay.limit import Limit
from relay.store.keys import Keys
from relay.tenant import DEFAULT
from relay.times import rfc3339

ADMIN_KEY = "admin_key"
# When more keys have a rate limit, the one that was used longest ago begins anew.
_MOST_LIMITED = 10_000
_LONGEST_ADDRESS = 64


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody whose key is good, until `expires_at`, for `rate_limit` requests a second; `actor` is the
    key's id, or `admin_key` for that of the configuration."""

    tenant: str
    actor: str
    scopes: Collection[Scope]
    address: str | None
    expires_at: int | None = None
    rate_limit: float | None = None

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    def need(self, scope: Scope) -> None:
        """Raises Forbidden unless the key has this scope, or all of them."""
        if scope not in self.scopes and not self.is_admin:
            has = ", ".join(self.scopes)
            raise Forbidden(f"this needs an API key with the scope {scope}; yours has {has}")


class Gate:
    """Lets requests in, by their keys as they are now, and remembers when each key was used last."""

    def __init__(self, keys: Keys, admin_key: str | None, *, now: Callable[[], int]) -> None:
        self._keys, self._now = keys, now
        self._admin = hash_of(admin_key) if admin_key else None
        self._limits: dict[str, Limit] = {}
        self._used: dict[str, int] = {}

    async def admit(self, request: Request[Any]) -> Caller:
        """Whoever's key the request carries. Raises Unauthorized without a good one, Limited when it is used
        too often."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise Unauthorized("send your API key: Authorization: Bearer <key>")
        address = request.client.host[:_LONGEST_ADDRESS] if request.client is not None else None
        if self._admin is not None and hmac.compare_digest(self._admin, hash_of(text)):
            return Caller(DEFAULT, ADMIN_KEY, (Scope.ADMIN,), address)
        key, now = await self._known(text), self._now()
        self._limit(key, now)
        self._used[key.id] = now
        return Caller(key.tenant, key.id, key.scopes, address, key.expires_at, key.rate_limit)

    async def still_admits(self, caller: Caller) -> bool:
        """Whether the key that somebody was let in with is still good."""
        if caller.actor == ADMIN_KEY:
            return True
        key = await self._keys.find(caller.actor)
        return (
            key is not None
            and key.revoked_at is None
            and (key.expires_at is None or key.expires_at > self._now())
        )

    async def write_down(self) -> None:
        """When keys were used last, as far as that is not written down yet. Raises StoreError, and may be
        tried again."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await self._keys.used(used)
        except StoreError:
            self._used = used | self._used
            raise

    async def _known(self, text: str) -> Key:
        id_ = id_of(text)
        key = await self._keys.find(id_) if id_ is not None else None
        if key is None or not key.has(text):
            raise Unauthorized("this API key is not known here")
        # Only who has the key is told what became of it.
        if key.revoked_at is not None:
            raise Unauthorized(f"this API key was revoked at {rfc3339(key.revoked_at)}")
        if key.expires_at is not None and key.expires_at <= self._now():
            raise Unauthorized(f"this API key expired at {rfc3339(key.expires_at)}")
        return key

    def _limit(self, key: Key, now: int) -> None:
        if key.rate_limit is None:
            return
        limit = self._limits.pop(key.id, None)
        if limit is None:
            if len(self._limits) >= _MOST_LIMITED:
                self._limits.pop(next(iter(self._limits)))
            limit = Limit(key.rate_limit, max(1, int(key.rate_limit)), most_keys=1)
        # The last one is the one that was used last.
        self._limits[key.id] = limit
        if wait := limit.take(key.id, now):
            raise Limited(f"this API key may be used {key.rate_limit:g} times a second", retry_after=wait)
