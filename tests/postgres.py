"""A PostgreSQL of the tests' own: a temporary cluster, if the server's programs are there."""

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
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

    def create(self) -> None:
        with listener() as bound:
            self.port = int(origin_of(bound).rsplit(":", 1)[1])
        self.directory.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            os.chown(self.directory, _owner().pw_uid, _owner().pw_gid)
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
        main = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        for pid in (main, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def run(self, program: str, *arguments: str | Path) -> str:
        """One of the server's programs, as a user whom it lets run it."""
        as_owner = {"user": _owner().pw_uid, "group": _owner().pw_gid} if os.getuid() == 0 else {}
        command: Sequence[str | Path] = [self.bin / program, *arguments]
        with (self.directory / "output").open("w+") as output:
            done = subprocess.run(  # noqa: S603 # our own words
                command, stdout=output, stderr=subprocess.STDOUT, cwd=self.directory, check=False, **as_owner
            )
            output.seek(0)
            said = output.read()
        assert done.returncode == 0, f"{program}: {said}"
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
            cluster.stop()


def _place() -> Path | None:
    """Where its files are: in memory, when there is enough of it."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH else None


def _owner() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
