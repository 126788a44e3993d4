"""What docs/ says works: its commands are run, its examples receive what a relay sends, its tables are true.

In a page each block of shell says in its first line what becomes of it: `sh run` blocks of a page are run
here, one after the other in one shell, `sh by hand` needs what a test does not have.
"""

import asyncio
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from relay import signature
from relay.providers import PROVIDERS, load
from tests import reference
from tests.conftest import ADMIN_KEY, World, need
from tests.program import THOROUGH
from tests.serving import listener

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
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


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / name for name in TOP)], ids=lambda page: page.stem)
def test_every_link_to_a_file_of_ours_leads_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads
            }, link


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


def test_the_receivers_in_the_page_are_the_files_that_are_tested():
    text = (DOCS / "receiving.md").read_text("utf-8")
    shown = {kind: block for kind, _, block in BLOCK.findall(text) if kind in ("python", "js", "go")}
    files = {"python": "receive.py", "js": "receive.mjs", "go": "receive.go"}
    assert shown == {kind: (DOCS / "examples" / name).read_text("utf-8") for kind, name in files.items()}


@dataclass
class Receiver:
    """An example at work; `handled` are the events that it has."""

    url: str
    said: Path

    @property
    def handled(self) -> Sequence[str]:
        return [line for line in self.said.read_text("utf-8").splitlines() if line.startswith("generation.")]


def receiver_command(language: str, directory: Path) -> Sequence[str]:
    """What runs the example of a language, with its library."""
    if language == "python":
        return [sys.executable, str(DOCS / "examples" / "receive.py")]
    verifiers = ROOT / "tests" / "verifiers"
    if language == "javascript":
        modules = verifiers / "javascript" / "node_modules"
        there = shutil.which("node") and (modules / "standardwebhooks").is_dir()
        need(modules if there else None, f"install Node.js, then npm ci --prefix {modules.parent}")
        (directory / "node_modules").symlink_to(modules)
        shutil.copy(DOCS / "examples" / "receive.mjs", directory)
        return ["node", str(directory / "receive.mjs")]
    if not THOROUGH:
        pytest.skip("Go's library is fetched with RELAY_THOROUGH only")
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    for name in ("go.mod", "go.sum"):
        shutil.copy(verifiers / "go" / name, directory)
    shutil.copy(DOCS / "examples" / "receive.go", directory)
    built = subprocess.run(  # our own command
        ["go", "build", "-mod=readonly", "-o", "receive", "."],  # noqa: S607
        cwd=directory, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if "dial tcp" in built.stderr:
        pytest.skip("Go's library cannot be had here")
    assert built.returncode == 0, built.stderr
    return [str(directory / "receive")]


@asynccontextmanager
async def receiving(
    command: Sequence[str], directory: Path, secret: str, port: str
) -> AsyncIterator[Receiver]:
    said = directory / "said"
    with said.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=directory,
            env={**os.environ, "WEBHOOK_SECRET": secret, "PORT": port},
            stdout=out,
            stderr=asyncio.subprocess.DEVNULL,
        )
    try:
        async with asyncio.timeout(20), httpx.AsyncClient() as client:
            while True:
                assert process.returncode is None
                with suppress(httpx.TransportError):
                    await client.post(f"http://127.0.0.1:{port}/", content=b"{}")
                    break
                await asyncio.sleep(0.02)
        yield Receiver(f"http://127.0.0.1:{port}/hook", said)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("language", ["python", "javascript", "go"])
async def test_an_example_takes_what_is_genuine_once_and_refuses_what_is_not(
    world: World, tmp_path: Path, language: str
):
    directory = tmp_path / language
    directory.mkdir()
    command, [port] = receiver_command(language, directory), free_ports(1)
    relay = await world.relay()
    asked = {"url": f"http://127.0.0.1:{port}/hook"}
    endpoint = (await relay.api.post("/v1/endpoints", json=asked)).json()
    async with receiving(command, directory, endpoint["secret"], port) as receiver:
        watched = await world.watch(relay, "luma", duration=0)
        of_it = f"/v1/deliveries?generation_id={watched['id']}"
        page = await relay.eventually(
            of_it, lambda page: page["data"] and page["data"][0]["status"] == "delivered"
        )
        [delivery] = page["data"]
        assert len(receiver.handled) == 1
        await relay.api.post(f"/v1/deliveries/{delivery['id']}/replay")
        path = f"/v1/deliveries/{delivery['id']}"
        again = await relay.eventually(path, lambda one: len(one["attempts"]) == 2)
        assert again["status"] == "delivered"
        assert len(receiver.handled) == 1
        body = b'{"type": "generation.completed", "timestamp": "2026-03-16T14:30:12.000Z", "data": {}}'
        async with httpx.AsyncClient() as client:
            for secret in (signature.new_secret(), endpoint["secret"]):
                headers = signature.headers([secret], "evt_1", int(time.time()) - 301, body)
                assert (await client.post(receiver.url, content=body, headers=headers)).status_code == 400
        assert len(receiver.handled) == 1


async def test_what_comes_again_during_the_work_of_the_javascript_example_ends_as_the_work_does(
    tmp_path: Path,
):
    command, [port], secret = receiver_command("javascript", tmp_path), free_ports(1), signature.new_secret()
    program = tmp_path / "receive.mjs"
    text, work = program.read_text("utf-8"), "  console.log(event.type, event.data.outputs);\n"
    assert work in text
    # The work on the first event fails as soon as the last one has come.
    waits = (
        "  await new Promise((go) => (event.type === 'first' ? (globalThis.go = go) : go(globalThis.go())));"
    )
    fails = "  if (event.type === 'first') throw new Error('the work failed');"
    program.write_text(text.replace(work, f"{waits}\n{fails}\n"), "utf-8")

    def request(event: str) -> bytes:
        body = b'{"type": "%s"}' % event.encode()
        headers = signature.headers([secret], event, int(time.time()), body)
        lines = ["POST / HTTP/1.1", "host: x", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async with receiving(command, tmp_path, secret, port), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        # One connection, so that they come in this order.
        writer.write(b"".join(request(event) for event in ("first", "first", "last")))
        writer.write_eof()
        statuses = re.findall(rb"^HTTP/1.1 (\d+)", await reader.read(), re.MULTILINE)
        writer.close()
    assert statuses == [b"500", b"500", b"204"]


def test_the_reference_is_what_the_openapi_document_says():
    assert reference.PAGE.read_text("utf-8") == reference.reference()


@pytest.mark.skipif(not THOROUGH, reason="the generator is fetched with RELAY_THOROUGH only")
async def test_a_client_that_is_generated_from_the_document_works(world: World, tmp_path: Path):
    relay = await world.relay()
    (tmp_path / "relay.json").write_bytes((await relay.api.get("/openapi.json")).content)
    generate = ["generate", "--path", "relay.json", "--meta", "none", "--output-path", "relay_client"]
    use = (
        "import sys; from relay_client import AuthenticatedClient;"
        " from relay_client.api.endpoints import create_endpoint, list_endpoints;"
        " from relay_client.models import EndpointCreate;"
        " client = AuthenticatedClient(sys.argv[1], sys.argv[2]);"
        " made = create_endpoint.sync(client=client, body=EndpointCreate(url='https://example.com/hook'));"
        " assert list_endpoints.sync(client=client).data[0].id == made.id"
    )
    with_it = [sys.executable, "-m", "uv", "tool", "run", "--from", "openapi-python-client", "--with", "ruff"]
    made = await run(*with_it, "openapi-python-client", *generate, cwd=tmp_path)
    if "network" in made[1].lower() or "failed to fetch" in made[1].lower():
        pytest.skip("the generator cannot be had here")
    assert made[0] == 0, made[1]
    assert "Warning" not in made[1]
    used = await run(*with_it, "python", "-c", use, relay.origin, ADMIN_KEY, cwd=tmp_path)
    assert used[0] == 0, used[1]


async def run(*command: str, cwd: Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode is not None
    return process.returncode, out.decode()


@pytest.mark.parametrize("name", list(PROVIDERS))
def test_the_page_of_providers_says_what_their_code_does(name: str):
    text = (DOCS / "providers.md").read_text("utf-8")
    section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    provider, module = load(name), importlib.import_module(type(load(name)).__module__)
    codes = getattr(module, "ERRORS", None) or getattr(module, "FAILURES", {})
    named = [*module.STATUSES, *codes, provider.base_url]
    assert [one for one in named if f"`{one}`" not in section] == []
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
    cells = {row[1]: row[head.index(f"`{name}`")] for row in rows}
    pace = provider.pace
    assert cells["asked at"] == f"`GET {provider.path('{id}')}`"
    assert cells["shortest pause between polls"] == f"{pace.interval // 1000} s"
    assert cells["expected at first"] == f"{(pace.typical or (0, 0))[0] // 1000} s"
    assert cells["`timed_out` after"] == f"{pace.timeout // 60_000} min"
    assert cells["key"] == ("`Bearer`" if provider.authorization("k") == "Bearer k" else "the key alone")
    calls = "unsigned, for one job" if provider.calls_back else "no"
    assert cells["calls back"] == ("signed, for a whole account" if provider.signs else calls)
