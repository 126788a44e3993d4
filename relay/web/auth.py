"""Who is asking: API keys."""

import hashlib
import hmac
import secrets
from typing import Any

from starlette.requests import Request

from relay.errors import Unauthorized
from relay.store.tenants import DEFAULT
from relay.web.context import Relay


def new_key() -> str:
    return "rk_" + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored of a key: it is random enough for a fast hash."""
    return hashlib.sha256(key.encode()).hexdigest()


async def tenant_of(request: Request[Any], relay: Relay) -> str:
    """The tenant whose key the request carries. Raises Unauthorized without one or with a wrong one."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized("send your API key: Authorization: Bearer <key>")
    admin = relay.settings.admin_key
    if admin is not None and hmac.compare_digest(hash_key(admin), hash_key(key)):
        return DEFAULT
    tenant = await relay.store.tenants.key_tenant(hash_key(key))
    if tenant is None:
        raise Unauthorized("this API key is not known here")
    return tenant
