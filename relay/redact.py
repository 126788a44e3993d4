"""Blotting out: what must not travel further, in text that strangers wrote."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

BLOT = "[redacted]"
# A shorter one would blot out half of every text.
_SHORTEST = 6


def redact(value: Any, secrets: Sequence[str], *, capability: str) -> Any:
    """The JSON value without `secrets`, and without what follows the URL prefix `capability`."""
    if isinstance(value, str):
        for secret in secrets:
            if len(secret) >= _SHORTEST:
                value = value.replace(secret, BLOT)
        head, found, tail = value.partition(capability)
        if found:
            rest = tail.lstrip(_URL_CHARACTERS)
            value = head + found + BLOT + redact(rest, (), capability=capability)
        return value
    if isinstance(value, Mapping):
        return {
            redact(name, secrets, capability=capability): redact(one, secrets, capability=capability)
            for name, one in value.items()
        }
    if isinstance(value, list):
        return [redact(one, secrets, capability=capability) for one in value]
    return value


def without_password(url: str) -> str:
    """The URL of a database as it may be shown and stored."""
    # Up to the last @: whoever forgot to quote a password meant all of it.
    url = re.sub(r"(://[^:/?#@]*):.*@", r"\1@", url, flags=re.DOTALL)
    return re.sub(r"(?i)([?&][^=&]*pass[^=&]*)=[^&]*", rf"\1={BLOT}", url)


_URL_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/%"
