"""The conditions of a list, from the filters that were given."""

from collections.abc import Mapping, Sequence
from typing import Any


def where(filters: Mapping[str, Any], *, equal: Sequence[str], time: str, prefix: str = "") -> str:
    """`AND …` for each filter that is there: names in `equal` by value, since and until on column `time`."""
    parts = [f"AND {prefix}{name} = :{name}" for name in equal if name in filters]
    if "since" in filters:
        parts.append(f"AND {prefix}{time} >= :since")
    if "until" in filters:
        parts.append(f"AND {prefix}{time} < :until")
    return " ".join(parts)
