"""What docs/ says works: its commands are run, its examples receive what a relay sends, its tables are true.

In a page each block of shell says in its first line what becomes of it: `sh run` blocks of a page are run
here, one after the other in one shell, `sh by hand` needs what a test does not have.
"""

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from relay import signature
from tests.conftest import RunningRelay, World, need
from tests.program import THOROUGH
from tests.serving import listener, origin_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
# They may be in use here: a test takes others.
PORTS = ("8080", "8090", "3000")
START = """
set -euo pipefail
trap 'status=$?; trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; exit $status' EXIT
"""


def commands(page: Path) -> Sequence[str]:
    return [
        text for kind, more, text in BLOCK.findall(page.read_text("utf-8")) if (kind, more) == ("sh", " run")
    ]


def free_ports(count: int) -> Sequence[str]:
    bound = [listener() for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in bound]
    for one in bound:
        one.close()
    return ports


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_shell_is_run_or_says_why_not(page: Path):
    kinds = {
        more for kind, more, _ in BLOCK.findall(page.read_text("utf-8")) if kind in ("sh", "bash", "shell")
    }
    assert kinds <= {" run", " by hand"}


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
async def test_the_commands_of_a_page_work_one_after_the_other(tmp_path: Path, page: Path):
    for program in ("bash", "curl", "openssl", "sqlite3"):
        found = shutil.which(program)
        need(Path(found) if found else None, f"{program} is missing: apt-get install {program}")
    script, ports = START + "".join(commands(page)), free_ports(3)
    for usual, free in zip(PORTS, ports, strict=True):
        script = re.sub(rf"\b{usual}\b", free, script)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, command in (("relay", f"{sys.executable} -m relay"), ("python3", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("docs", "deploy", "config.example.yaml"):
        (work / name).symlink_to(ROOT / name)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "240",
        "HOME": str(tmp_path),
        # Where the page relies on a default.
        "RELAY_PORT": ports[0],
        "RELAY_URL": f"http://127.0.0.1:{ports[0]}",
        "PORT": ports[2],
    }
    said = tmp_path / "said"
    with said.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-x", "-c", script),
            cwd=work,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 90)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text = said.read_text("utf-8")
    assert process.returncode == 0, text[-5000:]
