"""No spelling of a URL leads Relay to where it may not go, whichever way the URL comes in."""

import asyncio
import functools
import itertools
import json
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yarl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.provisional import domains

from relay.app import build
from relay.config import read_config
from relay.endpoint import canonical_url
from relay.server import bind
from relay.simulator import Simulator
from tests.conftest import ADMIN_KEY
from tests.serving import Subscriber, listener, origin_of, serving
from tests.test_guard import CANARIES, OURS, Names, cannot, configure_loopback, running

# One hunt for all of these tests, not one in each worker.
pytestmark = pytest.mark.xdist_group("ssrf")

# Everything that these lead to is forbidden; nobody but this address of loopback is allowed.
ALLOWED = "127.0.0.77"
SPELLINGS = """
    http://127.0.0.1/ https://127.0.0.1/ https://127.0.0.1:443/ https://127.0.0.1:8443/x?y
    https://127.0.0.2/ http://127.0.0.78/ https://127.255.255.254/ https://0.0.0.0/ https://0.0.0.1/
    https://127.1/ https://127.0.1/ https://127.000.000.001/ https://0177.0.0.1/ https://0177.1/
    https://017700000001/ https://00000000177.0.0.1/ https://0x7f.0.0.1/ https://0x7f.1/ https://0X7F.0.0.1/
    https://0x7f000001/ https://0x000000007f000001/ https://2130706433/ https://4294967295/ https://0/
    https://0x0/ https://00/ https://127.0.0x1/ https://127.0x0.0.1/ https://127.0.01/ https://1/
    https://3232235521/ https://2852039166/ https://0xa9fea9fe/ https://0xa9.0xfe.0xa9.0xfe/
    https://0251.0376.0251.0376/ https://169.254.43518/ https://169.16689662/ https://127.0.0.1./
    https://2130706433./ https://0x7f.1./ https://127.1./ https://256.0.0.1/ https://127.0.0.256/
    https://127.0.0.1.1/ https://-1/ https://127..1/ https://.127.0.0.1/ https://１２７.0.0.1/
    https://①②⑦.0.0.1/ https://127。0。0。1/ https://127．0．0．1/ https://127｡0｡0｡1/ https://１２７。０。０。１/
    https://٠١٢٣/ https://127.0.0.𝟏/ https://𝟐𝟏𝟑𝟎𝟕𝟎𝟔𝟒𝟑𝟑/ https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/ https://[::1]/ https://[::]/
    https://[0:0:0:0:0:0:0:1]/ https://[0000:0000:0000:0000:0000:0000:0000:0001]/ https://[::0001]/
    https://[::127.0.0.1]/ https://[::7f00:1]/ https://[::ffff:127.0.0.1]/ https://[::ffff:7f00:1]/
    https://[::FFFF:7F00:1]/ https://[0:0:0:0:0:ffff:127.0.0.1]/ https://[::ffff:0:127.0.0.1]/
    https://[::ffff:169.254.169.254]/ https://[::ffff:a9fe:a9fe]/ https://[64:ff9b::127.0.0.1]/
    https://[64:ff9b::a9fe:a9fe]/ https://[64:ff9b:1::1]/ https://[2002:7f00:1::]/
    https://[2002:a9fe:a9fe::1]/ https://[2001:0:7f00:1::]/ https://[2001::1]/ https://[fe80::5efe:7f00:1]/
    https://[::5efe:127.0.0.1]/ https://[fe80::1]/ https://[fe80::1%25lo]/ https://[fe80::1%lo]/
    https://[::1%25lo]/ https://[::1%lo]/ https://[fc00::1]/ https://[fd00:ec2::254]/
    https://[fd20:ce::254]/ https://[fec0::1]/ https://[ff02::1]/ https://[100::1]/ https://[5f00::1]/
    https://[3fff::1]/ https://[2001:db8::1]/ https://[4000::1]/ https://[::1 https://::1/ https://[::1]]/
    https://[[::1]]/ https://[127.0.0.1]/ https://[v1.127.0.0.1]/ https://10.0.0.1/ https://10.255.255.255/
    https://172.16.0.1/ https://172.31.255.255/ https://192.168.0.1/ https://100.64.0.1/ https://198.18.0.1/
    https://192.0.2.1/ https://203.0.113.1/ https://224.0.0.1/ https://255.255.255.255/ https://240.0.0.1/
    http://169.254.169.254/latest/meta-data/ http://169.254.170.2/v2/ https://100.100.100.200/
    https://192.0.0.192/ https://168.63.129.16/ https://user@127.0.0.1/ https://user:pw@127.0.0.1/
    https://good.test@127.0.0.1/ https://good.test:80@127.0.0.1/ https://good.test%40127.0.0.1/
    https://@127.0.0.1/ https://good.test@@127.0.0.1/ https://127.0.0.1@[::1]/ https://good.test#@127.0.0.1/
    https://127.0.0.1#@good.test/ https://127.0.0.1?@good.test/ https://127.0.0.1\\@good.test/
    https://good.test\\@127.0.0.1/ https:\\\\127.0.0.1/ https:/\\127.0.0.1/ https://127.0.0.1\\.good.test/
    https:127.0.0.1/ https:/127.0.0.1/ https:///127.0.0.1/ ////127.0.0.1/ //127.0.0.1/ 127.0.0.1
    127.0.0.1:443 https://%31%32%37.0.0.1/ https://127%2e0%2e0%2e1/ https://127.0.0.1%00.good.test/
    https://127.0.0.1%2f.good.test/ https://%6c%6f%63%61%6c%68%6f%73%74/ https://127.0.0.1%20/
    https://[%3a%3a1]/ https://127.0.0.1%23.good.test/ https://127.0.0.1:0/ https://127.0.0.1:/
    https://127.0.0.1:65536/ https://127.0.0.1:-1/ https://127.0.0.1:٨٠/ https://127.0.0.1:80:443/
    https://127.0.0.1:0x50/ https://127.0.0.1:22/ https://127.0.0.1:443@good.test/ HTTPS://127.0.0.1/
    hTTps://127.0.0.1/ https://127.0.0.1/../../x https://127.0.0.1//good.test/ ftp://127.0.0.1/
    file:///etc/passwd file://127.0.0.1/etc/passwd gopher://127.0.0.1/ dict://127.0.0.1/ ldap://127.0.0.1/
    ws://127.0.0.1/ wss://127.0.0.1/ unix:///var/run/docker.sock http+unix://%2fvar%2frun%2fx/
    javascript:alert(1) data:text/plain,x jar:http://127.0.0.1!/ netdoc:///etc/passwd https://localhost/
    https://LOCALHOST/ https://localhost./ https://localhost:8443/ http://localhost/ https://ip6-localhost/
    https://xn--/ https://xn--127.0.0.1/
"""
ODD = [
    "https://127.0.0.1 /", " https://127.0.0.1/", "https://127.0.0.1/\n", "https://127.0.0.1\t/",
    "https://127.0.0.1\r\nHost: good.test/", "https://\n127.0.0.1/", "https://127.0.0.1\0.good.test/", "https://",
    "https://\u00ad127.0.0.1/", "https://127.0.0.1\u200b/", "https://127.0.0\u30021/", "https://\u2024127.0.0.1/",
    "", " ", "https://127.0.0.1\u2028/", "https://good.test\uff20127.0.0.1/", "https://127.0.0.1\uff0fgood.test/",
    "https://good.test\uff0f@127.0.0.1/",
]  # fmt: skip
SPELLED = [*SPELLINGS.split(), *ODD]
# Names that our name server knows, and that lead inside.
ZONE = {
    "metadata.google.internal": [["169.254.169.254"]],
    "metadata": [["169.254.169.254"]],
    "metadata.packet.net": [["169.254.169.254"]],
    "instance-data": [["169.254.169.254"]],
    "instance-data.ec2.internal": [["169.254.169.254"]],
    "127.0.0.1.nip.io": [["127.0.0.1"]],
    "169.254.169.254.nip.io": [["169.254.169.254"]],
    "localtest.me": [["127.0.0.1", "::1"]],
    "spoofed.test": [["::1"]],
    "both.test": [["93.184.216.34", "127.0.0.1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "alias.test": [["CNAME localtest.me"]],
    "ours.test": [[OURS]],
    "kubernetes.default.svc.cluster.local": [["10.0.0.1"]],
    "host.docker.internal": [["192.168.65.2"]],
    "xn--bcher-kva.test": [["127.0.0.1"]],
    "under_score.test": [["127.0.0.1"]],
    "rebound.test": [["93.184.216.34", "10.0.0.1"], ["10.0.0.1"]],
    "nowhere.test": [["NXDOMAIN"]],
}
NAMED = [f"https://{name}/" for name in ZONE] + [
    "http://metadata.google.internal/computeMetadata/v1/", "https://metadata.google.internal./",
    "https://METADATA.google.internal/", "https://bücher.test/", "https://localtest.me:22/",
    "https://metadata。google。internal/", "https://ⓛocaltest.me/",
]  # fmt: skip
WAYS = ["register", "callback", "test", "live", "replay"]


REDIRECTS = [301, 302, 303, 307, 308, 200]  # 200 with Refresh
LURES = [
    "http://127.0.0.1/",
    "https://[::1]/",
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.1:8443/",
]
PORTS = [22, 80, 443, 8443]
OPEN = "wherever the subscriber is"

Attempts = Sequence[Mapping[str, Any]]


class Prey:
    """A relay, and the ways to bring a URL in. Each tells the attempts, or None when the URL was refused."""

    def __init__(
        self, api: httpx.AsyncClient, simulator: Simulator, subscriber: Subscriber, database: Path
    ) -> None:
        self._api, self._simulator, self._subscriber, self._database = api, simulator, subscriber, database
        self._numbers, self._turn = itertools.count(), asyncio.Semaphore(16)

    async def bring(self, way: str, url: str) -> Attempts | str | None:
        """In the end, or what went wrong meanwhile."""
        way, _, status = way.partition(" ")
        url = self._subscriber.origin if url == OPEN else url
        async with self._turn:
            try:
                return await getattr(self, f"_{way}")(url, *map(int, status.split()))
            except Exception:
                return traceback.format_exc()

    async def _register(self, url: str) -> Attempts | None:
        async with self._endpoint(url, "ssrf.none") as endpoint_id:
            return None if endpoint_id is None else await self._send_test(endpoint_id)

    async def _callback(self, url: str) -> Attempts | None:
        job_id = self._simulator.submit("luma", duration=0)
        wish = {"account": "luma", "job_id": job_id, "callback_url": url}
        answer = await self._api.post("/v1/generations", json=wish)
        if answer.status_code == 422:
            assert [error["field"] for error in answer.json()["errors"]] == ["callback_url"]
            return None
        assert answer.status_code == 201, answer.text
        return await self._ended(f"generation_id={answer.json()['id']}")

    async def _test(self, url: str) -> Attempts:
        async with self._smuggled(url) as (endpoint_id, _):
            return await self._send_test(endpoint_id)

    async def _live(self, url: str) -> Attempts:
        async with self._smuggled(url) as smuggled:
            return await self._publish(*smuggled)

    async def _replay(self, url: str) -> Attempts:
        async with self._smuggled(url) as smuggled:
            [first] = await self._publish(*smuggled)
            path = f"/v1/deliveries/{first['delivery']}/replay"
            # They may not come too often, and the answer says when the next one may.
            while (answer := await self._api.post(path)).status_code == 429:  # noqa: ASYNC110 # see above
                await asyncio.sleep(int(answer.headers["retry-after"]))
            assert answer.status_code == 202, answer.text
            return await self._ended(f"endpoint_id={smuggled[0]}", attempts=2)

    async def _redirect(self, url: str, status: int) -> Attempts:
        path = f"/{next(self._numbers)}"
        headers = {"location": url, "refresh": f"0; url={url}", "link": f"<{url}>; rel=preload"}
        self._subscriber.answer(status, path=path, headers=headers)
        async with self._endpoint(self._subscriber.origin + path, "ssrf.none") as endpoint_id:
            assert endpoint_id is not None
            return await self._send_test(endpoint_id)

    @asynccontextmanager
    async def _endpoint(self, url: str, type_: str) -> AsyncIterator[str | None]:
        """An endpoint's id, None when its URL is refused."""
        answer = await self._api.post("/v1/endpoints", json={"url": url, "event_types": [type_]})
        if answer.status_code == 422:
            assert [error["field"] for error in answer.json()["errors"]] == ["url"]
            yield None
            return
        assert answer.status_code == 201, answer.text
        path = f"/v1/endpoints/{answer.json()['id']}"
        yield path.rpartition("/")[2]
        assert (await self._api.delete(path)).status_code == 204

    @asynccontextmanager
    async def _smuggled(self, url: str) -> AsyncIterator[tuple[str, str]]:
        """An endpoint whose URL was never looked at, and the type of event that it alone wants."""
        type_ = f"ssrf.n{next(self._numbers)}"
        async with self._endpoint("https://good.test/", type_) as endpoint_id:
            assert endpoint_id is not None
            # Not on this thread: the relay that may just be writing needs the loop to finish.
            await asyncio.to_thread(self._overwrite, endpoint_id, url)
            yield endpoint_id, type_

    def _overwrite(self, endpoint_id: str, url: str) -> None:
        with closing(sqlite3.connect(self._database, timeout=30)) as database, database:
            database.execute("UPDATE endpoints SET url = ? WHERE id = ?", (url, endpoint_id))

    async def _publish(self, endpoint_id: str, type_: str) -> Attempts:
        answer = await self._api.post("/v1/events", json={"type": type_, "data": {}})
        assert answer.status_code == 201, answer.text
        return await self._ended(f"endpoint_id={endpoint_id}")

    async def _send_test(self, endpoint_id: str) -> Attempts:
        answer = await self._api.post(f"/v1/endpoints/{endpoint_id}/test")
        assert answer.status_code == 202, answer.text
        return await self._ended(f"endpoint_id={endpoint_id}")

    async def _ended(self, query: str, *, attempts: int = 1) -> Attempts:
        """The attempts of the only delivery that a query finds, once it has come to its end."""
        async with asyncio.timeout(30):
            while True:
                [found] = (await self._api.get(f"/v1/deliveries?{query}")).json()["data"] or [None]
                if (
                    found
                    and found["status"] in ("delivered", "failed")
                    and found["attempt_count"] >= attempts
                ):
                    break
                await asyncio.sleep(0.02)
        shown = (await self._api.get(f"/v1/deliveries/{found['id']}")).json()
        return [
            {
                "delivery": shown["id"],
                "status": shown["status"],
                "response": [attempt["response_status"], attempt["response_body"]],
                "code": (attempt["error"] or {}).get("code"),
            }
            for attempt in shown["attempts"]
        ]


@asynccontextmanager
async def preying(directory: Path) -> AsyncIterator[tuple[Prey, set[int]]]:
    """A relay that may go to nobody but ALLOWED, where its providers and one subscriber are; and the ports of
    127.0.0.1 that this test itself connects to."""
    async with AsyncExitStack() as stack:
        simulator, subscriber = Simulator(seed=1), Subscriber()
        provided = await stack.enter_async_context(serving(simulator.app, bind(ALLOWED, 0)))
        subscriber.origin = await stack.enter_async_context(serving(subscriber.app, bind(ALLOWED, 0)))
        luma = {
            "provider": "luma",
            "api_key": simulator.keys["luma"],
            "base_url": Simulator.base_urls(provided)["luma"],
            "poll_interval": "50ms",
        }
        document = {
            "database": f"sqlite:///{directory}/relay.db",
            "secret_key": "secret-key-of-the-tests-0123456789",
            "admin_key": ADMIN_KEY,
            "accounts": {"luma": luma},
            "network": {"allow": [f"{ALLOWED}/32"], "allow_http": True},
            "delivery": {"timeout": "2s", "schedule": []},
        }
        bound = listener()
        await stack.enter_async_context(serving(build(read_config(document, {})), bound))
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        api = await stack.enter_async_context(
            # A connection for every request, so that the audit hook has something to see.
            httpx.AsyncClient(
                base_url=origin_of(bound),
                headers=headers,
                timeout=30,
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        )
        yield Prey(api, simulator, subscriber, directory / "relay.db"), {bound.getsockname()[1]}


async def hunt(directory: Path, *, isolated: bool) -> None:
    """Brings in the URLs of its input, a line of JSON each, and says what came of it."""
    connected: list[tuple[str, int]] = []
    visited: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            connected.append((str(arguments[1][0]), arguments[1][1]))

    async def visit(address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visited.append(address)
        writer.close()

    names = Names()
    with ExitStack() as stack:
        if isolated:
            configure_loopback()
            names.serve(stack)
            names.load(ZONE)
        for address, port in itertools.product(CANARIES, PORTS):
            # Out there most of these addresses are not ours, and ports may be taken.
            with nullcontext() if isolated else suppress(OSError):
                await asyncio.start_server(functools.partial(visit, address), address, port)
        sys.addaudithook(audit)
        async with preying(directory) as (prey, own_ports):
            print(json.dumps("ready"), flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                connected.clear()
                visited.clear()
                brought = await asyncio.gather(*(prey.bring(way, url) for way, url in json.loads(line)))
                astray = [
                    (address, port)
                    for address, port in connected
                    if address != ALLOWED and not (address == "127.0.0.1" and port in own_ports)
                ]
                outcome = {"brought": brought, "seen": len(connected), "astray": astray, "visited": visited}
                print(json.dumps(outcome), flush=True)


class Hunt:
    """Brings URLs in, in a process of its own: all that belong together at once, the first time that one of
    them is asked for."""

    def __init__(self, process: subprocess.Popen[str], *, knows_names: bool) -> None:
        self._process, self.knows_names = process, knows_names
        self._outcomes: dict[tuple[str, str], Attempts | str | None] = {}

    def bring(self, way: str, url: str, among: Sequence[str]) -> Attempts | None:
        """What came of it, once it is certain that nobody was visited and no connection begun."""
        if (way, url) not in self._outcomes:
            self._bring([(way, one) for one in among])
        outcome = self._outcomes[way, url]
        assert not isinstance(outcome, str), outcome
        return outcome

    def _bring(self, wishes: Sequence[tuple[str, str]]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(wishes), file=self._process.stdin, flush=True)
        outcome = json.loads(self._process.stdout.readline())
        assert outcome["seen"] >= len(wishes), "the audit hook sees not even our own connections"
        assert (outcome["astray"], outcome["visited"]) == ([], [])
        self._outcomes |= dict(zip(wishes, outcome["brought"], strict=True))


@pytest.fixture(scope="module")
def hunting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hunt]:
    directory = tmp_path_factory.mktemp("hunt")
    code, plain = (
        f"import asyncio, pathlib; from tests.test_ssrf import hunt;"
        f"asyncio.run(hunt(pathlib.Path({str(directory)!r}), isolated={isolated}))"
        for isolated in (True, False)
    )
    with running(directory, code, plain) as (process, isolated):
        yield Hunt(process, knows_names=isolated)


def is_registrable(url: str) -> bool:
    try:
        canonical_url(url, allow_http=True, allow=[])
    except ValueError:
        return False
    return True


def assert_caught(attempts: Attempts | None, way: str, url: str) -> None:
    registrable = is_registrable(url)
    if way in ("register", "callback"):
        assert (attempts is None) is not registrable
    if attempts is None:
        return
    assert len(attempts) == (2 if way == "replay" else 1)
    for attempt in attempts:
        assert (attempt["status"], attempt["response"]) == ("failed", [None, None])
        # What no URL can be is not sent either, but it has no code of its own.
        no_url = set() if registrable else {"bad_response", "internal"}
        assert attempt["code"] in {"blocked_address", "dns"} | no_url


@pytest.mark.parametrize("url", SPELLED)
@pytest.mark.parametrize("way", WAYS)
def test_a_url_that_leads_inside_is_refused_or_fails_without_a_connection(
    hunting: Hunt, way: str, url: str
) -> None:
    assert_caught(hunting.bring(way, url, SPELLED), way, url)


@pytest.mark.parametrize("url", NAMED)
@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_leads_inside_fails_without_a_connection(hunting: Hunt, way: str, url: str) -> None:
    if not hunting.knows_names:
        cannot("there can be no name server of its own for a process here")
    assert_caught(hunting.bring(way, url, NAMED), way, url)


@pytest.mark.parametrize("url", LURES)
@pytest.mark.parametrize("status", REDIRECTS)
def test_an_answer_that_points_inside_is_not_followed(hunting: Hunt, status: int, url: str) -> None:
    attempts = hunting.bring(f"redirect {status}", url, LURES)
    assert attempts is not None
    [attempt] = attempts
    outcome = (attempt["status"], attempt["code"], attempt["response"][0])
    assert outcome == (("delivered", None, 200) if status == 200 else ("failed", "redirect", status))


@pytest.mark.parametrize("way", WAYS)
def test_an_address_that_may_be_connected_to_is_reached(hunting: Hunt, way: str) -> None:
    attempts = hunting.bring(way, OPEN, [OPEN])
    assert attempts is not None
    assert [attempt["status"] for attempt in attempts] == ["delivered"] * (2 if way == "replay" else 1)


HOSTS = st.one_of(
    st.from_regex(r"[a-zA-Z0-9._\-]{1,20}", fullmatch=True),
    st.from_regex(r"\[[0-9a-fA-F:.%]{2,20}\]", fullmatch=True),
    st.from_regex(r"(0[xX]?)?[0-9a-fA-F]{1,10}(\.(0[xX]?)?[0-9a-fA-F]{1,4}){0,4}\.?", fullmatch=True),
    st.ip_addresses().map(lambda one: f"[{one}]" if one.version == 6 else str(one)),
    domains(),
    st.text(max_size=12),
)
URLS = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(
        ["https://", "http://", "HTTPS://", "https:", "//", "https:/", "https:///", "https:\\\\"]
    ),
    st.sampled_from(["", "", "", "a@", "a:b@", "@", "127.0.0.1@", "a%40"]),
    HOSTS,
    st.sampled_from(
        ["", "", ":", ":0", ":80", ":443", ":8443", ":65535", ":65536", ":-1", ":٨٠", ":080", ":1e3"]
    ),
    st.text(st.sampled_from("/?#@:\\%.ab1[]&= \t"), max_size=10).map(lambda text: "/" + text)
    | st.text(max_size=8),
)


@settings(max_examples=2000, deadline=None)
@given(URLS)
@example("https://example.com:80:443/")
@example("https://[::ffff:127.0.0.1]/")
@example("https://EXAMPLE.com.:0443/")
@example("http://example.com:443/")
@example("https://bücher.example:8443/ü?ü#")
@example("https://a_b.example/")
@example("https://xn--/")
@example("https://xn--a.example/")
@example("https://faß.example/")
@example("https://example.com/@127.0.0.1:80/")
@example("https://example.com?@127.0.0.1/")
@example("https://example.com/%2e%2e/%00")
@example("https://[2606:4700:0:0::1]:443/")
def test_whatever_is_accepted_every_reader_reads_the_same_way(text: str) -> None:
    try:
        stored = canonical_url(text, allow_http=True, allow=[])
    except ValueError:
        return
    ours, theirs, third = httpx.URL(stored), yarl.URL(stored, encoded=True), urlsplit(stored)
    default = {"http": 80, "https": 443}[ours.scheme]
    read = (ours.scheme, ours.raw_host.decode(), ours.port or default)
    assert (theirs.scheme, theirs.raw_host, theirs.port) == read
    assert (third.scheme, third.hostname, third.port or default) == read
    assert (theirs.user, theirs.password, third.username) == (None, None, None)
