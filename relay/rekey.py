"""Sealing every secret with the newest `secret_key` while relays run; begun anew, it goes on where it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.store.sealed import SEALED, Sealed


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """So many secrets are `left` that were sealed with an older key meanwhile; `broken` says where those are
    that no key opens."""

    left: int
    broken: Sequence[str]


async def rekey(sealed: Sealed, *, show: Callable[[str, int], None]) -> Rekeyed:
    """Seals what is not sealed with the newest key; `show` is told of each table how many of its rows it has
    looked at."""
    broken: list[str] = []
    for table in SEALED:
        after: str | None = ""
        looked_at = 0
        while after is not None:
            page = await sealed.rekey(table, after)
            after = page.last
            looked_at += page.rows
            broken += page.broken
            show(table, looked_at)
    keys = await sealed.keys()
    return Rekeyed(left=sum(keys.values()) - keys.get(sealed.newest, 0) - len(broken), broken=broken)
