"""HTTP in: an ASGI application on a socket."""

import asyncio
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.body import compact
from relay.errors import ConfigError

LARGEST_HEAD = 64 * 1024
# On the wire, with all that is no part of its body: the application has limits of its own.
LARGEST_REQUEST = 16 * 1024 * 1024
# Seconds: for the head of a request to arrive whole, and for a client to take anything of its answer.
HEAD_DEADLINE, UNREAD_DEADLINE = 10.0, 120.0
MOST_PIPELINED = 32


class Server(uvicorn.Server):
    """uvicorn, which leaves signals and logs to the program; requests get `grace` seconds to end.

    A connection is closed when the head of a request has not arrived whole `head_deadline` seconds after its
    first byte (or after connecting), and when nothing of an answer is taken for `unread_deadline` seconds.
    What `X-Forwarded-For` and `-Proto` say is believed of `trusted_proxies` only.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        grace: float = 5,
        trusted_proxies: Sequence[IPv4Network | IPv6Network] = (),
        head_deadline: float = HEAD_DEADLINE,
        unread_deadline: float = UNREAD_DEADLINE,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                ws="none",
                log_config=None,
                access_log=False,  # paths of /hooks/ are capabilities
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                # Without this it would ask the environment.
                forwarded_allow_ips=[str(network) for network in trusted_proxies],
                timeout_graceful_shutdown=max(1, round(grace)),
            )
        )
        self._head_deadline, self._unread_deadline = head_deadline, unread_deadline
        # uvicorn ticks ten times a second: nobody is a tenth of the deadline late.
        self._every = max(1, round(min(head_deadline, unread_deadline)))

    async def on_tick(self, counter: int) -> bool:
        if counter % self._every == 0:
            now = asyncio.get_running_loop().time()
            for one in list(self.server_state.connections):
                if isinstance(one, _Connection):
                    one.mind(now, self._head_deadline, self._unread_deadline)
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again in the end, and so end the program before it has cleaned up.
        yield

    def stop_on_signals(self, first: Callable[[], None] = lambda: None) -> None:
        """SIGTERM and SIGINT call `first`, and end `serve`."""

        def stop() -> None:
            first()
            self.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)

    def stop(self) -> None:
        """No new connections; `serve` returns once the requests under way have ended."""
        self.should_exit = True


class _Connection(HttpToolsProtocol):
    """uvicorn's, which would wait for ever, and take a head of any size."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # Since when something must come: until a head is there, and of what follows a request that was
        # answered before it had come whole.
        self._since: float | None = self.loop.time()
        self._read, self._in_body = 0, False
        self._unread, self._taken_at = 0, 0.0

    def mind(self, now: float, head_deadline: float, unread_deadline: float) -> None:
        """Closes the connection when it has been slow for too long; times are the loop's, in seconds."""
        unread = self.transport.get_write_buffer_size()
        if not self._unread or unread < self._unread:
            self._taken_at = now
        self._unread = unread
        if unread and now - self._taken_at >= unread_deadline:
            self.transport.abort()
        elif self._since is not None and now - self._since >= head_deadline:
            self._since = None
            if self._is_answered:
                self.transport.close()
            else:
                self.cycle.keep_alive = False  # the answer to what came before is still awaited

    def data_received(self, data: bytes) -> None:
        room = LARGEST_HEAD - self._read
        if len(data) <= room or self._in_body:
            self._feed(data)
            return
        self._feed(data[:room])
        if self._read >= LARGEST_HEAD and not self._in_body:
            self._refuse(431, "Head too large", f"the head of a request may be {LARGEST_HEAD} bytes")
        elif not self.transport.is_closing():
            self._feed(data[room:])

    def _feed(self, data: bytes) -> None:
        before, was_in_body = self.cycle, self._in_body
        super().data_received(data)
        if self.cycle is not before or was_in_body is not self._in_body:
            self._read = 0
        else:
            self._read += len(data)
            if self._read > LARGEST_REQUEST:
                self.transport.abort()
        if self._since is None and (self._is_answered or self.scope is not self.cycle.scope):
            self._since = self.loop.time()

    @property
    def _is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError("too many requests at once on one connection")
        super().on_headers_complete()
        self._since, self._in_body = None, True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Malformed request", "this is not a request of HTTP/1.1")

    def _refuse(self, status: int, title: str, detail: str) -> None:
        kind = "urn:relay:problem:" + title.lower().replace(" ", "-")
        body = compact({"type": kind, "title": title, "status": status, "detail": detail})
        lines = [
            f"HTTP/1.1 {status} {title}",
            "content-type: application/problem+json",
            f"content-length: {len(body)}",
            "cache-control: no-store",
            "x-content-type-options: nosniff",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


def use_all_files() -> None:
    """Raises the number of files, and so of connections, that this process may have open as far as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems name a limit that they do not take.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 means any free one. Raises ConfigError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's delay off only where the protocol is named.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"host, port: cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound


def origin(bound: socket.socket) -> str:
    """The URL of what is served on a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@asynccontextmanager
async def serving(app: ASGIApp, bound: socket.socket | None = None, **options: Any) -> AsyncIterator[str]:
    """The origin of an application that is served meanwhile, on `bound` or any free port of loopback;
    `options` are the server's."""
    with bound or bind("127.0.0.1", 0) as listener:
        server = Server(app, **options)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            if running.done():
                running.result()
                raise ConfigError("the application did not start")
            await asyncio.sleep(0.005)
        try:
            yield origin(listener)
        finally:
            server.stop()
            await running
