"""Blotting out: what must not travel further, in text that strangers wrote."""

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


_URL_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/%"
