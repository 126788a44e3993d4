"""Clients that take their time, or send without end: they are closed, and harm nobody meanwhile."""

import asyncio
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from statistics import quantiles

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from relay.app import build
from relay.config import read_config
from relay.server import LARGEST_HEAD, LARGEST_REQUEST, MOST_PIPELINED
from relay.web import operation
from tests.conftest import ADMIN_KEY, World
from tests.program import THOROUGH, Program
from tests.serving import listener, origin_of, serving

DEADLINE = 0.5
SOON = 5  # seconds that a machine with much else to do may be late
LARGE = 64 * 1024 * 1024
GET = b"GET / HTTP/1.1\r\nhost: relay\r\n"


class Client:
    """A connection on which anything can be sent, and all that comes is read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.begun = time.monotonic()

    @classmethod
    @asynccontextmanager
    async def to(cls, origin: str, *, window: int | None = None) -> AsyncIterator["Client"]:
        host, port = origin.removeprefix("http://").split(":")
        connection = socket.socket()
        if window is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        client = cls(*await asyncio.open_connection(sock=connection))
        try:
            yield client
        finally:
            client.writer.close()
            with suppress(OSError):
                await client.writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def drip(self, data: bytes, *, pause: float = 0.02) -> None:
        """A byte at a time, over and over, until the other side has closed."""
        while True:
            for place in range(len(data)):
                if self.reader.at_eof():
                    return
                try:
                    await self.send(data[place : place + 1])
                except OSError:
                    return
                await asyncio.sleep(pause)

    async def answer(self) -> tuple[int, bytes]:
        """The status and the body of the next answer."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 15)
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return int(head.split(b" ")[1]), await self.reader.readexactly(int(length or 0))

    async def closed(self, *, timeout: float = 15) -> float:
        """How many seconds it took the other side to close, since this connection was made."""
        with suppress(ConnectionError):
            async with asyncio.timeout(timeout):
                while await self.reader.read(65536):
                    pass
        return time.monotonic() - self.begun


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def late(request: Request) -> Response:
    """Answers after all deadlines."""
    await asyncio.sleep(3 * DEADLINE)
    return PlainTextResponse("late")


async def large(request: Request) -> Response:
    return Response(bytes(LARGE))


async def who(request: Request) -> Response:
    return JSONResponse([request.client.host if request.client else None, request.url.scheme])


APP = Starlette(
    routes=[Route("/", hello), Route("/late", late), Route("/large", large), Route("/who", who)],
)


@pytest.fixture
async def origin() -> AsyncIterator[str]:
    async with serving(APP, head_deadline=DEADLINE, unread_deadline=DEADLINE) as origin:
        yield origin


async def test_a_connection_that_says_nothing_is_closed(origin: str) -> None:
    async with Client.to(origin) as client:
        assert DEADLINE <= await client.closed() < DEADLINE + SOON


@pytest.mark.parametrize("head", [GET, b"\r\n", b"x-more: and more\r\n"], ids=["head", "lines", "nonsense"])
async def test_a_head_that_drips_is_cut_off(origin: str, head: bytes) -> None:
    async with Client.to(origin) as client:
        if head.startswith(b"x-"):
            await client.send(GET)
        async with asyncio.TaskGroup() as group:
            group.create_task(client.drip(head))
            assert await client.closed() < DEADLINE + SOON


async def test_a_head_that_is_slow_but_in_time_is_answered(origin: str) -> None:
    async with Client.to(origin) as client:
        for piece in (GET[:5], GET[5:20], GET[20:], b"\r\n"):
            await client.send(piece)
            await asyncio.sleep(DEADLINE / 50)
        assert await client.answer() == (200, b"hello")


@pytest.mark.parametrize("head", [GET, b"\r\n"], ids=["head", "lines"])
async def test_so_is_the_second_head_of_a_connection(origin: str, head: bytes) -> None:
    async with Client.to(origin) as client:
        for _ in range(3):
            await client.send(GET + b"\r\n")
            assert await client.answer() == (200, b"hello")
        client.begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(client.drip(head))
            assert await client.closed() < DEADLINE + SOON


async def test_a_connection_that_is_used_stays_open_for_longer_than_the_deadline(origin: str) -> None:
    async with Client.to(origin) as client:
        while time.monotonic() < client.begun + 3 * DEADLINE:
            await client.send(GET + b"\r\n")
            assert await client.answer() == (200, b"hello")
            await asyncio.sleep(DEADLINE / 5)


async def test_an_answer_may_take_longer_than_the_head_of_its_request(origin: str) -> None:
    async with Client.to(origin) as client:
        await client.send(b"GET /late HTTP/1.1\r\nhost: relay\r\n\r\n")
        assert await client.answer() == (200, b"late")
        await client.send(GET + b"\r\n")
        assert await client.answer() == (200, b"hello")


async def test_what_comes_before_a_head_that_never_ends_is_still_answered(origin: str) -> None:
    async with Client.to(origin) as client:
        await client.send(b"GET /late HTTP/1.1\r\nhost: relay\r\n\r\n" + GET)
        assert await client.answer() == (200, b"late")
        assert await client.closed() < 3 * DEADLINE + SOON


@pytest.mark.parametrize("target", [b"/", b"/nowhere"], ids=["wrong method", "unknown path"])
async def test_the_body_of_a_request_that_is_answered_already_is_not_waited_for(
    origin: str, target: bytes
) -> None:
    async with Client.to(origin) as client:
        await client.send(b"POST %s HTTP/1.1\r\nhost: relay\r\ncontent-length: 1000000\r\n\r\n" % target)
        assert (await client.answer())[0] in (404, 405)
        async with asyncio.TaskGroup() as group:
            group.create_task(client.drip(b"{}"))
            assert await client.closed() < DEADLINE + SOON


async def test_who_takes_nothing_of_an_answer_is_cut_off(origin: str) -> None:
    async with Client.to(origin) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(b"GET /large HTTP/1.1\r\nhost: relay\r\n\r\n")
        await asyncio.sleep(4 * DEADLINE)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        with suppress(ConnectionError):
            while got := await client.reader.read(1024 * 1024):
                received += len(got)
        assert received < LARGE


async def test_who_reads_slowly_gets_all_of_it() -> None:
    deadline = 1.0
    async with (
        serving(APP, unread_deadline=deadline) as origin,
        # What the system holds for a client is not seen: let it be little.
        Client.to(origin, window=65536) as client,
    ):
        await client.send(b"GET /large HTTP/1.1\r\nhost: relay\r\n\r\n")
        await client.reader.readuntil(b"\r\n\r\n")
        received = 0
        while received < LARGE and (got := await client.reader.read(LARGE - received)):
            received += len(got)
            # Not all of it so slowly.
            await asyncio.sleep(0.02 if time.monotonic() < client.begun + 3 * deadline else 0)
        assert received == LARGE
        assert time.monotonic() > client.begun + 2 * deadline


@pytest.mark.parametrize("size", [1000, 60_000, 300_000])
async def test_a_head_may_have_its_size_and_no_more(origin: str, size: int) -> None:
    full = GET + b"x-large: %s\r\n\r\n"
    most = b"x" * (LARGEST_HEAD - len(full) + len("%s"))
    for filling, expected in [(most, 200), (most + b"x", 431)]:
        async with Client.to(origin) as client:
            head = full % filling
            for place in range(0, len(head), size):
                await client.send(head[place : place + size])
            status, body = await client.answer()
            assert status == expected
            assert status == 200 or b"urn:relay:problem:head-too-large" in body


async def test_a_head_without_end_is_cut_off(origin: str) -> None:
    async with Client.to(origin) as client:
        sent = 0
        await client.send(GET)
        with suppress(ConnectionError):
            while sent < LARGE:
                await client.send(b"x-more: %s\r\n" % (b"x" * 50_000))
                sent += 50_000
        assert sent < LARGE


async def test_a_large_body_is_no_large_head(origin: str) -> None:
    async with Client.to(origin) as client:
        for _ in range(3):
            head = b"POST / HTTP/1.1\r\nhost: relay\r\ncontent-length: 5000000\r\n\r\n"
            await client.send(head + bytes(5_000_000))
            assert (await client.answer())[0] == 405


async def test_a_request_without_end_is_cut_off(origin: str) -> None:
    async with Client.to(origin) as client:
        sent = 0
        await client.send(b"POST /late HTTP/1.1\r\nhost: relay\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        with suppress(ConnectionError):
            while sent < 4 * LARGEST_REQUEST:
                await client.send(b"x-trailer: %s\r\n" % (b"x" * 50_000))
                sent += 50_000
        assert sent < 4 * LARGEST_REQUEST


async def test_requests_on_one_connection_do_not_pile_up(origin: str) -> None:
    async with Client.to(origin) as client:
        await client.send((GET + b"\r\n") * MOST_PIPELINED)
        assert [(await client.answer())[0] for _ in range(MOST_PIPELINED)] == [200] * MOST_PIPELINED
    async with Client.to(origin) as client:
        await client.send((GET + b"\r\n") * 5000)
        assert await client.closed() < DEADLINE + SOON


async def test_what_is_not_http_is_refused_as_a_problem(origin: str) -> None:
    async with Client.to(origin) as client:
        await client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 is how TLS begins\r\n\r\n")
        status, body = await client.answer()
        assert (status, b"malformed-request" in body) == (400, True)
        assert await client.closed() < DEADLINE + SOON


FORWARDED = {"x-forwarded-for": "203.0.113.7, 198.51.100.1", "x-forwarded-proto": "https"}


@pytest.mark.parametrize(
    ("trusted", "seen"),
    [
        ([], ["127.0.0.1", "http"]),
        (["10.0.0.0/8"], ["127.0.0.1", "http"]),
        (["127.0.0.1"], ["198.51.100.1", "https"]),
        (["127.0.0.0/8", "198.51.100.0/24"], ["203.0.113.7", "https"]),
    ],
    ids=["nobody", "another", "the proxy", "two proxies"],
)
async def test_forwarded_headers_are_believed_of_the_proxies_that_are_named(
    monkeypatch: pytest.MonkeyPatch, trusted: list[str], seen: list[str]
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    settings = read_config({"secret_key": "s", "network": {"trusted_proxies": trusted}}, {})
    async with (
        serving(APP, trusted_proxies=settings.network.trusted_proxies) as origin,
        httpx.AsyncClient(base_url=origin, headers=FORWARDED) as client,
    ):
        assert (await client.get("/who")).json() == seen


@asynccontextmanager
async def relay_of(world: World, monkeypatch: pytest.MonkeyPatch, deadline: float) -> AsyncIterator[str]:
    """The origin of a relay with short deadlines."""
    monkeypatch.setattr(operation, "BODY_DEADLINE", deadline)
    bound = listener()
    settings = read_config({"public_url": origin_of(bound), **world.document()}, {})
    async with serving(build(settings, now=world.clock), bound, head_deadline=deadline) as origin:
        yield origin


KEY = f"authorization: Bearer {ADMIN_KEY}\r\n".encode()


@pytest.mark.parametrize(
    ("target", "key", "expected"),
    [
        (b"/v1/events", KEY, 400),
        (b"/v1/events", b"", 401),
        (b"/v1/events/evt_1", KEY, 405),
        (b"/v1/nothing", KEY, 404),
        (b"/hooks/pictory/forged", b"", 404),
        (b"/hooks/vivix", b"", 404),
        (b"/hooks/signed", b"", 400),
        (b"/hooks", b"", 404),
    ],
)
async def test_a_body_that_drips_keeps_no_connection_of_the_relay(
    world: World, monkeypatch: pytest.MonkeyPatch, target: bytes, key: bytes, expected: int
) -> None:
    signed = {"provider": "vivix", "api_key": "some-key", "webhook_secret": "whsec_of_vivix"}
    document = world.document()
    monkeypatch.setattr(
        world, "document", lambda: {**document, "accounts": {**document["accounts"], "signed": signed}}
    )
    async with relay_of(world, monkeypatch, DEADLINE) as origin, Client.to(origin) as client:
        head = b"POST %s HTTP/1.1\r\nhost: relay\r\n%scontent-length: 100000\r\n\r\n" % (target, key)
        async with asyncio.TaskGroup() as group:
            group.create_task(client.send(head))
            group.create_task(client.drip(b" "))
            status, _ = await client.answer()
            assert status == expected
            assert await client.closed() < 2 * DEADLINE + SOON


async def test_the_body_of_a_get_is_not_waited_for_either(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relay_of(world, monkeypatch, DEADLINE) as origin, Client.to(origin) as client:
        await client.send(b"GET /v1/events HTTP/1.1\r\n" + KEY + b"content-length: 10\r\n\r\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(client.drip(b" ", pause=DEADLINE))
            assert (await client.answer())[0] == 400
            assert await client.closed() < 2 * DEADLINE + SOON


@pytest.mark.timeout(120)
async def test_slow_clients_stop_nobody_from_publishing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, deadline = (1000, 10.0) if THOROUGH else (100, 2.0)
    head = b"POST /v1/events HTTP/1.1\r\nhost: relay\r\n" + KEY
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(relay_of(world, monkeypatch, deadline))
        api = await stack.enter_async_context(
            httpx.AsyncClient(base_url=origin, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=30)
        )
        undisturbed = await publish(api, lambda: len(undisturbed_at) >= 50, undisturbed_at := [])
        slow = [await stack.enter_async_context(Client.to(origin)) for _ in range(count)]
        dripping = asyncio.gather(
            *(client.drip(head, pause=0.5) for client in slow[: count // 2]),
            *(drip_a_body(client, head) for client in slow[count // 2 :]),
        )
        disturbed = await publish(api, dripping.done, [])
        took = [await client.closed() for client in slow]
        await dripping
        assert max(took) < 2 * deadline + SOON + count / 200
    print(
        f"{count} slow clients: {len(disturbed)} published meanwhile, p99"
        f" {quantiles(disturbed, n=100)[98] * 1000:.0f} ms"
        f" (undisturbed {quantiles(undisturbed, n=100)[98] * 1000:.0f} ms), closed after {max(took):.1f} s"
    )


async def drip_a_body(client: Client, head: bytes) -> None:
    await client.send(head + b"content-length: 100000\r\n\r\n")
    await client.drip(b'{"type": "order.paid", ', pause=0.5)


async def publish(api: httpx.AsyncClient, over: Callable[[], bool], took: list[float]) -> list[float]:
    """Publishes one after the other until it is over; how many seconds each took."""
    while not over():
        begun = time.monotonic()
        answer = await api.post("/v1/events", json={"type": "order.paid", "data": {}})
        assert answer.status_code == 201
        took.append(time.monotonic() - begun)
        await asyncio.sleep(0.01)
    return took


async def test_relay_serve_may_open_as_many_files_as_the_system_lets_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    program = Program.placed(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard, 512), hard))
    try:
        await program.start()
        assert program.process is not None
        assert resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await program.end(signal.SIGKILL)
