"""Which addresses the guard permits, and what it makes of the answers of a real name server."""

import asyncio
import fcntl
import functools
import ipaddress
import json
import os
import shutil
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, call
from typing import Any

import ifaddr
import pytest
from dnslib import AAAA, CNAME, QTYPE, RCODE, RR, A, DNSError, DNSRecord
from dnslib.server import DNSHandler, DNSLogger, DNSServer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.guard import Guard, GuardedResolver
from relay.sender import Sender

# The policy, written down once more: from the first address to the last.
REFUSED_V4 = """
    0.0.0.0-0.255.255.255      10.0.0.0-10.255.255.255    100.64.0.0-100.127.255.255 127.0.0.0-127.255.255.255
    168.63.129.16-168.63.129.16                           169.254.0.0-169.254.255.255
    172.16.0.0-172.31.255.255  192.0.0.0-192.0.0.255      192.0.2.0-192.0.2.255
    192.31.196.0-192.31.196.255 192.52.193.0-192.52.193.255 192.88.99.0-192.88.99.255
    192.168.0.0-192.168.255.255 192.175.48.0-192.175.48.255 198.18.0.0-198.19.255.255
    198.51.100.0-198.51.100.255 203.0.113.0-203.0.113.255 224.0.0.0-239.255.255.255
    240.0.0.0-255.255.255.255
"""
PERMITTED_V6 = """
    2000::-2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff
    2001:200::-2001:db7:ffff:ffff:ffff:ffff:ffff:ffff
    2001:db9::-2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff
    2003::-2620:4f:7fff:ffff:ffff:ffff:ffff:ffff
    2620:4f:8001::-3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff
    3fff:1000::-3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""


def number(text: str) -> int:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return int.from_bytes(socket.inet_pton(family, text), "big")


def text_of(value: int, bits: int) -> str:
    family = socket.AF_INET if bits == 32 else socket.AF_INET6
    return socket.inet_ntop(family, value.to_bytes(bits // 8, "big"))


def ranges(table: str) -> Sequence[tuple[int, int]]:
    return [(number(first), number(last)) for first, last in (one.split("-") for one in table.split())]


V4, V6 = ranges(REFUSED_V4), ranges(PERMITTED_V6)


def expected(value: int, bits: int) -> bool:
    if bits == 32:
        return not any(first <= value <= last for first, last in V4)
    return any(first <= value <= last for first, last in V6)


def guard(*allow: str, own: Sequence[str] = ()) -> Guard:
    return Guard([ipaddress.ip_network(one) for one in allow], own=lambda: frozenset(own))


EDGES = sorted(
    {
        (value, bits)
        for table, bits in ((V4, 32), (V6, 128))
        for pair in [*table, (0, 2**bits - 1)]
        for edge in pair
        for value in (edge - 1, edge, edge + 1)
        if 0 <= value < 2**bits
    }
)
# Random bits are nearly always far from every edge: half of the addresses are near one.
NEAR = st.builds(
    lambda edge, distance: (min(max(edge[0] + distance, 0), 2 ** edge[1] - 1), edge[1]),
    st.sampled_from(EDGES),
    st.integers(-(2**20), 2**20),
)
SOMEWHERE = st.integers(0, 2**32 - 1).map(lambda value: (value, 32)) | st.integers(0, 2**128 - 1).map(
    lambda value: (value, 128)
)
UNICAST = st.integers(2**125, 2**126 - 1).map(lambda value: (value, 128))
ONE = guard()


@settings(max_examples=3000, deadline=None)
@given(NEAR | SOMEWHERE | UNICAST)
def test_an_address_is_permitted_exactly_when_the_policy_says_so(address: tuple[int, int]) -> None:
    assert ONE.permits(text_of(*address)) is expected(*address)


@pytest.mark.parametrize("address", EDGES, ids=lambda address: text_of(*address))
def test_the_edges_of_the_policy_are_where_they_are(address: tuple[int, int]) -> None:
    assert ONE.permits(text_of(*address)) is expected(*address)


BAD = """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.1.2.3
    127.255.255.255 168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 169.254.170.23 172.16.0.1
    172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.170 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1
    192.168.0.1 192.168.255.255 192.175.48.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255
    :: ::1 ::7f00:1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:8.8.8.8 ::ffff:169.254.169.254
    ::ffff:0:7f00:1 ::ffff:0:8.8.8.8 ::5efe:7f00:1 fe80::5efe:7f00:1 64:ff9b::7f00:1 64:ff9b::8.8.8.8
    64:ff9b:1::1 100::1 2001::1 2001:0:7f00:1::1 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::1
    2002:a9fe:a9fe:: 2002:808:808::1 2620:4f:8000::1 3fff::1 3fff:fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254
    fd20:ce::254 fe80::1 fe80::a9fe:a9fe fec0::1 ff02::1 ff0e::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
"""
NEIGHBOURS = """
    1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255
    169.255.0.0 172.15.255.255 172.32.0.0 168.63.129.15 168.63.129.17 192.0.1.0 192.0.3.0 192.88.98.255
    192.88.100.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0
    203.0.112.255 203.0.114.0 223.255.255.255 8.8.8.8 1.1.1.1 93.184.216.34
    2000::1 2001:200::1 2001:4860:4860::8888 2001:db7:ffff::1 2001:db9::1 2003::1 2606:4700:4700::1111
    2620:4f:7fff::1 2620:4f:8001::1 2a00:1450:4001::1 3ffe:ffff::1 3fff:1000::1
"""
NO_ADDRESSES = [
    *(
        "",
        " ",
        "localhost",
        "example.com",
        "127.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "1.2.3",
        "1.2.3.4.5",
    ),
    *("1.2.3.256", "08.8.8.8", "8.8.8.08", "8.8.8.8 ", " 8.8.8.8", "8.8.8.8\0", "8.8.8.8/32", "8.8.8.8:53"),
    *("[2606:4700::1]", "2606:4700::1::1", "2606:4700::g", "2606:4700::1%", "8.8.8.8%lo", "8.8.8.8.", "-1"),
    *("８.8.8.8", "8。8。8。8", "٨.8.8.8", "*", "0/0", "None"),
]


@pytest.mark.parametrize("address", BAD.split())
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not ONE.permits(address)


@pytest.mark.parametrize("address", NEIGHBOURS.split())
def test_a_public_address_is_permitted(address: str) -> None:
    assert ONE.permits(address)


@pytest.mark.parametrize("text", NO_ADDRESSES)
@pytest.mark.parametrize("allow", [(), ("0.0.0.0/0", "::/0")], ids=["nothing allowed", "everything allowed"])
def test_what_is_no_address_is_refused(text: str, allow: Sequence[str]) -> None:
    assert not guard(*allow).permits(text)


@pytest.mark.parametrize(
    "address", ["fe80::1%eth0", "fe80::1%1", "2606:4700::1%eth0", "::1%lo", "2606:4700::1%0"]
)
@pytest.mark.parametrize("allow", [(), ("::/0",)], ids=["nothing allowed", "everything allowed"])
def test_a_scoped_address_is_refused_even_where_everything_is_allowed(
    address: str, allow: Sequence[str]
) -> None:
    assert not guard(*allow).permits(address)


@settings(deadline=None)
@given(st.text())
@example("1" * 5000)
@example(":" * 5000)
def test_any_text_is_an_answer(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        assert not ONE.permits(text)


@pytest.mark.parametrize(
    ("allow", "address", "permitted"),
    [
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", True),
        ("10.0.0.0/8", "192.168.0.1", False),
        ("10.0.0.0/8", "127.0.0.1", False),
        ("10.0.0.1/32", "10.0.0.2", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", False),
        ("10.0.0.0/8", "::10.1.2.3", False),
        ("10.0.0.0/8", "64:ff9b::10.1.2.3", False),
        ("127.0.0.0/8", "::1", False),
        ("::1/128", "::1", True),
        ("::1/128", "127.0.0.1", False),
        ("0.0.0.0/0", "::1", False),
        ("fd00::/8", "fd12::1", True),
        ("fd00::/8", "fe80::1", False),
    ],
)
def test_what_is_allowed_is_permitted_and_nothing_beside_it(
    allow: str, address: str, permitted: bool
) -> None:
    assert guard(allow).permits(address) is permitted


OWN = ["93.184.216.1", "2606:4700::1", "2606:4700::ab:0:1"]


@pytest.mark.parametrize(
    ("address", "permitted"),
    [
        ("93.184.216.1", False),
        ("93.184.216.2", True),
        ("2606:4700::1", False),
        ("2606:4700:0:0:0:0:0:1", False),
        ("2606:4700:0::0:1", False),
        ("2606:4700::0001", False),
        ("2606:4700::AB:0:1", False),
        ("2606:4700::2", True),
    ],
)
def test_this_machine_is_refused_in_every_spelling_of_its_addresses(address: str, permitted: bool) -> None:
    assert guard(own=OWN).permits(address) is permitted


def test_this_machine_may_be_allowed() -> None:
    assert guard("93.184.216.1/32", own=OWN).permits("93.184.216.1")
    assert not guard("93.184.216.0/31", own=["2606:4700::1"]).permits("2606:4700::1")


def test_every_address_of_this_machine_is_refused() -> None:
    mine = [
        ip.ip if isinstance(ip.ip, str) else ip.ip[0]
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
    ]
    assert "127.0.0.1" in mine
    assert [address for address in mine if Guard([]).permits(address)] == []


# Names. getaddrinfo asks whom /etc/resolv.conf names, so these tests send from a process that has a network
# and an /etc of its own: there a name server of ours says what it likes, whole public networks are this
# machine's loopback, and whoever listens where nobody may connect is a canary.

PUBLIC, PUBLIC_TOO, OURS = "93.184.216.34", "93.184.216.35", "93.184.216.1"
CANARIES = ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", OURS]
PORT = 8000
NXDOMAIN, SERVFAIL, SILENCE = "NXDOMAIN", "SERVFAIL", "SILENCE"
Zone = Mapping[str, Sequence[Sequence[str]]]  # what each name leads to, by turns
FORGOTTEN = 31.0  # seconds after which an answer is asked for again


class Names:
    """A name server on 127.0.0.1:53 that answers by a zone and counts the questions for addresses."""

    def __init__(self) -> None:
        self.zone: Zone = {}
        self.asked: Counter[str] = Counter()
        self._seen: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()

    def load(self, zone: Zone) -> None:
        self.zone = zone
        self.asked.clear()
        self._seen.clear()

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        name, kind = str(request.q.qname).rstrip(".").lower(), request.q.qtype
        with self._lock:
            turn = self._seen[name, kind]
            self._seen[name, kind] += 1
            self.asked[name] += kind == QTYPE.A
        reply = request.reply()
        for _ in range(8):
            turns = self.zone.get(name, [[NXDOMAIN]])
            follow = None
            for one in turns[turn % len(turns)]:
                if one == SILENCE:
                    raise DNSError("no answer")
                if one in (NXDOMAIN, SERVFAIL):
                    reply.header.rcode = getattr(RCODE, one)
                elif one.startswith("CNAME "):
                    follow = one.removeprefix("CNAME ")
                    reply.add_answer(RR(name, QTYPE.CNAME, rdata=CNAME(follow), ttl=0))
                elif ":" in one and kind == QTYPE.AAAA:
                    rdata = AAAA(tuple(socket.inet_pton(socket.AF_INET6, one)))
                    reply.add_answer(RR(name, kind, rdata=rdata, ttl=0))
                elif ":" not in one and kind == QTYPE.A:
                    reply.add_answer(RR(name, kind, rdata=A(one), ttl=0))
            if follow is None:
                break
            name = follow
        return reply

    def serve(self, stack: ExitStack) -> None:
        quiet = DNSLogger("-request,-reply,-truncated,-error")
        for tcp in (False, True):
            server = DNSServer(self, address="127.0.0.1", port=53, tcp=tcp, logger=quiet, handler=Handler)
            server.start_thread()
            stack.callback(server.server.server_close)
            stack.callback(server.stop)


class Handler(DNSHandler):
    """As resolvers expect it: long answers only over TCP, and there several questions one after another."""

    def get_reply(self, data: bytes) -> bytes:
        reply = super().get_reply(data)
        if self.protocol == "tcp" or len(reply) <= 512:
            return reply
        short = DNSRecord.parse(data).reply()
        short.header.tc = 1
        return short.pack()

    def handle(self) -> None:
        if self.server.socket_type == socket.SOCK_DGRAM:
            super().handle()
            return
        self.protocol = "tcp"
        with self.request.makefile("rwb") as stream, suppress(DNSError, ConnectionError):
            while length := stream.read(2):
                reply = self.get_reply(stream.read(int.from_bytes(length, "big")))
                stream.write(len(reply).to_bytes(2, "big") + reply)
                stream.flush()


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be moved forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def configure_loopback() -> None:
    """Brings loopback up, with everything in 93.184.216.0/24 on it, and private addresses."""

    def address(text: str) -> bytes:
        return struct.pack("HH4s8s", socket.AF_INET, 0, socket.inet_aton(text), b"")

    up, set_flags, set_address, set_mask = 0x1 | 0x40, 0x8914, 0x8916, 0x891C
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def ask(request: int, name: str, value: bytes) -> None:
            fcntl.ioctl(any_socket, request, struct.pack("16s24s", name.encode(), value))

        ask(set_flags, "lo", struct.pack("H", up))
        masks = {OURS: "255.255.255.0", "169.254.169.254": "255.255.255.255", "10.0.0.1": "255.255.255.255"}
        for index, (own, mask) in enumerate(masks.items()):
            ask(set_address, f"lo:{index}", address(own))
            ask(set_mask, f"lo:{index}", address(mask))


async def laboratory() -> None:
    """Answers questions, a line of JSON each: sends as it is told, and says what came of it."""
    connected: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            connected.append(str(arguments[1][0]))

    served: Counter[str] = Counter()

    async def serve(address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served[address] += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhere is " + address.encode())
        writer.close()
        await writer.wait_closed()

    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    configure_loopback()
    names = Names()
    with ExitStack() as stack:
        names.serve(stack)
        for address in [PUBLIC, *CANARIES]:
            await asyncio.start_server(functools.partial(serve, address), address, PORT)
        print(json.dumps("ready"), flush=True)
        sys.addaudithook(audit)
        while line := await asyncio.to_thread(sys.stdin.readline):
            question = json.loads(line)
            names.load(question["zone"])
            connected.clear()
            served.clear()
            # Interfaces are looked at once, and the clock that says when is not the loop's.
            guard = Guard([ipaddress.ip_network(one) for one in question["allow"]])
            sender = Sender.open(guard, timeout=question["timeout"], now=lambda: round(time.time() * 1000))
            rounds = []
            for urls in question["rounds"]:
                rounds.append(await asyncio.gather(*(sender.send(url, b"{}", {}) for url in urls)))
                loop.ahead += question["forward"]
                await asyncio.sleep(0)
            await sender.close()
            outcome = {
                "answers": [[asdict(answer) for answer in answers] for answers in rounds],
                "asked": names.asked,
                "connected": connected,
                "served": served,
            }
            print(json.dumps(outcome), flush=True)


def run_laboratory() -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(laboratory())


HOSTS, SWITCH = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n", "hosts: files dns\n"
RESOLVER = "nameserver 127.0.0.1\noptions timeout:2 attempts:1\n"
ISOLATED = ("unshare", "--map-root-user", "--mount", "--net")
MOUNT = 'for f in hosts nsswitch.conf resolv.conf; do mount --bind "$0/$f" "/etc/$f" || exit; done; exec "$@"'


@contextmanager
def running(directory: Path, code: str, otherwise: str | None = None) -> Iterator[tuple[Popen[str], bool]]:
    """A process that runs Python code and has printed a line, in a network and with an /etc of its own; where
    there can be none, one that runs the other code without. Whether it is isolated."""
    for name, content in (("hosts", HOSTS), ("nsswitch.conf", SWITCH), ("resolv.conf", RESOLVER)):
        (directory / name).write_text(content)
    isolation = [*ISOLATED, "sh", "-c", MOUNT, str(directory)]
    can = bool(shutil.which("unshare")) and call([*isolation, "true"], stderr=DEVNULL) == 0  # noqa: S603
    if not can and otherwise is None:
        cannot("there can be no network of its own for a process here")
    python = [sys.executable, "-W", "error", "-c", code if can else str(otherwise)]
    with Popen(  # noqa: S603 - our own code
        [*isolation, *python] if can else python,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdin=PIPE,
        stdout=PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "the process did not begin"
        try:
            yield process, can
        finally:
            process.kill()


def cannot(why: str) -> None:
    if os.environ.get("RELAY_REQUIRE_ALL_TESTS"):
        pytest.fail(why)
    pytest.skip(why)


class Laboratory:
    """Sends from where this name server is asked, and tells what came of it."""

    def __init__(self, process: Popen[str]) -> None:
        self._process = process

    def send(
        self,
        zone: Zone,
        *rounds: Sequence[str],
        timeout: int = 2000,
        forward: float = 0.0,
        allow: Sequence[str] = (),
    ) -> "Outcome":
        """Sends to all the names of a round at once, round after round, with one sender."""
        urls = [[f"http://{name}:{PORT}/" for name in names] for names in rounds]
        question = {"zone": zone, "rounds": urls, "timeout": timeout, "forward": forward, "allow": allow}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the laboratory has burnt down"
        return Outcome(**json.loads(line))


@dataclass
class Outcome:
    """The answers by round, how often each name was asked for, and who was connected to."""

    answers: Sequence[Sequence[Mapping[str, Any]]]
    asked: Mapping[str, int]
    connected: Sequence[str]
    served: Mapping[str, int]

    @property
    def codes(self) -> Sequence[str | None]:
        return [answer["code"] for answers in self.answers for answer in answers]

    def assert_harmless(self) -> None:
        """Nobody was connected to but who may be, by the system calls and by those who listened."""
        assert set(self.connected) <= {PUBLIC, PUBLIC_TOO}
        assert set(self.served) <= {PUBLIC}
        bodies = [answer["body"] for answers in self.answers for answer in answers if answer["code"]]
        assert set(bodies) <= {None}


@pytest.fixture(scope="module")
def laboratory_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    directory = tmp_path_factory.mktemp("laboratory")
    with running(directory, "from tests.test_guard import run_laboratory; run_laboratory()") as (process, _):
        yield Laboratory(process)


@pytest.fixture
def lab(laboratory_process: Laboratory) -> Laboratory:
    return laboratory_process


REFUSED, UNKNOWN = "blocked_address", "dns"
MANY = [f"93.184.{n // 250}.{n % 250 + 1}" for n in range(1000)]


@pytest.mark.parametrize(
    ("leads_to", "code"),
    [
        ([PUBLIC], None),
        ([PUBLIC, PUBLIC], None),
        (["CNAME other.test"], None),
        ([PUBLIC_TOO], "connect"),
        ([PUBLIC_TOO, PUBLIC], None),
        ([OURS], REFUSED),
        *(([bad], REFUSED) for bad in BAD.split()),
        ([PUBLIC, "127.0.0.1"], REFUSED),
        (["127.0.0.1", PUBLIC], REFUSED),
        ([PUBLIC, "::1"], REFUSED),
        ([PUBLIC, "::ffff:93.184.216.34"], REFUSED),
        (["2606:4700::1", "10.0.0.1"], REFUSED),
        ([*MANY, "10.0.0.1"], REFUSED),
        (["10.0.0.1", *MANY], REFUSED),
        (["CNAME inside.test"], REFUSED),
        (["CNAME a.test"], UNKNOWN),
        (["CNAME loop.test"], UNKNOWN),
        (["CNAME nowhere.test"], UNKNOWN),
        ([NXDOMAIN], UNKNOWN),
        ([SERVFAIL], UNKNOWN),
        ([], UNKNOWN),
        ([SILENCE], "timeout"),
    ],
    ids=lambda value: (
        " ".join(map(str, value[:2])) + (" …" if len(value) > 2 else "")
        if isinstance(value, list)
        else str(value)
    ),
)
def test_a_name_is_connected_to_only_when_all_it_leads_to_is_permitted(
    lab: Laboratory, leads_to: Sequence[str], code: str | None
) -> None:
    zone = {
        "a.test": [leads_to],
        "other.test": [[PUBLIC]],
        "inside.test": [["10.0.0.1"]],
        "loop.test": [["CNAME a.test"]],
    }
    outcome = lab.send(zone, ["a.test"], timeout=1000)
    outcome.assert_harmless()
    assert outcome.codes == [code]
    assert outcome.served == ({PUBLIC: 1} if code is None else {})


def test_a_name_with_many_addresses_makes_few_connections(lab: Laboratory) -> None:
    """aiohttp begins all over with each address that fails: n of them are n * (n + 1) / 2 connections."""
    many = [f"93.184.216.{n}" for n in range(36, 255)]
    outcome = lab.send({"a.test": [many]}, ["a.test"])
    assert outcome.codes == ["connect"]
    assert set(outcome.connected) <= set(many)
    assert len(outcome.connected) <= 8 * 9 / 2


def test_an_allowed_address_is_reached_by_name(lab: Laboratory) -> None:
    outcome = lab.send({"a.test": [["10.0.0.1"]]}, ["a.test"], allow=["10.0.0.0/8"])
    assert (outcome.codes, outcome.served) == ([None], {"10.0.0.1": 1})


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST", "ip6-localhost", "a.localhost", "127.0.0.1", "[::1]"]
)
def test_names_of_this_machine_lead_nowhere(lab: Laboratory, name: str) -> None:
    outcome = lab.send({}, [name])
    outcome.assert_harmless()
    assert (outcome.codes[0] in (REFUSED, UNKNOWN), outcome.connected) == (True, [])


@pytest.mark.parametrize("private", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", OURS])
def test_a_name_that_changes_its_mind_between_lookups_never_gets_a_forbidden_connection(
    lab: Laboratory, private: str
) -> None:
    turns = [[PUBLIC], [private], [PUBLIC, private], [private, PUBLIC]]
    outcome = lab.send({"a.test": turns}, *[["a.test"]] * 40, forward=FORGOTTEN)
    outcome.assert_harmless()
    assert outcome.codes == [None, REFUSED, REFUSED, REFUSED] * 10
    assert outcome.asked == {"a.test": 40}, "a lookup for each, and no second one to be fooled by"
    assert outcome.served == {PUBLIC: 10}


def test_a_name_that_changes_its_mind_between_its_two_families_gets_no_connection(lab: Laboratory) -> None:
    outcome = lab.send({"a.test": [[PUBLIC, "::1"]]}, *[["a.test"]] * 5, forward=FORGOTTEN)
    outcome.assert_harmless()
    assert (outcome.codes, outcome.connected) == ([REFUSED] * 5, [])


@pytest.mark.parametrize(
    ("leads_to", "code"), [([PUBLIC], None), ([NXDOMAIN], UNKNOWN), (["10.0.0.1"], REFUSED)]
)
def test_many_who_ask_for_one_name_at_once_are_one_question(
    lab: Laboratory, leads_to: Sequence[str], code: str | None
) -> None:
    outcome = lab.send({"a.test": [leads_to]}, ["a.test"] * 50)
    assert (outcome.codes, outcome.asked) == ([code] * 50, {"a.test": 1})


@pytest.mark.parametrize("leads_to", [[PUBLIC], [NXDOMAIN], [SERVFAIL], ["10.0.0.1"]], ids=str)
def test_an_answer_is_remembered_for_a_while_and_then_asked_for_again(
    lab: Laboratory, leads_to: Sequence[str]
) -> None:
    soon = lab.send({"a.test": [leads_to]}, *[["a.test"]] * 4, forward=2.0)
    assert soon.asked == {"a.test": 1}
    assert len(set(soon.codes)) == 1
    later = lab.send({"a.test": [leads_to]}, *[["a.test"]] * 4, forward=FORGOTTEN)
    assert later.asked == {"a.test": 4}


def test_a_name_that_comes_to_exist_is_found_after_seconds(lab: Laboratory) -> None:
    outcome = lab.send({"a.test": [[NXDOMAIN], [PUBLIC]]}, ["a.test"], ["a.test"], forward=11.0)
    assert outcome.codes == [UNKNOWN, None]


def test_dead_names_delay_no_other(lab: Laboratory) -> None:
    dead = [f"dead-{n}.test" for n in range(60)]
    zone = {"a.test": [[PUBLIC]], **{name: [[SILENCE]] for name in dead}}
    [answers] = lab.send(zone, [*dead, "a.test"], timeout=1000).answers
    assert {answer["code"] for answer in answers[:-1]} == {"timeout"}
    assert (answers[-1]["code"], answers[-1]["duration_ms"] < 500) == (None, True)


def test_a_dead_name_is_a_failed_lookup_where_the_deadline_allows_to_see_that(lab: Laboratory) -> None:
    outcome = lab.send({"a.test": [[SILENCE]]}, ["a.test"], timeout=10_000)
    assert outcome.codes == [UNKNOWN]


async def test_names_that_are_dead_take_nobody_elses_answers_away(monkeypatch: pytest.MonkeyPatch):
    begun, alive = threading.Event(), threading.Event()

    def look_up(name: str, *given: Any) -> list[Any]:
        if name == "dead.test.":
            begun.set()
            alive.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("relay.guard.ANSWER_TTL", 0.0)
    resolver = GuardedResolver(Guard([]), threads=1)
    known = await resolver.resolve("known.test")
    waiting = [asyncio.create_task(resolver.resolve(name)) for name in ("dead.test", "new.test")]
    try:
        assert await asyncio.to_thread(begun.wait, 10)
        assert await resolver.resolve("known.test") == known
        assert not any(one.done() for one in waiting)
    finally:
        alive.set()
    _, found = await asyncio.gather(*waiting)
    assert [one["host"] for one in found] == ["93.184.216.34"]
