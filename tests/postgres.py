"""A PostgreSQL of the tests' own: a temporary cluster, if the server's programs are there."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from relay.store import open_database
from relay.store.migrate import migrate
from tests.serving import listener, origin_of

WHY_MISSING = "no PostgreSQL server here (apt-get install postgresql): its tests are skipped"
WHY_NO_POOLER = "no PgBouncer here (apt-get install pgbouncer): its tests are skipped"
TEMPLATE = "relay_template"
# Nobody pulls the plug in tests: what the system has taken is there after a kill.
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_wal_size": "256MB",
    "shared_buffers": "64MB",
}
# A new database is hundreds of files: in memory they are there much sooner.
MEMORY, ENOUGH = Path("/dev/shm"), 4 << 30  # noqa: S108


def binaries() -> Path | None:
    """Where the server's programs are, the newest ones; None when there are none."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: int(one.parent.name))
    on_path = shutil.which("initdb")
    found = [*([Path(on_path).resolve().parent] if on_path else []), *places]
    return next((one for one in reversed(found) if (one / "postgres").exists()), None)


@dataclass
class Cluster:
    """One PostgreSQL server; `settings` are those of postgresql.conf."""

    directory: Path
    bin: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    port: int = 0

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://relay@127.0.0.1:{self.port}/{database}"

    def make_room(self) -> None:
        """A directory and a port of its own, unless it has one."""
        self.port = self.port or _free_port()
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            os.chown(self.directory, _owner().pw_uid, _owner().pw_gid)

    def create(self) -> None:
        self.make_room()
        self.run(
            "initdb", "-D", self.data, "-U", "relay", "--auth=trust", "--locale=C", "--encoding=UTF8", "-N"
        )

    def start(self) -> None:
        """Returns once it takes connections."""
        wanted = {**SETTINGS, "port": str(self.port), "unix_socket_directories": str(self.directory)}
        options = " ".join(f"-c {name}={value}" for name, value in {**wanted, **self.settings}.items())
        self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.directory / "log", "-o", options)

    def stop(self, mode: str = "immediate") -> None:
        self.run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def kill(self) -> None:
        """SIGKILL for the server and everything it started, as a crash would."""
        self.signal(signal.SIGSTOP)  # and so nobody is born meanwhile
        pids = self.signal(signal.SIGKILL)
        # As long as one of them is there, so is their memory, and no other server starts.
        deadline = time.monotonic() + 10
        while any(_lives(pid) for pid in pids):
            assert time.monotonic() < deadline, "the server does not die"
            time.sleep(0.01)
        # Where nobody buries the dead, their locks would be respected.
        for lock in (self.data / "postmaster.pid", self.directory / f".s.PGSQL.{self.port}.lock"):
            lock.unlink(missing_ok=True)

    def signal(self, number: signal.Signals) -> Sequence[int]:
        """For the server and everything it started; their ids."""
        main = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        pids = [main, *map(int, children)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    @property
    def is_running(self) -> bool:
        return (self.data / "postmaster.pid").exists()

    def query(self, sql: str, database: str = "postgres") -> str:
        """What one statement answers, unadorned."""
        return self.run("psql", *self._where, "-d", database, "-qXAt", "-c", sql).strip()

    def set(self, **settings: str) -> None:
        """Settings that a running server takes; none are those that it was started with."""
        self.query("ALTER SYSTEM RESET ALL")
        for name, value in settings.items():
            self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        self.query("SELECT pg_reload_conf()")

    @contextmanager
    def standby(self, *, port: int = 0) -> Iterator["Cluster"]:
        """A server that follows this one, and has what was committed here, until it is promoted; at a free
        port unless one is named."""
        directory = self.directory.with_name(f"standby-{uuid4().hex[:6]}")
        standby = Cluster(directory, self.bin, self.settings, port)
        standby.make_room()
        place = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "relay")
        standby.run("pg_basebackup", *place, "-D", standby.data, "-R", "-X", "stream", "-c", "fast")
        standby.start()
        self.set(synchronous_standby_names="*")
        try:
            yield standby
        finally:
            if standby.is_running:
                standby.stop()

    def promote(self) -> None:
        self.run("pg_ctl", "promote", "-w", "-D", self.data)

    def run(self, program: str, *arguments: str | Path) -> str:
        """One of the server's programs, as a user whom it lets run it."""
        command: Sequence[str | Path] = [self.bin / program, *arguments]
        with (self.directory / "output").open("w+") as output:
            done = subprocess.run(  # noqa: S603 # our own words
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                check=False,
                **_as_owner(),
            )
            output.seek(0)
            said = output.read()
        log = self.directory / "log"
        assert done.returncode == 0, f"{program}: {said} {log.read_text()[-2000:] if log.exists() else ''}"
        return said

    def database(self, template: str | None = TEMPLATE, *options: str) -> str:
        """The URL of a new database, migrated already when it is made of our own template."""
        name = f"t{uuid4().hex}"
        self.run("createdb", *self._where, *(["-T", template] if template else []), *options, name)
        return self.url(name)

    def drop(self, url: str) -> None:
        self.run("dropdb", *self._where, "--if-exists", "--force", url.rsplit("/", 1)[1])

    @property
    def _where(self) -> Sequence[str]:
        return ("-h", "127.0.0.1", "-p", str(self.port), "-U", "relay")

    def make_template(self) -> None:
        """What `database` copies: every migration applied, at time 0."""
        self.run("createdb", *self._where, TEMPLATE)
        asyncio.run(self._migrate())

    async def _migrate(self) -> None:
        database = await open_database(self.url(TEMPLATE))
        try:
            await migrate(database, now=0)
        finally:
            await database.close()


@contextmanager
def running_cluster(**settings: str) -> Iterator[Cluster]:
    """A new cluster, gone when the block ends."""
    found = binaries()
    assert found is not None, WHY_MISSING
    # Its sockets' paths must be short.
    with TemporaryDirectory(prefix="relay-pg-", dir=_place(), ignore_cleanup_errors=True) as directory:
        os.chmod(directory, 0o755)  # noqa: S103 # another user goes through it
        cluster = Cluster(Path(directory) / "cluster", found, settings)
        cluster.create()
        cluster.start()
        try:
            yield cluster
        finally:
            if cluster.is_running:
                cluster.stop()


@contextmanager
def pooler(cluster: Cluster, **settings: str) -> Iterator[int]:
    """The port of a PgBouncer in transaction mode before a cluster; `settings` are those of pgbouncer.ini."""
    program = pgbouncer()
    assert program is not None, WHY_NO_POOLER
    directory, port = cluster.directory / f"pooler-{uuid4().hex[:6]}", _free_port()
    directory.mkdir()
    wanted = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "trust",
        "auth_file": str(directory / "users"),
        "logfile": str(directory / "log"),
        "pool_mode": "transaction",
        "default_pool_size": "4",
        "server_login_retry": "1",
        **settings,
    }
    (directory / "users").write_text('"relay" ""\n')
    lines = ["[databases]", f"* = host=127.0.0.1 port={cluster.port}", "[pgbouncer]"]
    (directory / "ini").write_text(
        "\n".join([*lines, *(f"{key} = {value}" for key, value in wanted.items())])
    )
    if os.getuid() == 0:
        os.chown(directory, _owner().pw_uid, _owner().pw_gid)
    with (directory / "output").open("w+") as output:
        process = subprocess.Popen(  # noqa: S603 # our own words
            [program, directory / "ini"], stdout=output, stderr=subprocess.STDOUT, **_as_owner()
        )
    try:
        _wait_for_port(port)
        yield port
    finally:
        process.kill()
        process.wait()


def pgbouncer() -> Path | None:
    """Where PgBouncer's program is; None when there is none."""
    found = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    return Path(found) if found else None


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _free_port() -> int:
    with listener() as bound:
        return int(origin_of(bound).rsplit(":", 1)[1])


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.01)
        else:
            return


def _as_owner() -> dict[str, int]:
    return {"user": _owner().pw_uid, "group": _owner().pw_gid} if os.getuid() == 0 else {}


def _place() -> Path | None:
    """Where its files are: in memory, when there is enough of it."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH else None


def _owner() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
