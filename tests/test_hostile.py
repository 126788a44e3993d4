"""Subscribers that lie, stall, flood and break off, on real sockets: each costs one bounded attempt."""

import asyncio
import gzip
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme

from relay.delivery import Answer, Code
from relay.guard import Guard
from relay.sender import Sender
from tests.serving import listener

TIMEOUT = 600  # milliseconds
SLACK = 2.0  # of a busy machine
LOOPBACK = [ip_network("127.0.0.0/8"), ip_network("::1/128")]
BODY = b'{"type":"order.paid"}'
BIG_BODY = b"x" * 1024 * 1024
KEPT = 16 * 1024
# What one attempt may take off a flood: 64 KiB, and what the kernel holds between the two.
SOCKET_BUFFERS = 2 * 1024 * 1024
BLOCK = 64 * 1024
FLOOD = 100 * 1024 * 1024
OK = b"HTTP/1.1 200 OK\r\n"


def now() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Peer:
    """One connection, at the subscriber's end; `written` is what the client's kernel or ours took."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    written: int = 0

    async def request(self) -> bytes:
        """Reads the whole request; its head."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        [length] = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        await self.reader.readexactly(int(length))
        return head

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        self.written += len(data)

    async def flood(self, block: bytes, most: int = FLOOD) -> None:
        """Writes blocks for as long as somebody takes them."""
        for _ in range(most // len(block)):
            await self.write(block)

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""
        while await self.reader.read(BLOCK):
            pass

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


Behaviour = Callable[[Peer], Awaitable[None]]


@dataclass
class Hostile:
    """A subscriber that is served meanwhile, and the connections it had."""

    port: int
    peers: list[Peer]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def written(self) -> int:
        return sum(peer.written for peer in self.peers)


@asynccontextmanager
async def behaving(
    behaviour: Behaviour, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Hostile]:
    tasks: set[asyncio.Task[None]] = set()
    hostile = Hostile(0, [])

    async def serve(peer: Peer) -> None:
        try:
            # A client that has had enough closes: that is what these servers are there for.
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await behaviour(peer)
            peer.writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await peer.writer.wait_closed()
        except asyncio.CancelledError:
            peer.writer.transport.abort()
            raise

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK)
        peer = Peer(reader, writer)
        hostile.peers.append(peer)
        tasks.add(asyncio.create_task(serve(peer)))

    server = await asyncio.start_server(connected, host, 0, ssl=tls)
    hostile.port = server.sockets[0].getsockname()[1]
    try:
        yield hostile
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
        assert [end for end in ends if isinstance(end, Exception)] == [], "the server itself went wrong"


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    opened = Sender.open(Guard(LOOPBACK), timeout=TIMEOUT, now=now)
    yield opened
    await opened.close()


async def attempt(sender: Sender, url: str, body: bytes = BODY) -> Answer:
    """One POST, which keeps to its deadline and to its size."""
    begun = time.monotonic()
    answer = await sender.send(url, body, {"webhook-id": "evt_1"})
    assert time.monotonic() - begun <= TIMEOUT / 1000 + SLACK
    assert answer.body is None or len(answer.body) <= KEPT
    assert (answer.code is None) == answer.accepted
    assert (answer.code is None) == (answer.message is None)
    return answer


def says(*parts: bytes, stay: bool = False) -> Behaviour:
    """Reads the request, writes the parts, and closes, or waits for the client to close."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        for part in parts:
            await peer.write(part)
        if stay:
            await peer.gone()

    return behaviour


def answers(head: bytes, body: bytes = b"", status: bytes = b"200 OK") -> Behaviour:
    """A whole answer with a content length."""
    length = b"content-length: %d\r\n" % len(body)
    return says(b"HTTP/1.1 " + status + b"\r\n" + head + length + b"\r\n" + body, stay=True)


def floods(head: bytes, block: bytes = b"x" * BLOCK) -> Behaviour:
    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.write(head)
        await peer.flood(block)

    return behaviour


def drips(head: bytes, drop: bytes) -> Behaviour:
    """Slowly for ever: each time in less than any pause that a client would wait for."""

    async def behaviour(peer: Peer) -> None:
        await peer.request()
        await peer.write(head)
        while True:
            await peer.write(drop)
            await asyncio.sleep(0.05)

    return behaviour


async def good(peer: Peer) -> None:
    while True:
        await peer.request()
        await peer.write(b"HTTP/1.1 204 No Content\r\n\r\n")


async def reads_nothing(peer: Peer) -> None:
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.Event().wait()


async def hangs(peer: Peer) -> None:
    await peer.request()
    await peer.gone()


async def resets_at_once(peer: Peer) -> None:
    peer.reset()


async def resets_after_the_request(peer: Peer) -> None:
    await peer.request()
    peer.reset()


async def closes_at_once(peer: Peer) -> None:
    pass


async def answers_before_it_reads(peer: Peer) -> None:
    await peer.write(OK + b"content-length: 2\r\n\r\nok")
    await peer.gone()


async def answers_before_it_reads_and_closes(peer: Peer) -> None:
    await peer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


async def talks_before_it_is_asked(peer: Peer) -> None:
    await peer.write(b"\x16\x03garbage\r\n\r\n")
    await peer.gone()


BOMB = b"\0" * 64 * 1024 * 1024
ZSTD_FRAME = bytes.fromhex("28b52ffd") + b"\x80\x58" + b"\0" * 4096
LONG_LINE = b"x" * 8 * 1024 * 1024
HTTP_2 = bytes.fromhex("000006040000000000" + "000300000064" + "0000080700000000000000000000000001")
REDIRECT = b"HTTP/1.1 302 Found\r\nlocation: %s\r\ncontent-length: 0\r\n\r\n"

ANY = -1

# A behaviour, the right code (or several), and the status that is recorded, ANY where that is left open.
CASES: dict[str, tuple[Behaviour, Code | set[Code | None] | None, int | None]] = {
    # No answer.
    "accepts and reads nothing": (reads_nothing, Code.TIMEOUT, None),
    "reads and says nothing": (hangs, Code.TIMEOUT, None),
    "resets at once": (resets_at_once, Code.DISCONNECTED, None),
    "resets after the request": (resets_after_the_request, Code.DISCONNECTED, None),
    "closes at once": (closes_at_once, Code.DISCONNECTED, None),
    "closes after the request": (says(), Code.DISCONNECTED, None),
    "closes in the status line": (says(b"HTTP/1.1 20"), Code.DISCONNECTED, None),
    "closes in the headers": (says(OK + b"a: b\r\n"), Code.DISCONNECTED, None),
    # Status lines.
    "status abc": (says(b"HTTP/1.1 abc\r\n\r\n"), Code.BAD_RESPONSE, None),
    "status 2": (says(b"HTTP/1.1 2\r\n\r\n"), Code.BAD_RESPONSE, None),
    "status 20000": (says(b"HTTP/1.1 20000 OK\r\n\r\n"), Code.BAD_RESPONSE, None),
    "status -200": (says(b"HTTP/1.1 -200 OK\r\n\r\n"), Code.BAD_RESPONSE, None),
    "no status": (says(b"HTTP/1.1\r\n\r\n"), Code.BAD_RESPONSE, None),
    "HTTP/0.9": (says(b"<html>hello</html>"), Code.BAD_RESPONSE, None),
    "HTTP/9.9": (says(b"HTTP/9.9 200 OK\r\n\r\n"), Code.BAD_RESPONSE, None),
    "not HTTP": (says(b"SSH-2.0-OpenSSH_9.7\r\n"), Code.BAD_RESPONSE, None),
    "status 000": (answers(b"", status=b"000 Zero"), {Code.HTTP_STATUS, Code.BAD_RESPONSE}, ANY),
    "status 099": (answers(b"", status=b"099 Low"), {Code.HTTP_STATUS, Code.BAD_RESPONSE}, ANY),
    "status 600": (answers(b"", status=b"600 High"), {Code.HTTP_STATUS, Code.BAD_RESPONSE}, ANY),
    "status 999": (answers(b"", status=b"999 Higher"), {Code.HTTP_STATUS, Code.BAD_RESPONSE}, ANY),
    "unexpected 101": (
        says(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", stay=True),
        {Code.HTTP_STATUS, Code.BAD_RESPONSE},
        ANY,
    ),
    "unexpected 101 and a flood": (
        floods(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
        {Code.HTTP_STATUS, Code.BAD_RESPONSE},
        ANY,
    ),
    "100 and then 200": (
        says(b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"content-length: 0\r\n\r\n"),
        None,
        200,
    ),
    "endless 103": (drips(b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"), Code.TIMEOUT, None),
    "endless 100": (drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), Code.TIMEOUT, None),
    "a flood of 103": (
        floods(b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 1000),
        {Code.TIMEOUT, Code.BAD_RESPONSE, Code.DISCONNECTED},
        None,
    ),
    # Headers.
    "a status line of 8 MB": (says(OK[:-2] + LONG_LINE + b"\r\n\r\n"), Code.BAD_RESPONSE, None),
    "one header of 8 MB": (says(OK + b"a: " + LONG_LINE + b"\r\n\r\n"), Code.BAD_RESPONSE, None),
    "a header name of 8 MB": (says(OK + LONG_LINE + b": a\r\n\r\n"), Code.BAD_RESPONSE, None),
    "400 headers of 1 KB": (
        says(OK + b"".join(b"x-%d: " % n + b"x" * 1024 + b"\r\n" for n in range(400)) + b"\r\n"),
        Code.BAD_RESPONSE,
        None,
    ),
    "endless headers": (floods(OK, b"a: b\r\n" * 1000), Code.BAD_RESPONSE, None),
    "NUL in a header": (says(OK + b"a: b\0c\r\ncontent-length: 0\r\n\r\n"), Code.BAD_RESPONSE, None),
    "NUL in a header name": (says(OK + b"a\0: b\r\ncontent-length: 0\r\n\r\n"), Code.BAD_RESPONSE, None),
    "latin-1 in a header": (answers(b"a: caf\xe9\r\n"), {None, Code.BAD_RESPONSE}, ANY),
    "a header with no colon": (says(OK + b"garbage\r\n\r\n"), Code.BAD_RESPONSE, None),
    "a header that begins with a space": (says(OK + b" a: b\r\n\r\n"), {None, Code.BAD_RESPONSE}, ANY),
    "two content lengths": (
        says(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nabc"),
        Code.BAD_RESPONSE,
        None,
    ),
    "two equal content lengths": (
        says(OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\nab"),
        {None, Code.BAD_RESPONSE},
        ANY,
    ),
    "negative content length": (says(OK + b"content-length: -1\r\n\r\n"), Code.BAD_RESPONSE, None),
    "content length abc": (says(OK + b"content-length: abc\r\n\r\n"), Code.BAD_RESPONSE, None),
    "content length of 40 digits": (
        says(OK + b"content-length: " + b"9" * 40 + b"\r\n\r\n"),
        Code.BAD_RESPONSE,
        None,
    ),
    "content length and chunks": (
        says(OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"),
        {None, Code.BAD_RESPONSE},
        ANY,
    ),
    "an unknown transfer encoding": (
        says(OK + b"transfer-encoding: cow\r\n\r\nmoo"),
        {None, Code.BAD_RESPONSE},
        ANY,
    ),
    # Bodies.
    "bad chunk size": (
        says(OK + b"transfer-encoding: chunked\r\n\r\nxyz\r\nab\r\n0\r\n\r\n", stay=True),
        Code.BAD_RESPONSE,
        ANY,
    ),
    "bad chunk size, later": (
        says(OK + b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n", b"-1\r\n", stay=True),
        Code.BAD_RESPONSE,
        ANY,
    ),
    "a chunk size of 40 digits": (
        says(OK + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", stay=True),
        Code.BAD_RESPONSE,
        ANY,
    ),
    "a chunk extension without end": (
        floods(OK + b"transfer-encoding: chunked\r\n\r\n1;a=", b"x" * BLOCK),
        {None, Code.BAD_RESPONSE, Code.DISCONNECTED},
        ANY,
    ),
    "tiny chunks with long extensions": (
        floods(OK + b"transfer-encoding: chunked\r\n\r\n", b"1;a=" + b"x" * 8000 + b"\r\nx\r\n"),
        {None, Code.BAD_RESPONSE, Code.DISCONNECTED},
        ANY,
    ),
    "trailers without end": (
        floods(OK + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 1000),
        {None, Code.BAD_RESPONSE, Code.DISCONNECTED},
        ANY,
    ),
    "short body": (says(OK + b"content-length: 100\r\n\r\nabc"), Code.DISCONNECTED, 200),
    "short chunks": (says(OK + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"), Code.DISCONNECTED, 200),
    "a body that never comes": (says(OK + b"content-length: 3\r\n\r\n", stay=True), Code.TIMEOUT, 200),
    "a byte of the headers now and then": (drips(OK + b"a: ", b"b"), Code.TIMEOUT, None),
    "a byte of the body now and then": (drips(OK + b"content-length: 1000\r\n\r\n", b"x"), Code.TIMEOUT, 200),
    "endless body": (floods(OK + b"\r\n"), None, 200),
    "endless chunks": (
        floods(OK + b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * BLOCK + b"\r\n"),
        None,
        200,
    ),
    "100 MB body": (floods(OK + b"content-length: 104857600\r\n\r\n"), None, 200),
    "100 MB error": (floods(b"HTTP/1.1 500 No\r\ncontent-length: 104857600\r\n\r\n"), Code.HTTP_STATUS, 500),
    "gzip bomb": (answers(b"content-encoding: gzip\r\n", gzip.compress(BOMB)), None, 200),
    "deflate bomb": (answers(b"content-encoding: deflate\r\n", zlib.compress(BOMB)), None, 200),
    "brotli that is none": (answers(b"content-encoding: br\r\n", b"\xff" * 4096), None, 200),
    "zstd that is none": (answers(b"content-encoding: zstd\r\n", ZSTD_FRAME), None, 200),
    "gzip that is none": (answers(b"content-encoding: gzip\r\n", b"\x1f\x8bnot gzip"), None, 200),
    "gzip in gzip in gzip": (answers(b"content-encoding: gzip, gzip, gzip\r\n", b"x"), None, 200),
    "charset zlib_codec": (answers(b"content-type: text/plain; charset=zlib_codec\r\n", b"abc"), None, 200),
    "an unknown charset": (answers(b"content-type: text/plain; charset=\xff\r\n", b"abc"), None, 200),
    "not UTF-8, and NUL": (answers(b"", b"\xff\xfe\0\xc3"), None, 200),
    "200 with an error inside": (answers(b"", b'{"error":"no"}'), None, 200),
    "204": (says(b"HTTP/1.1 204 No Content\r\n\r\n"), None, 204),
    "204 with a body": (
        says(b"HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc"),
        {None, Code.BAD_RESPONSE},
        ANY,
    ),
    "205": (says(b"HTTP/1.1 205 Reset Content\r\ncontent-length: 0\r\n\r\n"), None, 205),
    "410": (answers(b"", status=b"410 Gone"), Code.HTTP_STATUS, 410),
    "418 and a body": (answers(b"", b"short and stout", status=b"418 Teapot"), Code.HTTP_STATUS, 418),
    # Redirects.
    **{
        f"{status} to {where!r}": (says(REDIRECT.replace(b"302", status) % where), Code.REDIRECT, int(status))
        for status, where in [
            (b"301", b"/"), (b"302", b"javascript:1"), (b"302", b"http://[::1"), (b"302", b"//"),
            (b"302", b""), (b"303", b"http://127.0.0.1:0/"), (b"307", b"\xff\xfe"), (b"308", b"file:///etc/passwd"),
            (b"302", b"http://a b/"), (b"302", b"http://user:pw@x.test/"),
        ]
    },
    "300 with no location": (answers(b"", status=b"300 Many"), Code.REDIRECT, 300),
    "304": (says(b"HTTP/1.1 304 Not Modified\r\n\r\n"), Code.REDIRECT, 304),
    # Out of turn.
    "an answer before the request": (answers_before_it_reads, {None, Code.DISCONNECTED}, ANY),
    "garbage before the request": (talks_before_it_is_asked, {Code.BAD_RESPONSE, Code.DISCONNECTED}, None),
    "two answers": (says((OK + b"content-length: 0\r\n\r\n") * 2), {None, Code.BAD_RESPONSE}, ANY),
    "an answer and garbage": (
        says(OK + b"content-length: 0\r\n\r\n\0\0garbage", stay=True),
        {None, Code.BAD_RESPONSE},
        ANY,
    ),
    "HTTP/2 only": (says(HTTP_2), Code.BAD_RESPONSE, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_an_attempt_ends_in_time_with_its_code_and_the_next_one_is_unharmed(
    sender: Sender, name: str
) -> None:
    behaviour, right, status = CASES[name]
    async with behaving(behaviour) as hostile, behaving(good) as sound:
        answer = await attempt(sender, hostile.url)
        assert answer.code in (right if isinstance(right, set) else {right})
        assert status in (ANY, answer.status)
        assert hostile.written <= 64 * 1024 + SOCKET_BUFFERS
        assert len(hostile.peers) == 1, "one attempt is one connection"
        assert (await attempt(sender, sound.url)).status == 204


async def test_a_full_backlog_costs_the_deadline(sender: Sender) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        address = full.getsockname()
        loop = asyncio.get_running_loop()
        # Whoever is not let in at once has found the backlog full: his SYN goes unanswered.
        for _ in range(16):
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            try:
                await asyncio.wait_for(loop.sock_connect(knocking, address), 0.1)
            except TimeoutError:
                break
        else:
            pytest.fail("the backlog never fills here")
        assert (await attempt(sender, f"http://127.0.0.1:{address[1]}/")).code is Code.TIMEOUT


@pytest.mark.parametrize(
    ("behaviour", "right"),
    [
        (reads_nothing, {Code.TIMEOUT}),
        (answers_before_it_reads, {None, Code.DISCONNECTED}),
        (answers_before_it_reads_and_closes, {Code.HTTP_STATUS, Code.DISCONNECTED}),
    ],
)
async def test_a_big_body_that_nobody_reads_costs_at_most_the_deadline(
    sender: Sender, behaviour: Behaviour, right: set[Code | None]
) -> None:
    async with behaving(behaviour) as hostile, behaving(good) as sound:
        assert (await attempt(sender, hostile.url, BIG_BODY)).code in right
        assert (await attempt(sender, sound.url, BIG_BODY)).accepted


async def test_nobody_listens(sender: Sender) -> None:
    with listener() as bound:
        assert (await attempt(sender, f"http://127.0.0.1:{bound.getsockname()[1]}/")).code is Code.CONNECT


async def test_an_endpoint_that_has_only_an_ipv6_address_is_reached(sender: Sender) -> None:
    async with behaving(good, host="::1") as six:
        assert (await attempt(sender, f"http://[::1]:{six.port}/")).status == 204


@pytest.mark.parametrize(
    "url",
    ["", "/", "http://", "http:///x", "http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:x/",
     "http://a b/",      "http://127.0.0.1\0/", "http://2130706433/", "http://127.1/", "ftp://127.0.0.1/", "file:///etc/passwd",
     "javascript:1", "http://" + "a" * 64 + ".test/", "http://" + "a." * 200 + "test/", "http://\udcff/",
     "http://127.0.0.1/\r\nx: y"],
)  # fmt: skip
async def test_what_is_no_url_is_an_answer_too(sender: Sender, url: str) -> None:
    answer = await attempt(sender, url)
    assert (answer.accepted, answer.status, answer.body) == (False, None, None)


async def test_what_a_server_says_after_its_answer_is_not_the_answer_to_the_next_request(
    sender: Sender,
) -> None:
    async def poisons(peer: Peer) -> None:
        await peer.request()
        await peer.write(OK + b"content-length: 2\r\n\r\nok")
        await peer.write(b"HTTP/1.1 500 Forged\r\ncontent-length: 6\r\n\r\nforged")
        await peer.gone()

    async with behaving(poisons) as hostile:
        for _ in range(3):
            assert (await attempt(sender, hostile.url)).body in ("ok", None)


async def test_a_cookie_is_not_kept_and_nothing_of_the_answer_comes_back(sender: Sender) -> None:
    heads = []

    async def sets_cookies(peer: Peer) -> None:
        while True:
            heads.append(await peer.request())
            await peer.write(OK + b"set-cookie: a=b; path=/\r\nset-cookie: c=d\r\ncontent-length: 0\r\n\r\n")

    async with behaving(sets_cookies) as hostile:
        for _ in range(2):
            assert (await attempt(sender, hostile.url)).accepted
    assert len(heads) == 2 and heads[0] == heads[1]
    names = {line.split(b":")[0].lower() for line in heads[1].split(b"\r\n")[1:] if line}
    assert names == {
        *(b"host", b"user-agent", b"content-type", b"content-length", b"accept", b"accept-encoding"),
        b"webhook-id",
    }
    assert b"accept-encoding: identity" in heads[0].lower()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 200, 503])
async def test_no_answer_leads_anywhere_else(sender: Sender, status: int) -> None:
    async with behaving(good) as canary:
        head = "location: {0}\r\nrefresh: 0; url={0}\r\ncontent-location: {0}\r\nlink: <{0}>; rel=preload\r\n"
        pointing = answers(head.format(canary.url).encode(), status=b"%d X" % status)
        async with behaving(pointing) as hostile:
            answer = await attempt(sender, hostile.url)
            assert (answer.status, len(hostile.peers)) == (status, 1)
        assert canary.peers == []


async def test_a_redirect_to_itself_is_one_request(sender: Sender) -> None:
    async with behaving(answers(b"location: /\r\n", status=b"307 Loop")) as hostile:
        assert (await attempt(sender, hostile.url)).code is Code.REDIRECT
        assert len(hostile.peers) == 1


@pytest.mark.parametrize(
    "value", ["-1", "0", "1e12", "9" * 30, "NaN", "", "Wed, 21 Oct 2015 07:28:00 GMT", "x"]
)
async def test_a_retry_after_that_says_nothing_is_nothing(sender: Sender, value: str) -> None:
    head = f"retry-after: {value}\r\n".encode()
    async with behaving(answers(head, status=b"429 Slow down")) as hostile:
        answer = await attempt(sender, hostile.url)
    assert (answer.code, answer.status) == (Code.HTTP_STATUS, 429)
    assert not answer.retry_after


async def test_a_hundred_hostile_subscribers_at_once_delay_a_good_one_little(sender: Sender) -> None:
    behaviours = [hangs, reads_nothing, resets_at_once, floods(OK + b"\r\n"), drips(OK, b"a: b\r\n")]
    async with AsyncExitStack() as stack:
        hostile = [await stack.enter_async_context(behaving(behaviour)) for behaviour in behaviours]
        sound = await stack.enter_async_context(behaving(good))
        bad = [asyncio.create_task(sender.send(one.url, BODY, {})) for one in hostile * 20]
        assert (await attempt(sender, sound.url)).status == 204
        answers_ = await asyncio.gather(*bad)
    assert all(answer.duration_ms <= TIMEOUT + SLACK * 1000 for answer in answers_)
    codes = [Code.TIMEOUT, Code.TIMEOUT, Code.DISCONNECTED, None, Code.TIMEOUT]
    assert [answer.code for answer in answers_] == codes * 20


# TLS. Whom aiohttp trusts is settled when it is imported, from SSL_CERT_FILE: so one process that trusts
# the certificate authority of these tests sends to all of these servers.


async def speaks_tls_1_0(peer: Peer) -> None:
    await peer.reader.read(BLOCK)
    await peer.write(bytes.fromhex("160301002a 02000026 0301" + "00" * 32 + "00 c014 00"))
    await peer.gone()


async def stalls_the_handshake(peer: Peer) -> None:
    await peer.reader.read(BLOCK)
    await peer.write(bytes.fromhex("1603030040 0200003c"))
    await peer.gone()


async def never_begins_the_handshake(peer: Peer) -> None:
    await peer.gone()


async def floods_the_handshake(peer: Peer) -> None:
    await peer.flood(bytes.fromhex("1603034000") + b"\xff" * 16384)


async def refuses_the_name(peer: Peer) -> None:
    await peer.reader.read(BLOCK)
    await peer.write(bytes.fromhex("15030300020270"))
    await peer.gone()


async def speaks_plain_http(peer: Peer) -> None:
    await peer.reader.read(BLOCK)
    await peer.write(b"HTTP/1.1 400 Plain\r\ncontent-length: 0\r\n\r\n")
    await peer.gone()


AUTHORITY, STRANGER = trustme.CA(), trustme.CA()
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


def certified(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


# The server closes in the middle, which says nothing of why.
BROKEN_OFF = {Code.TLS, Code.CONNECT, Code.DISCONNECTED}


def tls_cases() -> dict[str, tuple[Behaviour, ssl.SSLContext | None, str, Code | set[Code] | None]]:
    here, trusted = "127.0.0.1", AUTHORITY.issue_cert("127.0.0.1", "localhost")
    expired = AUTHORITY.issue_cert(here, not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=1))
    not_yet = AUTHORITY.issue_cert(here, not_before=now_plus(days=2), not_after=now_plus(days=3))
    chained = certified(trusted)
    with trustme.Blob(
        trusted.private_key_and_cert_chain_pem.bytes() + AUTHORITY.cert_pem.bytes() * 400
    ).tempfile() as pem:
        chained.load_cert_chain(pem)
    demanding = certified(trusted)
    demanding.verify_mode = ssl.CERT_REQUIRED
    demanding.maximum_version = ssl.TLSVersion.TLSv1_2
    return {
        "trusted": (good, certified(trusted), here, None),
        "trusted, by name": (good, certified(trusted), "localhost", None),
        "trusted, and hangs": (hangs, certified(trusted), here, Code.TIMEOUT),
        "trusted, and resets": (resets_after_the_request, certified(trusted), here, Code.DISCONNECTED),
        "trusted, and floods": (floods(OK + b"\r\n"), certified(trusted), here, None),
        "expired": (good, certified(expired), here, Code.TLS),
        "not yet valid": (good, certified(not_yet), here, Code.TLS),
        "of nobody trusted": (good, certified(STRANGER.issue_cert(here)), here, Code.TLS),
        "wrong host": (good, certified(AUTHORITY.issue_cert("other.test")), here, Code.TLS),
        "wrong address": (good, certified(AUTHORITY.issue_cert("127.0.0.2")), here, Code.TLS),
        "wildcard of another": (good, certified(AUTHORITY.issue_cert("*.localhost")), "localhost", Code.TLS),
        "refuses the name": (refuses_the_name, None, "localhost", Code.TLS),
        "wants our certificate": (good, demanding, here, BROKEN_OFF),
        "huge chain": (good, chained, here, Code.TLS),
        "TLS 1.0": (speaks_tls_1_0, None, here, Code.TLS),
        "no TLS at all": (speaks_plain_http, None, here, Code.TLS),
        "stalls in the handshake": (stalls_the_handshake, None, here, Code.TIMEOUT),
        "never begins the handshake": (never_begins_the_handshake, None, here, Code.TIMEOUT),
        "floods the handshake": (floods_the_handshake, None, here, Code.TLS),
        "closes in the handshake": (closes_at_once, None, here, BROKEN_OFF),
        "resets in the handshake": (resets_at_once, None, here, BROKEN_OFF),
    }


def now_plus(*, days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


TLS_CASES = tls_cases()


def child() -> None:
    """Sends to the URLs of its input, one after another, and prints the answers."""

    async def send_all(urls: Sequence[str]) -> list[dict[str, Any]]:
        sender = Sender.open(Guard(LOOPBACK), timeout=TIMEOUT, now=now)
        try:
            return [asdict(await attempt(sender, url)) for url in urls]
        finally:
            await sender.close()

    print(json.dumps(asyncio.run(send_all(json.load(sys.stdin)))))


@pytest.fixture(scope="module")
def tls_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, int]]:
    """For every case the answer, and how many bytes its server got rid of."""
    trusted = tmp_path_factory.mktemp("tls") / "trusted.pem"
    AUTHORITY.cert_pem.write_to_path(str(trusted))

    async def ask() -> dict[str, tuple[Answer, int]]:
        async with AsyncExitStack() as stack:
            canary = await stack.enter_async_context(behaving(good))
            served = {
                name: await stack.enter_async_context(behaving(behaviour, tls=context))
                for name, (behaviour, context, _, _) in TLS_CASES.items()
            }
            urls = [f"https://{TLS_CASES[name][2]}:{one.port}/" for name, one in served.items()]
            running = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-W", "error", "-c", "from tests.test_hostile import child; child()"),
                env={
                    **os.environ,
                    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy"), canary.url),
                    "PYTHONPATH": str(Path(__file__).parent.parent),
                    "SSL_CERT_FILE": str(trusted),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            printed, _ = await asyncio.wait_for(running.communicate(json.dumps(urls).encode()), 60)
            assert running.returncode == 0
            assert canary.peers == [], "the proxy of the environment was used"
            found = [
                Answer(**{**one, "code": one["code"] and Code(one["code"])}) for one in json.loads(printed)
            ]
            return {
                name: (answer, one.written) for (name, one), answer in zip(served.items(), found, strict=True)
            }

    return asyncio.run(ask())


@pytest.mark.parametrize("name", TLS_CASES)
def test_only_a_trusted_connection_carries_a_body(
    tls_answers: dict[str, tuple[Answer, int]], name: str
) -> None:
    answer, written = tls_answers[name]
    right = TLS_CASES[name][3]
    assert answer.code in (right if isinstance(right, set) else {right}), answer.message
    assert answer.accepted or answer.body is None
    # Two processes: while one closes, the other goes on filling the kernel's buffers, and they grow.
    assert written < FLOOD
