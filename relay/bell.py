"""The bell: relays tell each other that there is something to do, through the database that they share.

A hint only: what there is to do is in the database too, and is found within a tick without it. Of an endpoint
that has changed, what is in hand goes out as it was then.
"""

import asyncio
import logging
from collections.abc import Callable

from relay.errors import StoreError
from relay.store.database import Database

log = logging.getLogger(__name__)
# PostgreSQL takes less than 8,000 bytes at once.
_MOST_BYTES = 7_000
# So many seconds between two rings: a relay that is woken for every single thing does everything singly.
_QUIET = 0.01


class Bell:
    """Rings for the other relays, in the name of `relay`; silent where there can be none."""

    def __init__(self, database: Database, *, relay: str) -> None:
        self._database, self._relay = database, relay
        self._words: dict[str, None] = {}
        self._ringing: asyncio.Task[None] | None = None

    def ring(self, what: str, which: int | str = "") -> None:
        """Tells the others, soon. What is rung while they are being told goes out together."""
        if self._database.alone:
            return
        self._words[f"{what} {which}"] = None
        if self._ringing is None:
            self._ringing = asyncio.create_task(self._ring())

    def hear(self, message: str, heard: Callable[[str, str], None]) -> None:
        """Calls `heard` with what and which of each word of a message that another relay has rung."""
        sender, *words = message.split("\n")
        if sender == self._relay:
            return
        for word in words:
            what, _, which = word.partition(" ")
            heard(what, which)

    async def flush(self) -> None:
        """Returns when everything has been rung."""
        if self._ringing is not None:
            await self._ringing

    async def _ring(self) -> None:
        try:
            while self._words:
                await self._database.notify("\n".join([self._relay, *self._some()]))
                await asyncio.sleep(_QUIET)
        except StoreError as error:
            log.debug("bell.silent: %s", error)
        finally:
            self._ringing = None

    def _some(self) -> list[str]:
        taken, size = list[str](), 0
        for word in list(self._words):
            size += len(word.encode()) + 1
            if size > _MOST_BYTES and taken:
                break
            taken.append(word[:_MOST_BYTES])
            del self._words[word]
        return taken
