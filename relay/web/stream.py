"""A stream of events as server-sent events."""

import asyncio
import logging
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from relay.errors import StoreError
from relay.live import Reader
from relay.web.auth import Caller, Gate

log = logging.getLogger(__name__)
HEARTBEAT = 15.0
# What a client waits before it comes back; milliseconds.
RETRY = 1_000


class Stream(EventSourceResponse):
    """What a reader gives, for `timeout` seconds at most, and only as long as the caller's key is good."""

    def __init__(self, reader: Reader, gate: Gate, caller: Caller, *, timeout: float | None) -> None:
        super().__init__(self._told(), ping=HEARTBEAT, sep="\n")
        # Like every other answer, it gets this one outside of the application.
        del self.headers["cache-control"]
        self._reader, self._gate, self._caller, self._timeout = reader, gate, caller, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch())
        try:
            await super().__call__(scope, receive, send)
        finally:
            watch.cancel()
            self._reader.close()

    async def _told(self) -> AsyncIterator[ServerSentEvent]:
        # Without data it is no event, but readers remember its id.
        yield ServerSentEvent(retry=RETRY, id=self._reader.start, sep="\n")
        try:
            async for event in self._reader:
                yield ServerSentEvent(event.body.decode(), id=event.id, event=event.type, sep="\n")
        except StoreError as error:
            # Who comes back is told what is missing.
            log.error("stream.not_read: %s", error)

    async def _watch(self) -> None:
        left = self._timeout
        while left is None or left > 0:
            pause = HEARTBEAT if left is None else min(left, HEARTBEAT)
            await asyncio.sleep(pause)
            left = None if left is None else left - pause
            if not await self._is_let_in():
                break
        self._reader.end()

    async def _is_let_in(self) -> bool:
        try:
            return await self._gate.still_admits(self._caller)
        except StoreError:
            return True  # asked again soon
