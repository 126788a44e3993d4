"""A provider file of somebody who is careless with credentials."""

from collections.abc import Mapping
from typing import Any

from relay.generation import Update
from relay.providers.luma import Luma


class Careless(Luma):
    """Every mistake that it makes shows the credential."""

    name = "careless"

    def authorization(self, api_key: str) -> str:
        if api_key.endswith("unspeakable"):
            raise RuntimeError(f"{api_key!r} is not a key that I like")
        return f"Bearer {api_key}"

    def read(self, answer: Mapping[str, Any], *, now: int) -> Update:
        raise LookupError(answer)
