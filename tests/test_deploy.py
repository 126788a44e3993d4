"""What lies in deploy/ works: nginx in front of a relay for real, and what systemd says of the unit."""

import asyncio
import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
import yaml

from relay.config import OVERRIDES, DeliverySettings
from relay.times import parse_duration
from tests.conftest import ADMIN_KEY, RunningRelay, World, need
from tests.serving import listener

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
NAME, CALLER = "relay.example.com", "127.0.0.2"
# Debian has it where only root looks.
PATH = f"{os.environ['PATH']}:/usr/sbin"
MAIN = """
daemon off;
{user}
pid {here}/nginx.pid;
error_log {here}/error.log info;
events {{}}
http {{
  access_log {here}/access.log;
  client_body_temp_path {here}/body;
  proxy_temp_path {here}/proxy;
  fastcgi_temp_path {here}/fastcgi;
  uwsgi_temp_path {here}/uwsgi;
  scgi_temp_path {here}/scgi;
  include {here}/relay.conf;
}}
"""


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=PATH)
    need(Path(found) if found else None, f"{name} is missing: apt-get install {package}")
    assert found is not None
    return found


def replaced(text: str, **changes: str) -> str:
    """Each of the settings with another value; a setting that is not there once is an error."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@dataclass
class Front:
    """nginx in front of a relay; `client` comes through it, over TLS."""

    relay: RunningRelay
    client: httpx.AsyncClient
    directory: Path

    @property
    def logs(self) -> str:
        return "".join((self.directory / name).read_text() for name in ("access.log", "error.log"))


@pytest.fixture
async def front(world: World, tmp_path: Path) -> AsyncIterator[Front]:
    nginx = program("nginx", "nginx")
    relay = await world.relay(
        public_url=f"https://{NAME}",
        network={"allow": ["127.0.0.0/8"], "trusted_proxies": ["127.0.0.1/32"]},
    )
    here = tmp_path / "nginx"
    here.mkdir()
    authority = trustme.CA()
    authority.issue_cert(NAME).private_key_and_cert_chain_pem.write_to_path(here / "relay.pem")
    with listener() as bound:
        port = bound.getsockname()[1]
    settings = replaced(
        (DEPLOY / "nginx.conf").read_text(),
        **{
            "server 127.0.0.1:8080;": f"server {relay.origin.removeprefix('http://')};",
            "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
            "/etc/ssl/relay.pem": f"{here}/relay.pem",
            "/etc/ssl/relay.key": f"{here}/relay.pem",
        },
    )
    (here / "relay.conf").write_text(settings)
    # As root its workers would be somebody who may not read this directory.
    user = "user root;" if os.getuid() == 0 else ""
    (here / "nginx.conf").write_text(MAIN.format(here=here, user=user))
    process = await asyncio.create_subprocess_exec(
        *(nginx, "-p", here, "-e", here / "error.log", "-c", here / "nginx.conf"),
        stderr=asyncio.subprocess.PIPE,
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = httpx.AsyncClient(
        # Not the address that nginx itself has.
        transport=httpx.AsyncHTTPTransport(verify=context, local_address=CALLER),
        base_url=f"https://127.0.0.1:{port}",
        headers={"authorization": f"Bearer {ADMIN_KEY}", "host": NAME},
        timeout=30,
    )
    try:
        async with client, asyncio.timeout(20):
            while True:
                assert process.returncode is None, (await process.communicate())[1].decode()
                with suppress(httpx.TransportError):
                    await client.get("/healthz", extensions={"sni_hostname": NAME})
                    break
                await asyncio.sleep(0.02)
            client.event_hooks["request"] = [as_named]
            yield Front(relay, client, here)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


async def as_named(request: httpx.Request) -> None:
    request.extensions["sni_hostname"] = NAME


async def test_behind_nginx_the_api_works_and_the_callers_address_is_the_real_one(front: Front):
    forged = {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "http"}
    answer = await front.client.post("/v1/keys", json={"scopes": ["read"]}, headers=forged)
    assert answer.status_code == 201, answer.text
    assert "strict-transport-security" in answer.headers
    [entry] = (await front.client.get("/v1/audit?action=key.created")).json()["data"]
    assert entry["address"] == CALLER
    many = await asyncio.gather(*(front.client.get("/v1/endpoints") for _ in range(50)))
    assert {one.status_code for one in many} == {200}


async def test_behind_nginx_an_answer_may_be_waited_for_and_large_bodies_are_refused(
    front: Front, world: World
):
    watched = await world.watch(front.relay, "luma", duration=1.0)
    waited = await front.client.get(f"/v1/generations/{watched['id']}/wait?timeout=30")
    assert waited.json()["status"] == "completed"
    large = await front.client.post("/v1/events", content=b" " * (1024 * 1024 + 1))
    assert large.status_code == 413
    taken = await front.client.post("/v1/events", json={"type": "a.b", "data": {"x": "y" * 250_000}})
    assert taken.status_code == 201


@pytest.mark.parametrize("path", ["/metrics", "/metrics?name[]=up", "/%6detrics", "//metrics"])
async def test_nginx_does_not_pass_the_metrics_on(front: Front, path: str):
    assert (await front.relay.api.get("/metrics")).status_code == 200
    answer = await front.client.get(path)
    assert answer.status_code == 404
    assert "relay_" not in answer.text


async def test_behind_nginx_the_stream_of_events_comes_as_it_happens(front: Front):
    async with asyncio.timeout(20), front.client.stream("GET", "/v1/events/stream") as answer:
        assert answer.status_code == 200
        published = await front.client.post("/v1/events", json={"type": "order.paid", "data": {}})
        assert published.status_code == 201
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                assert "order.paid" in line
                break


async def test_nginx_logs_no_path_of_a_callback_not_even_when_the_relay_is_away(front: Front, world: World):
    waiting = (await front.client.post("/v1/generations", json={"account": "pictory"})).json()
    hook = httpx.URL(waiting["webhook_url"])
    assert hook.host == NAME
    assert (await front.client.post(hook.path, json={"job_id": "job-1"})).status_code == 200
    port = front.relay.origin.rpartition(":")[2]
    settings = front.directory / "relay.conf"
    settings.write_text(settings.read_text().replace(f"127.0.0.1:{port}", "127.0.0.1:1"))
    os.kill(int((front.directory / "nginx.pid").read_text()), signal.SIGHUP)
    async with asyncio.timeout(20):
        while (await front.client.post(hook.path, json={"job_id": "job-1"})).status_code != 502:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await front.client.get("/v1/endpoints")).status_code == 502
    assert "/v1/endpoints" in front.logs
    assert "/hooks/" not in front.logs


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there."""
    text = (DEPLOY / "relay.service").read_text()
    copy = tmp_path / "relay.service"
    copy.write_text(replaced(text, **{"/opt/relay/bin/relay serve": f"{sys.executable} -m relay serve"}))
    return copy


def analyzed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [program("systemd-analyze", "systemd"), "--no-pager", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 # our own


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path):
    found = analyzed("verify", "--man=no", unit)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_systemd_finds_the_unit_well_confined(unit: Path):
    # Out of 100; without the hardening it is 92.
    found = analyzed("security", "--offline=yes", "--threshold=20", unit)
    assert found.returncode == 0, found.stdout


def test_the_unit_sees_what_the_metrics_of_the_process_are_read_from():
    # With `pid` there is no /proc/stat, and no process_* then.
    assert "ProcSubset=" not in (DEPLOY / "relay.service").read_text()


def test_the_files_agree_with_each_other_and_with_the_example_configuration():
    example = yaml.safe_load((ROOT / "config.example.yaml").read_text())
    port = example["port"]
    for name in ("nginx.conf", "Caddyfile"):
        assert f"127.0.0.1:{port}" in (DEPLOY / name).read_text()
        assert f"https://{NAME}" == example["public_url"]
        assert NAME in (DEPLOY / name).read_text()
    for name in ("Caddyfile", "compose.yaml"):
        assert "respond /metrics 404" in (DEPLOY / name).read_text()


def test_compose_builds_this_repository_and_sets_what_relay_takes_from_the_environment():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    relays = [one for one in services.values() if one["image"] == "relay"]
    assert len(relays) == 2
    for relay in relays:
        assert ((DEPLOY / relay["build"]).resolve() / "Dockerfile").is_file()
        assert relay["environment"].keys() <= OVERRIDES.keys()
        # Longer than an attempt that is under way may take.
        grace, timeout = relay["stop_grace_period"], DeliverySettings().timeout
        assert parse_duration(grace) > timeout
