"""/readyz: 503 as soon as something that Relay needs is not there, in words that give nothing away."""

import asyncio
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from relay.pulse import Pulse
from tests.conftest import RunningRelay, World
from tests.fleet import Fleet
from tests.program import Program

LOOPS = {"poll", "deliver", "replay", "prune", "keys"}


async def checks(relay: RunningRelay, status: int) -> dict[str, str]:
    answer = await relay.api.get("/readyz")
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == ("ok" if status == 200 else "failing")
    return dict(answer.json()["checks"])


async def test_everything_that_is_checked_is_named(world: World):
    relay = await world.relay()
    found = await checks(relay, 200)
    assert set(found) == {"database", "migrations", "clock", "disk", "tidy"} | LOOPS
    assert set(found.values()) == {"ok"}


async def test_of_a_fleet_the_shards_are_watched_too_and_the_disk_is_elsewhere(fleet: Fleet):
    relay = await fleet.join()
    assert set(await checks(relay, 200)) == {"database", "migrations", "clock", "hold"} | LOOPS


@pytest.mark.parametrize(("least", "status"), [("1B", 200), ("9000PB", 503)])
async def test_too_little_room_for_the_database_file(world: World, least: str, status: int):
    relay = await world.relay(min_free=least)
    found = await checks(relay, status)
    assert (found["disk"] == "ok") is (status == 200)
    assert status == 200 or "below min_free" in found["disk"]
    assert str(world.directory) not in str(found)


async def test_a_clock_that_no_subscriber_would_believe(world: World):
    world.clock.forward(seconds=400)
    relay = await world.relay()
    await checks(relay, 200)
    watched = await world.watch(relay, "luma", duration=0)
    await relay.eventually(f"/v1/generations/{watched['id']}", lambda one: one["status"] == "completed")
    found = await checks(relay, 503)
    assert "off the providers'" in found["clock"]


async def test_a_disk_that_takes_no_writes(tmp_path: Path):
    relay = Program.placed(tmp_path / "relay")
    try:
        await relay.start()
        assert relay.process is not None
        _, hard = resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE)
        for limit, status in ((1, 503), (hard, 200)):
            resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE, (limit, hard))
            async with relay.api() as api, asyncio.timeout(20):
                # The API has no event for it.
                while (answer := await api.get("/readyz")).status_code != status:  # noqa: ASYNC110 # see above
                    await asyncio.sleep(0.1)
            assert ("did not take it" in answer.json()["checks"]["database"]) is (status == 503)
    finally:
        await relay.end(signal.SIGKILL)


async def hangs(loop: Any) -> None:
    await asyncio.Event().wait()


async def crashes(loop: Any) -> None:
    raise RuntimeError("a secret of the tests")


@pytest.mark.parametrize(
    ("loop", "tick", "broken"),
    [
        ("poll", "relay.poll.Poller.tick", hangs),
        ("deliver", "relay.deliver.Deliverer.tick", crashes),
    ],
)
async def test_a_loop_that_hangs_or_crashes_is_named_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch, loop: str, tick: str, broken: Any
):
    monkeypatch.setattr("relay.pulse._PATIENCE", 1.0)
    monkeypatch.setattr(tick, broken)
    relay = await world.relay()
    await checks(relay, 200)
    async with asyncio.timeout(20):
        while (await relay.api.get("/readyz")).status_code == 200:  # noqa: ASYNC110 # the API has no event for it
            await asyncio.sleep(0.05)
    found = await checks(relay, 503)
    assert {name for name, verdict in found.items() if verdict != "ok"} == {loop}
    assert "a secret" not in str(found)


def test_a_loop_may_miss_three_beats_and_half_a_minute_and_is_well_again_at_its_next_one():
    pulse = Pulse()
    pulse.expect("often", every=0.25, now=100)
    pulse.expect("seldom", every=3600, now=100)
    assert pulse.silent(130.7) == {"often": None, "seldom": None}
    assert pulse.silent(131) == {"often": 31, "seldom": None}
    pulse.beat("often", 131)
    assert pulse.silent(150) == {"often": None, "seldom": None}
    assert pulse.silent(10_931)["seldom"] == 10_831
