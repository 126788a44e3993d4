"""The program as people run it: processes, exit codes, what they print."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from typer.main import get_group

from relay.cli import MODULES
from relay.signature import headers, new_secret
from relay.simulator import Simulator
from relay.times import parse_rfc3339
from tests.conftest import ADMIN_KEY, World
from tests.postgres import Cluster
from tests.serving import listener

BARE = {"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", "COLUMNS": "200"}


@dataclass
class Ended:
    code: int
    out: str
    err: str


async def relay(*arguments: str, cwd: Path, stdin: bytes = b"", **environment: str) -> Ended:
    """Runs the program to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", *arguments),
        cwd=cwd,
        env={**BARE, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 60)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


def write(directory: Path, document: object) -> None:
    (directory / "config.yaml").write_text(
        document if isinstance(document, str) else yaml.safe_dump(document)
    )


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("secret_key: [", "is not YAML"),
        ("- a list", "must hold keys and values"),
        ("{}", "secret_key: is missing"),
        ("secret_key: ${NOWHERE_TO_BE_FOUND}", "secret_key: the environment has no NOWHERE_TO_BE_FOUND"),
        ("secret_key: ${file:/nowhere/key}", "secret_key: /nowhere/key cannot be read"),
        ({"secret_key": "s", "prot": 1}, "prot: there is no such key"),
        ({"secret_key": "s", "port": "many"}, "port: "),
        *(
            ({"secret_key": "s", "admin_key": key}, "admin_key: must be visible ASCII characters")
            for key in ("", " ", "\t", "two words", "schlüssel")
        ),
        ({"secret_key": "s", "database": "mysql://x"}, "database: "),
        ({"secret_key": "s", "database": "sqlite:////proc/none/relay.db"}, "database: "),
        ({"secret_key": "s", "delivery": {"timeout": 15}}, "delivery.timeout: write a duration"),
        ({"secret_key": "s", "delivery": {"schedule": ["5 parsecs"]}}, "delivery.schedule.0: "),
        ({"secret_key": "s", "network": {"allow": ["10.0.0.300/8"]}}, "network.allow.0: "),
        (
            {"secret_key": "s", "accounts": {"a": {"provider": "nobody", "api_key": "k"}}},
            "accounts.a.provider: ",
        ),
        ({"secret_key": "s", "accounts": {"a": {"provider": "luma"}}}, "accounts.a.api_key: is missing"),
        (
            {
                "secret_key": "s",
                "accounts": {"a": {"provider": "luma", "api_key": "k", "base_url": "http://x"}},
            },
            "accounts.a.base_url: must begin with https://",
        ),
        *(
            (
                {
                    "secret_key": "s",
                    "accounts": {"a": {"provider": "vivix", "api_key": "k", "webhook_secret": secret}},
                },
                "accounts.a.webhook_secret",
            )
            for secret in ("", [], 5)
        ),
        *(
            (
                {
                    "secret_key": "s",
                    "accounts": {"a": {"provider": "vivix", "api_key": "k", "tenants": tenants}},
                },
                "accounts.a.tenants",
            )
            for tenants in ("", "acme", [], ["Acme"], ["a.b"], None, [5])
        ),
    ],
)
async def test_a_wrong_configuration_is_refused_with_its_key_and_without_a_traceback(
    tmp_path: Path, document: object, says: str
) -> None:
    write(tmp_path, document)
    ended = await relay("serve", cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err
    assert "Traceback" not in ended.err


async def test_no_configuration_says_where_to_get_one(tmp_path: Path) -> None:
    for command in ("serve", "check", "migrate"):
        ended = await relay(command, cwd=tmp_path)
        assert ended.code == 2
        assert "config.yaml does not exist: copy config.example.yaml there" in ended.err


async def test_a_wrong_command_is_a_usage_error(tmp_path: Path) -> None:
    assert (await relay("frobnicate", cwd=tmp_path)).code == 2
    assert (await relay("track", cwd=tmp_path)).code == 2


async def test_a_command_that_asks_a_running_relay_begins_without_the_server(tmp_path: Path) -> None:
    for command, needs in (("track", "httpx"), ("listen", "httpx_sse"), ("serve", "relay.app")):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-X", "importtime", "-m", "relay", command, "--help"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _, imported = await asyncio.wait_for(process.communicate(), 60)
        names = {line.rsplit("|", 1)[1].strip() for line in imported.decode().splitlines() if "|" in line}
        assert process.returncode == 0
        assert needs in names
        assert ("relay.app" in names) == ("aiosqlite" in names) == (command == "serve"), command


def test_every_command_is_found_by_its_name() -> None:
    for module, names in MODULES.items():
        assert set(names) == set(get_group(import_module(module).commands).commands), module


async def test_check_tells_good_credentials_from_bad_ones(world: World) -> None:
    document = world.document()
    document["accounts"]["luma"]["api_key"] = "not-the-key"
    document["accounts"]["vivix"]["base_url"] = "http://127.0.0.1:1/v1"
    document["accounts"]["luma"]["webhook_secret"] = "of-the-webhook"
    document["accounts"]["vivix"]["webhook_secret"] = ["of-the-webhook"]
    write(world.directory, document)
    ended = await relay("check", cwd=world.directory)
    assert ended.code == 1
    lines = {line.split()[1].rstrip(":"): line.split()[0] for line in ended.out.splitlines()}
    assert lines["accounts.pixellabs"] == lines["accounts.pictory"] == "ok"
    assert lines["accounts.luma"] == lines["accounts.vivix"] == "failed"
    assert lines["accounts.luma.webhook_secret"] == lines["public_url"] == "warning"
    assert "accounts.vivix.webhook_secret" not in lines
    assert "not-the-key" not in ended.out + ended.err
    assert "of-the-webhook" not in ended.out + ended.err
    del document["accounts"]["luma"], document["accounts"]["vivix"]
    write(world.directory, document)
    assert (await relay("check", cwd=world.directory)).code == 0
    # Nothing but saying: the database was not made.
    assert not (world.directory / "relay.db").exists()


async def test_check_says_where_a_postgresql_is_and_not_its_password(
    tmp_path: Path, cluster: Cluster
) -> None:
    url = cluster.database()
    name = url.removeprefix("postgresql://relay@")
    write(tmp_path, {"secret_key": "s" * 32, "database": url.replace("@", ":pass-word@")})
    ended = await relay("check", cwd=tmp_path)
    assert f"database: {name} is up to date" in ended.out
    write(tmp_path, {"secret_key": "s" * 32, "database": "postgresql://relay:pass-word@127.0.0.1:1/relay"})
    refused = await relay("check", cwd=tmp_path)
    assert refused.code == 1
    assert "database: 127.0.0.1:1/relay cannot be reached" in refused.out
    assert "pass-word" not in ended.out + ended.err + refused.out + refused.err
    cluster.drop(url)


async def test_verify_says_whether_a_signature_is_right(tmp_path: Path) -> None:
    secret, body = new_secret(), b'{"type":"a"}'
    given = headers([secret], "evt_1", 1_700_000_000, body)

    async def verify(content: bytes, *more: str) -> Ended:
        return await relay(
            *("verify", "-", "--secret", secret, "--id", given["webhook-id"]),
            *("--timestamp", given["webhook-timestamp"], "--signature", given["webhook-signature"], *more),
            cwd=tmp_path,
            stdin=content,
        )

    assert (await verify(body, "--any-age")).code == 0
    assert (await verify(body + b" ", "--any-age")).code == 1
    old = await verify(body)
    assert old.code == 1
    assert "300 s" in old.err


@asynccontextmanager
async def served(directory: Path, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`relay serve` as a process, once it serves; ended with SIGTERM, and then with code 0."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", "serve"),
        cwd=directory,
        env={**BARE, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    heard = b""
    try:
        while b"relay.serving" not in heard:
            line = await asyncio.wait_for(process.stderr.readline(), 20)
            assert line, heard.decode()
            heard += line
        process.heard = heard.decode()  # type: ignore[attr-defined]
        yield process
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_the_main_job_on_the_command_line(world: World) -> None:
    with listener() as bound:
        port = bound.getsockname()[1]
    write(world.directory, world.document(port=port))
    remote = {"RELAY_URL": f"http://127.0.0.1:{port}", "RELAY_API_KEY": ADMIN_KEY}

    async def ask(*arguments: str, code: int = 0, **environment: str) -> dict:
        ended = await relay(*arguments, "--json", cwd=world.directory, **remote, **environment)
        assert ended.code == code, ended.err
        return json.loads(ended.out or "{}")

    world.subscriber.answer(410, path="/gone")
    async with served(world.directory):
        endpoint = await ask("endpoints", "add", world.subscriber.origin + "/hook")
        gone = await ask("endpoints", "add", world.subscriber.origin + "/gone")
        tested = await ask("endpoints", "test", endpoint["id"])
        assert tested["attempts"][0]["response_status"] == 204
        job = world.simulator.submit("vivix", duration=0.5)
        generation = await ask("track", "vivix", job, "--wait")
        assert generation["status"] == "completed"
        failing = world.simulator.submit("luma", duration=0.2, outcome="failed")
        assert (await ask("track", "luma", failing, "--wait", code=1))["status"] == "failed"
        await world.subscriber.got(3, path="/hook")
        assert (await ask("generations", "list", "--status", "completed"))["data"][0]["id"] == generation[
            "id"
        ]
        [delivery] = (await ask("deliveries", "list", "--endpoint", gone["id"], "--status", "failed"))["data"]
        assert (await ask("endpoints", "show", gone["id"]))["status"] == "disabled"
        assert len((await ask("generations", "list", "--since", "1h"))["data"]) == 2
        assert (await ask("generations", "list", "--until", "1h"))["data"] == []
        astray = f"../endpoints/{gone['id']}"
        assert (await relay("deliveries", "show", astray, cwd=world.directory, **remote)).code == 1
        refused = await relay("deliveries", "replay", delivery["id"], cwd=world.directory, **remote)
        assert refused.code == 1
        assert "enable it first" in refused.err
        await ask("endpoints", "enable", gone["id"])
        world.subscriber.answer(200, path="/gone")
        replayed = await ask("deliveries", "replay", delivery["id"], "--wait")
        assert [one["trigger"] for one in replayed["attempts"]] == ["scheduled", "replay"]
        everything = ("replay", "--since", "1h", "--status", "all", "--rate-limit", "100")
        # Two at one, one at the other, and what that missed while it was disabled.
        assert (await ask(*everything, "--dry-run"))["total"] == 4
        again = await ask(*everything)
        assert (again["status"], again["total"], again["done"]) == ("completed", 4, 4)
        nothing = await relay(
            "replay", "--since", "2000-01-01", "--until", "1h", cwd=world.directory, **remote
        )
        assert (nothing.code, "completed" in nothing.out) == (0, True), nothing.err
        over = await relay("replays", "cancel", again["id"], cwd=world.directory, **remote)
        assert (over.code, "it is completed" in over.err) == (1, True)
        wrong = await relay("replay", "--since", "yesterday", cwd=world.directory, **remote)
        assert (wrong.code, "how long ago" in wrong.err) == (2, True)
        assert (await relay("endpoints", "list", cwd=world.directory, **remote)).out.count("ep_") == 2
        name, url = "mine", Simulator.base_urls(world.simulator_origin)["luma"]
        add = ("accounts", "add", name, "--provider", "luma", "--base-url", url)
        added = await ask(*add, RELAY_CREDENTIAL=world.simulator.keys["luma"])
        assert (added["name"], added["configured"]) == (name, False)
        job = world.simulator.submit("luma", duration=0)
        assert (await ask("track", name, job, "--wait"))["account"] == name
        listed = await relay("accounts", "list", cwd=world.directory, **remote)
        assert len([line for line in listed.out.splitlines() if "│ ok" in line]) == 5
        again = await relay(*add, cwd=world.directory, RELAY_CREDENTIAL="another-0123456789", **remote)
        assert (again.code, "of this name" in again.err) == (1, True)
        assert "another-0123456789" not in again.out + again.err
        assert await ask("accounts", "delete", name) == {"deleted": name}
        await ask("accounts", "delete", name, code=1)
        second = await relay("serve", cwd=world.directory, RELAY_PORT="0")
        assert second.code == 2
        assert "PostgreSQL" in second.err


async def test_keys_are_made_listed_and_revoked_beside_a_running_relay(
    world: World, cluster: Cluster
) -> None:
    with listener() as bound:
        port = bound.getsockname()[1]
    remote = {"RELAY_URL": f"http://127.0.0.1:{port}"}
    for database in (f"sqlite:///{world.directory}/relay.db", cluster.database()):
        write(world.directory, world.document(port=port, database=database))

        async def keys(*arguments: str, code: int = 0) -> Ended:
            ended = await relay("keys", *arguments, cwd=world.directory)
            assert ended.code == code, ended.err
            return ended

        async def lists(key: str, *, code: int) -> str:
            ended = await relay("endpoints", "list", cwd=world.directory, RELAY_API_KEY=key, **remote)
            assert ended.code == code, ended.err
            return ended.err

        before = await keys("create", "--name", "before the first start")
        async with served(world.directory):
            made = await keys("create", "--tenant", "acme", "--scope", "read,replay", "--scope", "write")
            # KEY=$(relay keys create …) is the key; whatever there is to be said of it is said elsewhere.
            key = made.out.removesuffix("\n")
            assert re.fullmatch(r"rk_[0-9A-Z]{26}_[0-9A-Za-z]{43}", key)
            assert key not in made.err
            assert "tenant acme: read, write, replay, until it is revoked" in made.err
            await lists(key, code=0)
            await lists(before.out.strip(), code=0)
            soon = json.loads((await keys("create", "--expires", "30d", "--rate-limit", "2.5", "--json")).out)
            assert soon["key"].startswith("rk_")
            assert (soon["scopes"], soon["rate_limit"]) == (["read", "write", "replay"], 2.5)
            age = parse_rfc3339(soon["expires_at"]) - parse_rfc3339(soon["created_at"])
            assert age == 30 * 86_400_000
            listed = json.loads((await keys("list", "--json")).out)["data"]
            assert [one["tenant"] for one in listed] == ["default", "acme", "default"]
            [acme] = json.loads((await keys("list", "--tenant", "acme", "--json")).out)["data"]
            table = (await keys("list")).out
            assert all(one["id"] in table for one in listed)
            assert key[-43:] not in table
            # By its id, or by all of it where somebody has found it.
            for one, text in ((acme["id"], key), (before.out.strip(), before.out.strip())):
                revoked = await keys("revoke", one)
                assert text not in revoked.err
                assert "revoked at" in await lists(text, code=1)
            assert "there is no key" in (await keys("revoke", "key_unknown", code=1)).err
    cluster.drop(database)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--scope", "root"), "there is no root"),
        (("--scope", "read,,"), "read, write, replay, admin"),
        (("--tenant", "Acme"), "lower-case"),
        (("--tenant", ""), "lower-case"),
        (("--expires", "5 parsecs"), "30d"),
        (("--expires", "2020-01-01T00:00:00Z"), "future"),
        (("--expires", "0s"), "future"),
        (("--rate-limit", "0"), "0.001"),
        (("--rate-limit", "1e-16"), "0.001"),
    ],
)
async def test_a_key_that_cannot_be_is_a_usage_error(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    write(tmp_path, {"secret_key": "s" * 32})
    ended = await relay("keys", "create", *arguments, cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err
    assert os.listdir(tmp_path) == ["config.yaml"]


async def test_no_key_is_made_in_half_a_copy(tmp_path: Path) -> None:
    write(tmp_path, {"secret_key": "s" * 32})
    assert (await relay("migrate", cwd=tmp_path)).code == 0
    with closing(sqlite3.connect(tmp_path / "relay.db")) as file:
        file.execute("INSERT INTO copies (id, source, position, began_at) VALUES ('cpy_1', 'x', '[]', 0)")
        file.commit()
    ended = await relay("keys", "create", cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert "did not end" in ended.err


async def test_check_warns_of_an_admin_key_that_can_be_guessed(tmp_path: Path) -> None:
    for key, warned in (("a" * 19, True), ("a" * 20, False)):
        write(tmp_path, {"secret_key": "s" * 32, "admin_key": key})
        ended = await relay("check", cwd=tmp_path)
        assert ended.code == 0
        assert ("admin_key: is shorter" in ended.out) is warned
        assert key not in ended.out + ended.err


async def test_a_generated_admin_key_is_printed_once_and_stored_as_a_hash(tmp_path: Path) -> None:
    write(tmp_path, {"secret_key": "s" * 32, "port": 0})
    async with served(tmp_path) as first:
        [key] = [word for word in first.heard.split() if word.startswith("rk_")]
    async with served(tmp_path) as second:
        assert "rk_" not in second.heard
    assert key[-43:].encode() not in (tmp_path / "relay.db").read_bytes()


async def test_the_demo_ends_well(tmp_path: Path) -> None:
    ended = await relay("demo", cwd=tmp_path)
    assert ended.code == 0, ended.out + ended.err
    assert "Every webhook arrived" in ended.out
    assert os.listdir(tmp_path) == []
