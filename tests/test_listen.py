"""`relay listen`, and waiting on the command line: processes, against real relays."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook

from tests.conftest import ADMIN_KEY, World
from tests.program import Program
from tests.serving import Received, Subscriber, serving, until
from tests.test_cli import BARE
from tests.test_cli import relay as program

ROOT = Path(__file__).parent.parent


@dataclass
class Listening:
    """`relay listen` at work; `out` and `err` are what it said so far."""

    process: asyncio.subprocess.Process
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    async def said(self, text: str, count: int = 1) -> None:
        await until(lambda: sum(text in line for line in self.err) >= count, timeout=30)

    async def interrupted(self) -> int:
        """Its exit code after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return await asyncio.wait_for(self.process.wait(), 15)


@asynccontextmanager
async def listening(url: str, forward: str, *options: str, key: str = ADMIN_KEY) -> AsyncIterator[Listening]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", "listen", "--forward", forward, "--json", *options),
        env={**BARE, "PYTHONPATH": str(ROOT), "RELAY_URL": url, "RELAY_API_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    started = Listening(process)
    assert process.stdout is not None and process.stderr is not None

    async def read(stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            lines.append(line.decode())

    tasks = [
        asyncio.create_task(read(process.stdout, started.out)),
        asyncio.create_task(read(process.stderr, started.err)),
    ]
    try:
        await started.said("listening to")
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await asyncio.gather(*tasks)


def verified(received: Received, secret: str) -> Any:
    return Webhook(secret).verify(received.body, received.headers)


async def test_a_url_on_this_machine_receives_just_what_the_endpoint_does(world: World) -> None:
    relay = await world.relay()
    made = await world.endpoint(
        relay, path="/real", headers={"x-team": "tulips", "x-api-key": "sesame"}, filter="data.kind"
    )
    local = world.subscriber.origin + "/local"
    world.subscriber.answer(500, 204, path="/local")
    async with listening(relay.origin, local, "--endpoint", made["id"]) as listener:
        await world.watch(relay, "luma", duration=0)
        await relay.api.post("/v1/events", json={"type": "order.shipped", "data": {}})
        await relay.api.post(f"/v1/endpoints/{made['id']}/test")
        real = {one.headers["webhook-id"]: one for one in await world.subscriber.got(2, path="/real")}
        here = await world.subscriber.got(2, path="/local")
        await until(lambda: len(listener.out) == 2)
        assert await listener.interrupted() == 0
    assert {one.headers["webhook-id"] for one in here} == set(real)
    for one in here:
        same = real[one.headers["webhook-id"]]
        assert one.body == same.body
        assert verified(one, made["secret"])
        names = ("webhook-id", "content-type", "user-agent", "x-team")
        assert [one.headers[name] for name in names] == [same.headers[name] for name in names]
        assert "x-api-key" not in one.headers
    assert any("without x-api-key" in line for line in listener.err)
    said = [json.loads(line) for line in listener.out]
    assert [one["id"] for one in said] == [one.headers["webhook-id"] for one in here]
    assert [one["status"] for one in said] == [500, 204]


async def test_who_may_not_see_a_secret_gets_one_for_now(world: World) -> None:
    relay = await world.relay()
    key = (await world.key(relay, "read"))["key"]
    local = world.subscriber.origin + "/local"
    async with listening(relay.origin, local, "--types", "order.shipped,order.paid", key=key) as listener:
        for type_ in ("order.lost", "order.paid"):
            await relay.api.post("/v1/events", json={"type": type_, "data": {}})
        [one] = await world.subscriber.got(1, path="/local")
    [secret] = [line.split()[-1] for line in listener.err if "whsec_" in line]
    assert secret != (await relay.api.get("/v1/signing-secret")).json()["secret"]
    assert verified(one, secret)["type"] == "order.paid"


async def test_it_says_what_is_wrong_and_ends(world: World) -> None:
    relay = await world.relay()
    reader = (await world.key(relay, "read"))["key"]
    made = await world.endpoint(relay)
    where = {"RELAY_URL": relay.origin, "RELAY_API_KEY": ADMIN_KEY}
    there = ("--forward", "http://127.0.0.1:9/")
    cases: Sequence[tuple[Sequence[str], dict[str, str], int, str]] = [
        (("--forward", "ftp://x"), where, 2, "must begin with http"),
        ((*there, "--endpoint", "ep_x"), where, 1, "no endpoint ep_x"),
        ((*there, "--endpoint", made["id"]), where | {"RELAY_API_KEY": reader}, 1, "scope admin"),
        ((*there, "--endpoint", ".."), where, 2, "must be an id"),
        (there, where | {"RELAY_URL": "http://127.0.0.1:9"}, 1, "cannot be reached"),
        (there, where | {"RELAY_URL": relay.origin + "/docs#"}, 1, "not as a relay does"),
        (there, where | {"RELAY_API_KEY": " "}, 2, "RELAY_API_KEY"),
    ]
    ended = await asyncio.gather(
        *(program("listen", *options, cwd=world.directory, **env) for options, env, _, _ in cases)
    )
    for one, (options, _, code, said) in zip(ended, cases, strict=True):
        assert one.code == code, options
        assert said in one.err, options


async def test_a_relay_stops_at_once_and_who_listens_finds_the_next_one(tmp_path: Path) -> None:
    subscriber = Subscriber()
    # Requests under way would have so long to end.
    relay = Program.placed(tmp_path / "relay", delivery={"timeout": "60s"})
    async with serving(subscriber.app) as local:
        try:
            await relay.start()
            async with listening(relay.origin, local + "/local") as listener:
                # The first time it goes away before anything has come, and each time something is stored
                # before it is found again.
                for life in (1, 2):
                    code, seconds = await relay.stop()
                    assert code == 0, relay.log
                    assert seconds < 30
                    await listener.said("again in", count=life)
                    await relay.start()
                    async with relay.api() as api:
                        body = {"type": "order.shipped", "data": {"life": life}}
                        assert (await api.post("/v1/events", json=body)).status_code == 201
                        secret = (await api.get("/v1/signing-secret")).json()["secret"]
                    found = await subscriber.got(life, path="/local", timeout=40)
                    assert [verified(one, secret)["data"]["life"] for one in found] == [1, 2][:life]
                assert await listener.interrupted() == 0
        finally:
            await relay.end(signal.SIGKILL)


async def test_waiting_ends_with_what_became_of_all_of_them(world: World) -> None:
    relay = await world.relay()
    good = [(await world.watch(relay, "luma", duration=duration))["id"] for duration in (0, 1)]
    bad = (await world.watch(relay, "vivix", duration=0, outcome="failed"))["id"]
    never = (await world.watch(relay, "luma", duration=600))["id"]
    later = (await world.watch(relay, "luma", duration=8))["id"]
    env = {"RELAY_URL": relay.origin, "RELAY_API_KEY": ADMIN_KEY, "COLUMNS": "240"}
    cases: Sequence[tuple[Sequence[str], int]] = [
        (good, 0),
        ([*good, bad, never, "--timeout", "1"], 1),
        ([good[0], "gen_x"], 1),
        ([never, later, "--timeout", "12", "--json"], 1),
    ]
    ended = await asyncio.gather(
        *(program("generations", "wait", *ids, cwd=world.directory, **env) for ids, _ in cases)
    )
    for one, (ids, code) in zip(ended, cases, strict=True):
        assert one.code == code, (ids, one.err)
    assert all(id_ in ended[0].out for id_ in good)
    assert "no generation gen_x" in ended[2].err
    # As it is when the time is over, not as it was before.
    assert json.loads(ended[3].out)["data"][1]["status"] == "completed"
    job = world.simulator.submit("luma", duration=0.5)
    tracked = await program("track", "luma", job, "--wait", "--json", cwd=world.directory, **env)
    assert tracked.code == 0
    assert json.loads(tracked.out)["status"] == "completed"


async def test_waiting_outlives_a_relay_that_is_replaced(tmp_path: Path, world: World) -> None:
    accounts = world.document()["accounts"]
    relay = Program.placed(tmp_path / "relay", accounts=accounts)
    job = world.simulator.submit("luma", duration=4)
    env = {"RELAY_URL": relay.origin, "RELAY_API_KEY": ADMIN_KEY}
    try:
        await relay.start()
        waiting = asyncio.create_task(program("track", "luma", job, "--wait", "--json", cwd=tmp_path, **env))
        async with relay.api() as api, asyncio.timeout(20):
            found = []
            while not found:
                found = (await api.get("/v1/generations")).json()["data"]
        assert (await relay.stop())[0] == 0
        await relay.start()
        ended = await waiting
        assert (ended.code, json.loads(ended.out)["status"]) == (0, "completed"), ended.err
    finally:
        await relay.end(signal.SIGKILL)


async def test_a_replay_is_followed_through_a_relay_that_is_replaced(tmp_path: Path) -> None:
    subscriber = Subscriber()
    relay = Program.placed(tmp_path / "relay")
    env = {"RELAY_URL": relay.origin, "RELAY_API_KEY": ADMIN_KEY}
    async with serving(subscriber.app) as local:
        try:
            await relay.start()
            async with relay.api() as api:
                events = [{"type": "order.shipped", "data": {"n": n}} for n in range(6)]
                assert (await api.post("/v1/events", json=events)).status_code == 201
                await api.post("/v1/endpoints", json={"url": local + "/", "event_types": ["order.shipped"]})
                options = ("--since", "1h", "--status", "missing", "--rate-limit", "1", "--json")
                following = asyncio.create_task(program("replay", *options, cwd=tmp_path, **env))
                await subscriber.got(2)
            assert (await relay.stop())[0] == 0
            await relay.start()
            ended = await following
            assert ended.code == 0, ended.err
            assert (json.loads(ended.out)["status"], json.loads(ended.out)["done"]) == ("completed", 6)
        finally:
            await relay.end(signal.SIGKILL)


async def test_on_a_terminal_a_replay_shows_how_fast_it_comes_on(world: World) -> None:
    relay = await world.relay()
    events = [{"type": "order.shipped", "data": {}} for _ in range(15)]
    assert (await relay.api.post("/v1/events", json=events)).status_code == 201
    made = await world.endpoint(relay, event_types=["order.shipped"])
    ours, theirs = os.openpty()
    wanted = ("--endpoint", made["id"], "--since", "1h", "--status", "missing", "--rate-limit", "20")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", "replay", *wanted),
        env={**BARE, "PYTHONPATH": str(ROOT), "RELAY_URL": relay.origin, "RELAY_API_KEY": ADMIN_KEY}
        | {"TERM": "xterm"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)

    def read() -> bytes:
        shown = b""
        with suppress(OSError):  # nobody is at the other end any more
            while more := os.read(ours, 65_536):
                shown += more
        os.close(ours)
        return shown

    shown = (await asyncio.to_thread(read)).decode()
    assert await process.wait() == 0
    assert "15/15" in shown
    assert re.search(r"[0-9]/s", shown)
    assert re.search(r"0:0[01]:", shown), "and the time that is left"
