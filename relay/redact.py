"""Blotting out: what must not travel further, in text that strangers wrote."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

BLOT = "[redacted]"
# A shorter one would blot out half of every text.
_SHORTEST = 6
_URL_CHARACTERS = "[A-Za-z0-9._~/%-]*"


def redact(value: Any, secrets: Sequence[str], *, capability: str) -> Any:
    """The JSON value without `secrets`, and without what follows the URL prefix `capability`."""
    blotted = [secret for secret in secrets if len(secret) >= _SHORTEST]
    urls = re.compile(re.escape(capability) + _URL_CHARACTERS)

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for secret in blotted:
                value = value.replace(secret, BLOT)
            return urls.sub(lambda found: capability + BLOT, value) if capability in value else value
        if isinstance(value, list):
            return [clean(one) for one in value]
        if isinstance(value, Mapping):
            return {clean(name): clean(one) for name, one in value.items()}
        return value

    return clean(value)


def without_password(url: str) -> str:
    """The URL of a database as it may be shown and stored."""
    # Up to the last @: whoever forgot to quote a password meant all of it.
    url = re.sub(r"(://[^:/?#@]*):.*@", r"\1@", url, flags=re.DOTALL)
    return re.sub(r"(?i)([?&][^=&]*pass[^=&]*)=[^&]*", rf"\1={BLOT}", url)
