"""Writing to the store: what arrives during one write forms the next, and what it does not take is kept."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from relay.errors import StoreError

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


async def insist(write: Callable[[], Awaitable[R]], *, again: Callable[[], bool]) -> R:
    """What `write` returns, tried with growing pauses while the store takes nothing at all; after each try
    `again` is asked whether to go on. Raises what it raised last."""
    pause = _FIRST_PAUSE
    while True:
        try:
            return await write()
        except StoreError as error:
            if not error.general or not again():
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


class Batch(Generic[T, R]):
    """Calls `write` with all the items that gathered since its last call began, at most `limit` at a time.

    Awaiting a call returns that item's result once `write` has returned, so what `write` made durable is
    durable then. A write that fails is repeated item by item, so that one bad item fails alone, unless
    the store took nothing at all. After each write `observed` is told how many there were, and how many
    seconds it took.
    """

    def __init__(
        self,
        write: Callable[[Sequence[T]], Awaitable[Sequence[R]]],
        *,
        limit: int = 500,
        observed: Callable[[int, float], None] = lambda count, seconds: None,
    ) -> None:
        self._write, self._observed = write, observed
        self._limit = limit
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._drain())
        return await future

    async def flush(self) -> None:
        """Returns when everything that waits now has been written or has failed."""
        while self._writing is not None:
            await asyncio.shield(self._writing)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                group = self._waiting[: self._limit]
                del self._waiting[: self._limit]
                await self._settle(group)
        finally:
            self._writing = None

    async def _settle(self, group: Sequence[tuple[T, asyncio.Future[R]]]) -> None:
        begun = time.perf_counter()
        try:
            results = await self._write([item for item, _ in group])
        except Exception as error:
            if len(group) > 1 and not (isinstance(error, StoreError) and error.general):
                log.warning("a write of %d failed, repeating it one by one: %s", len(group), error)
                for one in group:
                    await self._settle([one])
                return
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
            return
        self._observed(len(group), time.perf_counter() - begun)
        for (_, future), result in zip(group, results, strict=True):
            # A caller that went away is told nothing; its item is written all the same.
            if not future.done():
                future.set_result(result)
