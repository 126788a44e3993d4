"""Nothing leaks: a relay with a hundred secrets has the worst of days, and after it none is found anywhere.

`relay serve` is a process of its own; providers and subscribers repeat what they are sent, in every way.
"""

import asyncio
import base64
import json
import secrets
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.conftest import need
from tests.postgres import WHY_MISSING, Cluster, binaries, running_cluster
from tests.program import Program, everything
from tests.serving import serving

# A module has one run for each database.
pytestmark = pytest.mark.timeout(300)
PIECE = 16  # of a secret that is longer, so many characters in a row are a leak
HEADERS = ("authorization", "x-api-key", "x-session-cookie")


@dataclass
class Canaries:
    """Secrets by their names."""

    known: dict[str, str] = field(default_factory=dict)

    def new(self, name: str, *, before: str = "", behind: str = "") -> str:
        """A new one; what stands before it and behind it is no secret."""
        assert name not in self.known
        self.known[name] = secrets.token_urlsafe(24)
        return before + self.known[name] + behind

    def new_webhook_secret(self, name: str) -> str:
        """One with the characters that are written otherwise in URLs and in JSON."""
        self.known[name] = base64.b64encode(secrets.token_bytes(21) + b"\xff\xef\xbe").decode()
        return "whsec_" + self.known[name]

    def new_header(self, name: str) -> str:
        self.known[name] = secrets.token_urlsafe(18) + '/"<+&>"/' + secrets.token_urlsafe(18)
        return self.known[name]

    def found(self, text: str, *names: str) -> set[str]:
        """The names of those of which at least a piece is in a text, however it is written."""
        found = set()
        for name in names or self.known:
            for piece in pieces(self.known[name]):
                if piece in text:
                    found.add(f"{name}: {text[max(0, text.index(piece) - 100) : text.index(piece) + 100]}")
                    break
        return found


def pieces(secret: str) -> Iterator[str]:
    for written in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], escape(secret)):
        for place in range(max(1, len(written) - PIECE + 1)):
            yield written[place : place + PIECE]
    for before in range(3):
        encoded = base64.b64encode(b"." * before + secret.encode())[4:-4].decode()
        for place in range(len(encoded) - PIECE + 1):
            yield encoded[place : place + PIECE]


def repeated(request: Request) -> dict[str, Any]:
    """What came, as people write it into answers."""
    headers = dict(request.headers)
    said = headers.get("authorization", "")
    return {
        "headers": headers,
        "curl": " ".join(f"-H '{name}: {value}'" for name, value in headers.items()),
        "basic": base64.b64encode(f"user:{said}".encode()).decode(),
        "query": "&".join(f"{name}={quote(value, safe='')}" for name, value in headers.items()),
        "html": escape(said),
        "path": str(request.url),
    }


class Provider:
    """Luma, on bad days of every kind: the first part of the path says which."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.over = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        mode, key = request.path_params["mode"], request.headers["authorization"].removeprefix("Bearer ")
        self.seen.add(key)
        said = repeated(request)
        match mode:
            case "unauthorized":
                return JSONResponse({"error": key, "message": f"Bearer {key} is wrong", **said}, 401)
            case "crashing":
                return PlainTextResponse(f"Traceback: Authorization: Bearer {key}\n{said}", 500)
            case "limiting":
                return JSONResponse({"detail": "x" * 190 + key}, 429, {"retry-after": "1", "x-echo": key})
            case "missing":
                return JSONResponse({"message": f"{key} has no such job", **said}, 404)
            case "page":
                return HTMLResponse(f"<pre>{escape(key)}</pre>")
            case "broken":
                return Response(f'{{"state": "{key}", "x": ', media_type="application/json")
            case "unknown":
                return JSONResponse({"state": key, "model": key, **said})
            case "failing":
                reason = {"failure_reason": f"{key} may not", "failure_code": key}
                return JSONResponse({"state": "failed", **reason, **said})
            case "hanging":
                await self.over.wait()
        output = {"type": "image", "url": f"https://cdn.test/1.png?key={quote(key, safe='')}"}
        return JSONResponse({"state": "completed", "output": [output], "model": key, **said})

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{mode}/{path:path}", self.answer)])


MODES = (
    *("unauthorized", "crashing", "limiting", "missing", "page", "broken", "unknown", "failing", "hanging"),
    "completing",
)


class Subscriber:
    """Repeats everything, and what it knows of its configuration too; the path says how."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.knows: dict[str, list[str]] = {}
        self.over = asyncio.Event()

    async def answer(self, request: Request) -> Response:
        await request.body()
        self.seen.append(dict(request.headers))
        mode = request.path_params["mode"]
        said = {**repeated(request), "configuration": self.knows.get(request.url.path, [])}
        match mode:
            case "failing":
                return JSONResponse(said, 500)
            case "page":
                return HTMLResponse(f"<h1>{escape(json.dumps(said['headers']))}</h1>", 503)
            case "long":
                return PlainTextResponse((" " * 16_300 + json.dumps(said) * 100)[:200_000], 400)
            case "redirecting":
                return JSONResponse(said, 307, {"location": "/?" + said["query"]})
            case "gone":
                return JSONResponse(said, 410)
            case "slow":
                await asyncio.sleep(1.5)
            case "hanging":
                await self.over.wait()
        return JSONResponse(said)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{mode}/{path:path}", self.answer, methods=["POST"])])


WAYS = ("good", "failing", "page", "long", "redirecting", "gone", "slow", "hanging", "garbled")


@asynccontextmanager
async def garbling() -> AsyncIterator[str]:
    """A server that is none of HTTP, and repeats what it is sent."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n" + head.replace(b": ", b" : \x01"))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@dataclass
class Run:
    """What is left of a day: the secrets, and every text that the relay gave to anybody."""

    canaries: Canaries = field(default_factory=Canaries)
    # Of the logs, of what everybody may read, of the API's answers, and of what lies on the disk.
    log: str = ""
    documents: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    endpoints: list[dict[str, Any]] = field(default_factory=list)
    provider: Provider = field(default_factory=Provider)
    subscriber: Subscriber = field(default_factory=Subscriber)
    used: set[str] = field(default_factory=set)


@dataclass
class Trouble:
    """How a database is made to fail for a while, and how it is read in the end."""

    url: str
    fail: Callable[[], Any]
    recover: Callable[[Any], None]
    read: Callable[[], dict[str, str]]


@pytest.fixture(params=["sqlite", "postgresql"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory, run = tmp_path_factory.mktemp("canaries"), Run()
    if request.param == "sqlite":
        asyncio.run(Day(directory, run, on_a_file(directory)).live())
        yield run
        return
    need(binaries(), WHY_MISSING)
    with running_cluster() as cluster:
        password = run.canaries.new("the database's password", behind="%2Fp%40ss")
        asyncio.run(Day(directory, run, on_a_server(cluster, password)).live())
    yield run


def on_a_file(directory: Path) -> Trouble:
    path = directory / "relay.db"

    def lock() -> sqlite3.Connection:
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("BEGIN IMMEDIATE")
        return database

    def read() -> dict[str, str]:
        files = [one for one in directory.iterdir() if one.name.startswith("relay.db")]
        return {one.name: one.read_bytes().decode("latin-1") for one in files}

    return Trouble(f"sqlite:///{path}", lock, lambda database: database.close(), read)


def on_a_server(cluster: Cluster, password: str) -> Trouble:
    url = cluster.database(None)
    name = url.rsplit("/", 1)[1]
    where = ("-h", "127.0.0.1", "-p", str(cluster.port), "-U", "relay")

    def read() -> dict[str, str]:
        return {"dump": cluster.run("pg_dump", *where, "--inserts", "--data-only", name)}

    # It lets everybody in, whatever the password.
    return Trouble(url.replace("relay@", f"relay:{password}@"), cluster.stop, lambda _: cluster.start(), read)


class Day:
    """One run, from the start to SIGTERM."""

    def __init__(self, directory: Path, run: Run, trouble: Trouble) -> None:
        self.directory, self.run, self.trouble = directory, run, trouble
        self.new = run.canaries.new
        self.garbled = self.origin = ""

    async def live(self) -> None:
        run = self.run
        async with AsyncExitStack() as stack:
            provided = await stack.enter_async_context(serving(run.provider.app))
            self.origin = await stack.enter_async_context(serving(run.subscriber.app))
            self.garbled = await stack.enter_async_context(garbling())
            self.program = Program.placed(self.directory, self.trouble.url, **self.document(provided))
            await self.program.start()
            try:
                await self.have_a_day()
            finally:
                status = await self.program.end(signal.SIGTERM)
                run.provider.over.set()
                run.subscriber.over.set()
            assert status == 0, self.program.log
            run.log = (self.directory / "log").read_text()
            run.stored |= {f"{name}, stopped": text for name, text in self.trouble.read().items()}
        await self.begin_in_vain()

    def document(self, provided: str) -> Mapping[str, Any]:
        accounts: dict[str, Any] = {
            mode: {
                "provider": "luma",
                "api_key": self.new(f"the key of {mode}"),
                "base_url": f"{provided}/{mode}",
            }
            for mode in MODES
        }
        garbled = {"provider": "luma", "api_key": self.new("the key of garbled"), "base_url": self.garbled}
        nobody = {**garbled, "api_key": self.new("the key of nobody"), "base_url": "http://127.0.0.1:1"}
        careless = {"provider": "tests.leaky:Careless", "base_url": f"{provided}/completing"}
        signed = {"provider": "vivix", "base_url": f"{provided}/completing"}
        accounts |= {
            "garbled": garbled,
            "nobody": nobody,
            "careless": {**careless, "api_key": self.new("the key of careless")},
            "broken-file": {**careless, "api_key": self.new("the key of broken-file", behind="-unspeakable")},
            "signed": {
                **signed,
                "api_key": self.new("the key of signed"),
                "webhook_secret": [self.new("the webhook secret"), self.new("the old webhook secret")],
            },
            "pictory": {
                "provider": "pictory",
                "api_key": self.new("the key of pictory"),
                "base_url": f"{provided}/completing",
            },
        }
        for one in accounts.values():
            one["poll_interval"] = "200ms"
        self.admin, self.metrics_token = self.new("the admin key"), self.new("the token of the metrics")
        return {
            "log_level": "debug",
            "secret_key": self.new("the secret key"),
            "admin_key": self.admin,
            "metrics": {"token": self.metrics_token},
            # One that takes nothing.
            "tracing": {
                "endpoint": provided.replace("://", f"://relay:{self.new('the password of the collector')}@")
                + "/v1/traces",
                "headers": {"authorization": f"Bearer {self.new('the key of the collector')}"},
            },
            "accounts": accounts,
            "delivery": {"timeout": "1s", "schedule": ["100ms", "200ms"]},
        }

    async def have_a_day(self) -> None:
        headers = {"authorization": f"Bearer {self.admin}"}
        async with httpx.AsyncClient(base_url=self.program.origin, headers=headers, timeout=60) as self.api:
            await self.register()
            hooks = await self.watch()
            await self.publish()
            await self.ask_wrongly(hooks)
            await self.rotate()
            await self.fall_ill(hooks)
            await self.publish()
            await self.settle()
            await self.read_everything()
            self.run.stored |= self.trouble.read()
            # Something hangs when it is told to stop.
            await self.publish()

    async def register(self) -> None:
        for way in WAYS:
            for number in range(2):
                which = f"{way} {number}"
                path = f"/{way}/{number}"
                headers = {
                    "Authorization": "Bearer "
                    + self.run.canaries.new_header(f"the authorization of {which}"),
                    "X-Api-Key": self.new(f"the x-api-key of {which}"),
                    "X-Session-Cookie": self.new(f"the cookie of {which}", before="session="),
                }
                secret = self.run.canaries.new_webhook_secret(f"the secret of {which}")
                url = (self.garbled if way == "garbled" else self.origin) + path
                asked = {"url": url, "event_types": ["order.paid"], "headers": headers, "secret": secret}
                answer = await self.api.post("/v1/endpoints", json=asked)
                assert answer.status_code == 201, answer.text
                # It is shown once.
                made = {name: value for name, value in answer.json().items() if name != "secret"}
                self.run.answers[f"POST {path}"] = json.dumps(made)
                self.run.endpoints.append(answer.json())
                self.run.subscriber.knows[path] = [secret]
        revealed = (await self.api.get("/v1/signing-secret")).json()["secret"]
        self.run.canaries.known["the signing secret"] = revealed.removeprefix("whsec_")
        self.run.subscriber.knows["/failing/callback"] = [revealed]

    async def watch(self) -> list[str]:
        for account in (*MODES, "garbled", "nobody", "careless", "broken-file", "signed"):
            asked = {
                "account": account,
                "job_id": f"job-{account}",
                "callback_url": f"{self.origin}/failing/callback",
            }
            answer = await self.api.post("/v1/generations", json=asked)
            assert answer.status_code == 201, answer.text
        hooks = []
        for number in range(5):
            answer = await self.api.post("/v1/generations", json={"account": "pictory"})
            hooks.append(answer.json()["webhook_url"])
            self.run.canaries.known[f"callback token {number}"] = hooks[-1].rsplit(".", 1)[1]
        return hooks

    async def publish(self) -> None:
        for _ in range(3):
            await self.api.post("/v1/events", json={"type": "order.paid", "data": {"order": 42}})

    async def ask_wrongly(self, hooks: list[str]) -> None:
        """All that strangers and clumsy friends send."""
        for number, hook in enumerate(hooks):
            path = httpx.URL(hook).path
            for method, where, options in (
                ("POST", path, {"json": {"job_id": f"job-{number}"}}),
                ("POST", path, {"content": b"{" * 1000}),
                ("POST", path, {"content": b"x" * 2_000_000}),
                ("POST", path, {"content": b"{}", "headers": {"content-encoding": "gzip"}}),
                ("GET", path, {}),
                ("POST", path + "x", {"json": {}}),
                ("POST", path[:-1] + "_", {"json": {}}),
                ("POST", path + "/more", {"json": {}}),
                ("POST", path.replace("pictory", "signed"), {"json": {}}),
                ("POST", path + "%00%ff", {"json": {}}),
                ("POST", f"/v1/endpoints/{path.rsplit('/', 1)[1]}", {"json": {}}),
            ):
                answer = await self.api.request(method, where, **options)
                self.run.answers[f"{method} {number} {where} {str(options)[:30]}"] = answer.text
            for line in (
                "POST {} HTTP/9.9",
                "POST {} HTTP/1.1\r\nBad header",
                "BREW {} HTTP/1.1\r\nx\x01: 1",
            ):
                await self.send_raw(line.format(path))
        for number, scheme in enumerate(("Bearer", "Bearer ", "Basic", "", "Token")):
            wrong = {"authorization": f"{scheme} {self.new(f'a wrong key {number}')}".strip()}
            for path in ("/v1/endpoints", "/v1/nothing", "/hooks/signed", "/readyz"):
                answer = await self.api.post(path, headers=wrong, json={})
                self.run.answers[f"{scheme} {path}"] = answer.text
        url = "https://hooks.example.com/"
        password = self.new("a password in a URL")
        for body in (
            {"url": f"https://user:{password}@hooks.example.com/"},
            {"url": f"https://user:{password}/x@hooks.example.com/"},
            {"url": f"ftp://user:{password}@hooks.example.com/"},
            {"url": url, "secret": self.run.canaries.new_webhook_secret("a bad secret") + "!"},
            {"url": url, "secret": {"whsec": self.new("a secret of the wrong kind")}},
            {"url": url, "headers": {"authorization": self.new("a bad header", behind="\n")}},
            {"url": url, "headers": {"x-a b": self.new("the value of a bad header")}},
            {"url": url, "headers": [self.new("headers in a list")]},
            {"url": url, "accounts": [self.admin]},
            {"url": url, "whsec_" + self.run.canaries.known["the secret of good 0"]: 1},
        ):
            answer = await self.api.post("/v1/endpoints", json=body)
            assert answer.status_code == 422, answer.text
            self.run.answers[f"POST /v1/endpoints {answer.text[:40]} {len(self.run.answers)}"] = answer.text
        broken = f'{{"url": "{url}", "secret": "{self.new("a secret in broken JSON")}'
        answer = await self.api.post("/v1/endpoints", content=broken)
        self.run.answers["broken JSON"] = answer.text
        for head in (
            f"GET /v1/endpoints HTTP/1.1\r\nAuthorization: Bearer {self.admin}\r\nBad header\r\n\r\n",
            f"GET /v1/endpoints HTTP/1.1\r\nAuthorization: Bearer {self.admin}\r\nx: {'x' * 100_000}\r\n\r\n",
            f"GET /v1/endpoints?key={self.admin} HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        ):
            await self.send_raw(head)

    async def send_raw(self, head: str) -> None:
        url = httpx.URL(self.program.origin)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        with suppress(ConnectionError):
            writer.write(head.encode() + b"\r\nhost: relay\r\n\r\n")
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(65536), 10)
            self.run.answers[f"{head[:60]} {len(self.run.answers)}"] = answer.decode()
        writer.close()

    async def rotate(self) -> None:
        for one in self.run.endpoints:
            path = httpx.URL(one["url"]).path
            secret = self.run.canaries.new_webhook_secret(f"the rotated secret of {path}")
            self.run.subscriber.knows[path].append(secret)
            asked = {"secret": secret, "overlap_seconds": 3600 if path.endswith("0") else 0}
            answer = await self.api.post(f"/v1/endpoints/{one['id']}/secret/rotate", json=asked)
            assert answer.status_code == 200, answer.text
            changed = await self.api.patch(f"/v1/endpoints/{one['id']}", json={"description": path})
            self.run.answers[f"PATCH {path}"] = changed.text

    async def fall_ill(self, hooks: list[str]) -> None:
        """The database fails for a while, and everybody goes on asking."""
        illness = self.trouble.fail()
        try:
            calls = [
                self.api.post("/v1/events", json={"type": "order.paid", "data": {}}),
                self.api.get("/readyz"),
                self.api.post(hooks[0], json={"job_id": "job"}),
            ]
            for place, answer in enumerate(await asyncio.gather(*calls)):
                self.run.answers[f"ill {place}"] = answer.text
        finally:
            self.trouble.recover(illness)
        await self.until(self.is_well)

    async def is_well(self) -> bool:
        return (await self.api.get("/readyz")).status_code == 200

    async def until(self, true: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while True:
                if await true():
                    return
                await asyncio.sleep(0.1)

    async def settle(self) -> None:
        """Returns when enough has happened: every way has answered, every account was asked."""
        keys = {self.run.canaries.known[f"the key of {mode}"] for mode in MODES}

        async def is_settled() -> bool:
            failed = (await self.api.get("/v1/deliveries?status=failed&limit=200")).json()["data"]
            all_asked = keys <= self.run.provider.seen
            return all_asked and len(self.run.subscriber.seen) >= 60 and len(failed) >= 20

        await self.until(is_settled)

    async def read_everything(self) -> None:
        async with httpx.AsyncClient(base_url=self.program.origin, timeout=30) as stranger:
            for path in ("/openapi.json", "/docs", "/readyz", "/healthz", "/", "/v1/endpoints", "/hooks"):
                answer = await stranger.get(path)
                self.run.documents[path] = answer.text + str(answer.headers)
        answer = await self.api.get("/metrics", headers={"authorization": f"Bearer {self.metrics_token}"})
        assert "relay_attempts_total{" in answer.text
        self.run.documents["/metrics"] = answer.text + str(answer.headers)
        for name in ("endpoints", "generations", "events", "deliveries", "accounts"):
            for one in await everything(self.api, f"/v1/{name}"):
                if name == "accounts":
                    self.run.answers[f"GET {name} {one['name']}"] = json.dumps(one)
                    continue
                answer = await self.api.get(f"/v1/{name}/{one['id']}")
                for shown in (one, answer.json()):
                    # It is what the API is asked for it for.
                    shown.pop("webhook_url", None)
                    self.run.answers[f"GET {name} {one['id']} {len(self.run.answers)}"] = json.dumps(shown)

    async def begin_in_vain(self) -> None:
        """Programs that cannot start say why, without the password."""
        password = self.new("the password of a wrong URL")
        urls = (
            f"postgresql://relay:{password}@127.0.0.1:1/relay?connect_timeout=1",
            f"postgresql://relay:{password}@127.0.0.1:port/relay",
            f"postgresql://relay@127.0.0.1:1/relay?password={password}&sslmode=nonsense",
            f"mysql://relay:{password}@127.0.0.1/relay",
        )

        async def begin(number: int, url: str) -> str:
            program = Program.placed(self.directory / f"in-vain-{number}", url)
            starting = asyncio.create_task(program.start())
            log = program.directory / "log"
            async with asyncio.timeout(60):
                while not (log.exists() and log.read_text()):  # noqa: ASYNC110 # another process writes it
                    await asyncio.sleep(0.1)
            starting.cancel()
            await asyncio.wait({starting})
            await program.end(signal.SIGTERM)
            return log.read_text()

        said = await asyncio.gather(*(begin(number, url) for number, url in enumerate(urls)))
        self.run.log += "".join(said)


def test_after_a_bad_day_no_canary_is_found_anywhere(run: Run) -> None:
    check_that_it_was_bad_enough(run)
    assert run.canaries.found(run.log) == set(), "the logs"
    for said in (run.documents, run.answers, run.stored):
        for where, text in said.items():
            assert run.canaries.found(text) == set(), where


def check_that_it_was_bad_enough(run: Run) -> None:
    """Otherwise nothing would be shown by the rest."""
    known = run.canaries.known
    assert len(known) >= 100
    assert {known[f"the key of {mode}"] for mode in MODES} <= run.provider.seen
    sent = json.dumps(run.subscriber.seen)
    assert {known["the x-api-key of failing 0"], known["the cookie of long 1"]} <= set(
        one for one in known.values() if one in sent
    )
    answers = "".join(run.answers.values())
    assert answers.count("[redacted]") > 100
    for kind in ("unauthorized", "rate_limited", "unavailable", "unreadable", "unreachable"):
        assert kind in run.log or kind in answers, kind
    for line in ("program.failed", "delivery.attempted", "callback.received", "store"):
        assert line in run.log or line == "program.failed", line
    assert "Traceback" in run.log
    assert "Storage cannot accept" in answers
