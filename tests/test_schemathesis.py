"""Schemathesis against a running relay: every answer is one that its OpenAPI document names.

What is tried is read from the document alone; `schemathesis.toml` says how.
"""

import asyncio
import re
import sys
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.conftest import ADMIN_KEY, World
from tests.program import THOROUGH
from tests.serving import serving

CONFIG = Path(__file__).parent / "schemathesis.toml"
# Of each phase for each operation; the rest is what the schemas' own edges need.
EXAMPLES, CASES = (850, 25_000) if THOROUGH else (15, 1_000)


def proxy(simulator: str, simulated: ASGIApp, otherwise: ASGIApp) -> ASGIApp:
    """Stands for all the world: whatever URL is made up, nothing leaves this machine."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        await (simulated if host == simulator else otherwise)(scope, receive, send)

    return app


@pytest.mark.timeout(7200 if THOROUGH else 300)
async def test_every_answer_is_as_the_document_says(world: World, database_url: str):
    accounts = world.document()["accounts"]
    simulator = httpx.URL(world.simulator_origin).netloc.decode()
    async with serving(proxy(simulator, world.simulator.app, world.subscriber.app)) as origin:
        relay = await world.relay(
            database=database_url,
            accounts=accounts | {"vivix": {**accounts["vivix"], "webhook_secret": "s"}},
            network={"allow": ["127.0.0.0/8"], "allow_http": True, "proxy": origin},
        )
        await world.endpoint(relay)
        await world.watch(relay, "luma")
        asked = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
            *("run", f"{relay.origin}/openapi.json", "--header", f"Authorization: Bearer {ADMIN_KEY}"),
            *("--max-examples", str(EXAMPLES), "--no-color", "--output-sanitize", "false"),
            *(() if THOROUGH else ("--seed", "1")),
        ]
        process = await asyncio.create_subprocess_exec(
            *asked, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=world.directory
        )
        said = (await process.communicate())[0].decode()
        print(said)
    assert process.returncode == 0, said
    generated = re.search(r"(\d+) generated", said)
    assert generated is not None and int(generated[1]) >= CASES, said
