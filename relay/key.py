"""An API key: whose it is, what it may do, for how long. Nobody keeps the key itself, only its hash.

rk_01KKVHBCB0Q2VBV3N8S0WZ6T1D_7Gd…   rk_, the 26 characters of its id, 43 letters and digits by chance
"""

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from relay.ids import new_id

_LETTERS = string.digits + string.ascii_letters
# 43 of 62 letters are as many as 32 bytes.
_CHANCE = 43
_TEXT = re.compile(rf"rk_([0-9A-HJKMNP-TV-Z]{{26}})_[0-9A-Za-z]{{{_CHANCE}}}")


class Scope(StrEnum):
    """What a key may do for its tenant; none includes another one, but ADMIN all of them."""

    READ = "read"
    WRITE = "write"
    REPLAY = "replay"
    ADMIN = "admin"


MEANINGS: Mapping[Scope, str] = MappingProxyType(
    {
        Scope.READ: "look at everything but secrets, values of headers, keys and the audit log",
        Scope.WRITE: "create, change and delete endpoints and generations, publish events and declare"
        " their types, test, refresh",
        Scope.REPLAY: "make finished deliveries pending again, one or many, and cancel that",
        Scope.ADMIN: "everything, and alone: show and rotate secrets, keys, the audit log, add accounts",
    }
)


@dataclass(frozen=True, slots=True)
class Key:
    """`hash` is of its text; `rate_limit` is requests a second; times are unix milliseconds."""

    id: str
    tenant: str
    name: str | None
    scopes: Sequence[Scope]
    hash: str
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None
    rate_limit: float | None = None

    def has(self, text: str) -> bool:
        """Whether this is the text of this key."""
        return hmac.compare_digest(self.hash, hash_of(text))


def new_key(now: int) -> tuple[str, str]:
    """The id of a new key, and its text, which nobody can learn from anything that is stored."""
    id_ = new_id("key", now)
    chance = "".join(secrets.choice(_LETTERS) for _ in range(_CHANCE))
    return id_, f"rk_{id_.removeprefix('key_')}_{chance}"


def id_of(text: str) -> str | None:
    """The id of the key that a text may be, None when it cannot be one."""
    match = _TEXT.fullmatch(text)
    return f"key_{match[1]}" if match else None


def hash_of(text: str) -> str:
    """What is stored of a key: it is random enough for a fast hash."""
    return hashlib.sha256(text.encode()).hexdigest()
