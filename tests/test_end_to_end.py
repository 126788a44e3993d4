"""The main job, over real sockets: watch, announce, deliver, replay."""

import json

import pytest
from standardwebhooks import Webhook

from tests.conftest import World


@pytest.mark.parametrize("provider", ["pixellabs", "vivix", "pictory", "luma"])
@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_an_ended_generation_is_announced_once_and_signed(
    world: World, provider: str, outcome: str
) -> None:
    relay = await world.relay()
    endpoint = await world.endpoint(relay)
    generation = await world.watch(relay, provider, outcome=outcome)
    [received] = await world.subscriber.got(1)
    Webhook(endpoint["secret"]).verify(received.body, received.headers)
    event = json.loads(received.body)
    assert event["type"] == f"generation.{outcome}"
    assert event["data"]["id"] == generation["id"]
    assert event["data"]["status"] == outcome
    assert bool(event["data"]["outputs"]) is (outcome == "completed")
    assert (event["data"]["error"] is None) is (outcome == "completed")
