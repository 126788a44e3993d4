"""The programs that are measured, each a process of its own, and what is put into their stores."""

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relay.ids import new_id

HOST, KEY, ENDPOINTS = "127.0.0.1", "bench-key", 50


class Process:
    """A program of the measurement, with its memory."""

    def __init__(self, *command: str, cwd: str | None = None, pipes: bool = False) -> None:
        pipe = subprocess.PIPE if pipes else None
        self.it = subprocess.Popen(  # noqa: S603 # our own programs
            [sys.executable, "-m", *command], cwd=cwd, stdin=pipe, stdout=pipe, text=True
        )

    def memory(self, what: str = "VmRSS") -> float:
        """MiB; `VmHWM` is the most it ever was."""
        status = Path(f"/proc/{self.it.pid}/status").read_text()
        return int(status.split(f"{what}:")[1].split()[0]) / 1024

    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return cpu_of(self.it.pid)

    def forget_peak(self) -> None:
        Path(f"/proc/{self.it.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        self.it.terminate()
        self.it.wait(60)


class SinkProcess(Process):
    """The subscriber."""

    def __init__(self) -> None:
        self.port = free_port()
        super().__init__("bench.sink", str(self.port), pipes=True)
        assert self.it.stdout is not None  # noqa: S101 # it was asked for
        self.it.stdout.readline()

    def say(self, word: str) -> dict[str, Any]:
        assert self.it.stdin is not None and self.it.stdout is not None  # noqa: S101 # they were asked for
        self.it.stdin.write(word + "\n")
        self.it.stdin.flush()
        return dict(json.loads(self.it.stdout.readline()))

    async def until(self, count: int, *, timeout: float = 120) -> dict[str, Any]:
        """The report, once so many have arrived."""
        async with asyncio.timeout(timeout):
            while (report := self.say("report"))["count"] < count:  # noqa: ASYNC110 # it is another process
                await asyncio.sleep(0.05)
        return report


def cpu_of(pid: int, *, with_ended_children: bool = False) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11 : 15 if with_ended_children else 13])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        return int(bound.getsockname()[1])


def post(port: int, path: str, body: Any) -> Any:
    request = urllib.request.Request(  # our own server
        f"http://{HOST}:{port}{path}",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
    )
    return json.load(urllib.request.urlopen(request))  # noqa: S310 # our own server


def wait_until_ready(port: int) -> None:
    while True:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/readyz")  # our own server
            return
        except OSError:
            time.sleep(0.05)


@contextmanager
def relay(
    directory: str,
    program: str = "relay",
    *,
    timeout: str = "15s",
    database: str = "sqlite:///relay.db",
    **config: Any,
) -> Iterator[tuple[Process, int]]:
    """A relay on a database, in this directory when none is named; `config` are more keys of its
    configuration, `program` what is run instead of it."""
    port = free_port()
    settings = {
        "port": port,
        "database": database,
        "secret_key": "bench" * 8,
        "admin_key": KEY,
        "log_level": "warning",
        "network": {"allow": ["127.0.0.0/8"]},
        "delivery": {"timeout": timeout},
        **config,
    }
    config = Path(directory, f"config-{port}.yaml")
    config.write_text(json.dumps(settings))
    process = Process(program, "serve", "--config", str(config), cwd=directory)
    try:
        wait_until_ready(port)
        yield process, port
    finally:
        process.stop()


@contextmanager
def naive(directory: str) -> Iterator[tuple[Process, int]]:
    port = free_port()
    process = Process("bench.naive", str(port), f"{directory}/naive.db")
    try:
        wait_until_ready(port)
        yield process, port
    finally:
        process.stop()


def fill(directory: str, count: int, *, due: bool = False, later: int = 0) -> None:
    """Writes deliveries into a stopped relay's store: due ones to its endpoints, or finished ones with an
    attempt each to endpoints of the past."""
    path = f"{directory}/relay.db"
    if not Path(path).exists():
        with relay(directory):
            pass
    now = time.time_ns() // 1_000_000
    filler = json.dumps({"type": "bench.0", "data": {"sent_at": time.time_ns(), "filler": "x" * 900}})
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA synchronous = OFF")
        endpoints = [row[0] for row in database.execute("SELECT id FROM endpoints")]
        if not due:
            endpoints = [new_id("ep", now) for _ in range(ENDPOINTS)]
        stem = new_id("evt", now - 86_400_000)[4:20]
        numbers = range(count)
        database.executemany(
            "INSERT INTO events (id, tenant, type, body, created_at) VALUES (?, 'default', 'bench.0', ?, ?)",
            ((f"evt_{stem}{n:010d}", filler.encode(), now) for n in numbers),
        )
        status, due_at = ("pending", now + later) if due else ("delivered", None)
        database.executemany(
            """
            INSERT INTO deliveries (
                id, tenant, event_id, endpoint_id, destination, status, attempts, run_attempts,
                next_trigger, due_at, created_at, updated_at
            ) VALUES (?, 'default', ?, ?, ?, ?, ?, ?, 'scheduled', ?, ?, ?)
            """,
            (
                (
                    *(f"dlv_{stem}{n:010d}", f"evt_{stem}{n:010d}"),
                    *[endpoints[n % len(endpoints)]] * 2,
                    *(status, 0 if due else 1, 0 if due else 1, due_at, now, now),
                )
                for n in numbers
            ),
        )
        if not due:
            database.executemany(
                """
                INSERT INTO attempts (
                    id, delivery_id, number, started_at, duration_ms, reason, response_status
                ) VALUES (?, ?, 1, ?, 5, 'scheduled', 204)
                """,
                ((f"att_{stem}{n:010d}", f"dlv_{stem}{n:010d}", now) for n in numbers),
            )
    database.close()
    os.sync()


@contextmanager
def home(template: str | None) -> Iterator[str]:
    """A directory for one relay, with a copy of the template's store in it. What was copied is on the disk:
    a file system that still writes it would hold up every commit."""
    with tempfile.TemporaryDirectory() as directory:
        if template is not None:
            shutil.copy(f"{template}/relay.db", directory)
            os.sync()
        yield directory
