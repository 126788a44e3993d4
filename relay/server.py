"""HTTP in: an ASGI application on a socket."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp

from relay.errors import ConfigError


class Server(uvicorn.Server):
    """uvicorn, which leaves signals and logs to the program; requests get `grace` seconds to end."""

    def __init__(self, app: ASGIApp, *, grace: float = 5) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,  # paths of /hooks/ are capabilities
                server_header=False,
                timeout_graceful_shutdown=max(1, round(grace)),
            )
        )

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
async def serving(app: ASGIApp, bound: socket.socket | None = None) -> AsyncIterator[str]:
    """The origin of an application that is served meanwhile, on `bound` or any free port of loopback."""
    with bound or bind("127.0.0.1", 0) as listener:
        server = Server(app)
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
