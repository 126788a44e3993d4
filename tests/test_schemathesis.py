"""Schemathesis against a running relay: every answer is one that its OpenAPI document names.

What is tried is read from the document alone; `schemathesis.toml` says how.
"""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ADMIN_KEY, RunningRelay, World
from tests.program import THOROUGH

CONFIG = Path(__file__).parent / "schemathesis.toml"
# Random ones for each operation and round, beside those at the edges of the schemas; and how many in all.
EXAMPLES, CASES = (150, 25_000) if THOROUGH else (8, 1_000)


async def tried(relay: RunningRelay, directory: Path, *options: str) -> int:
    """How many cases one round was; all of them passed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", f"{relay.origin}/openapi.json", "--header", f"Authorization: Bearer {ADMIN_KEY}"),
        *("--max-examples", str(EXAMPLES), "--no-color", "--output-sanitize", "false", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    found = re.search(r"(\d+) generated, (\d+) passed", said)
    assert found is not None and found[1] == found[2], said
    return int(found[1])


@pytest.mark.timeout(7200 if THOROUGH else 300)
async def test_every_answer_is_as_the_document_says(world: World, database_url: str):
    accounts = world.document()["accounts"]
    accounts["vivix"]["webhook_secret"] = "the-secret-of-the-webhook"
    async with world.confined(database=database_url, accounts=accounts) as relay:
        await world.endpoint(relay)
        await world.watch(relay, "luma")
        cases = rounds = 0
        while cases < CASES:
            rounds += 1
            cases += await tried(relay, world.directory, "--seed", str(rounds))
    print(f"{cases} cases in {rounds} rounds")
