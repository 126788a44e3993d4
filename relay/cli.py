"""The command line. Exit codes: 0 done, 1 the thing failed, 2 usage or configuration."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich import progress as bar
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from relay import __version__, signature
from relay.app import PATIENCE, wall_clock
from relay.app import serve as serve_relay
from relay.check import check as findings
from relay.config import load_config
from relay.copy import Progress, database_name
from relay.copy import copy as copy_database
from relay.demo import demo as run_demo
from relay.doctor import doctor
from relay.errors import ConfigError, CopyFailed, StoreError
from relay.listen import listen
from relay.local import Config, backup, keys, rekey
from relay.logs import set_up
from relay.redact import Redactor
from relay.remote import accounts, deliveries, endpoints, generations, replay, replays, track
from relay.server import Server, bind, origin
from relay.simulator import Simulator
from relay.store import open_database
from relay.store.migrate import migrate as migrate_database

app = typer.Typer(
    name="relay",
    help="Watches AI generation jobs and tells your services when each one ends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(doctor)
app.command()(track)
app.command()(replay)
app.command()(listen)
app.command()(rekey)
app.command()(backup)
app.add_typer(keys, name="keys", help="Who may use the API: on the database, also of a running relay.")
app.add_typer(generations, name="generations", help="The jobs that are watched.")
app.add_typer(endpoints, name="endpoints", help="The URLs that are told.")
app.add_typer(deliveries, name="deliveries", help="What was told, attempt by attempt.")
app.add_typer(replays, name="replays", help="What was, and is, replayed in bulk.")
app.add_typer(accounts, name="accounts", help="The credentials at providers.")
out, err = Console(), Console(stderr=True)

_VERDICTS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}


def main() -> None:
    """The entry point of `relay`."""
    try:
        app()
    except (ConfigError, StoreError) as error:
        _complain(str(error))
        sys.exit(2)


def _complain(message: str) -> None:
    for line in message.splitlines():
        err.print(f"[red]relay:[/] {escape(line)}", highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def about(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show it.")] = False
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def serve(config: Config = None) -> None:
    """Run the relay until SIGTERM or Ctrl-C."""
    settings = load_config(config)
    redactor = Redactor(*settings.secrets, os.environ.get("PGPASSWORD", ""))
    set_up(settings.log_level, redactor)
    try:
        _run(serve_relay(settings, show_key=_show_key, redactor=redactor))
    except (ConfigError, StoreError) as error:
        _complain(redactor(str(error)))
        raise typer.Exit(2) from None


@app.command()
def demo() -> None:
    """Relay, simulated providers and a subscriber on this machine: no key, no configuration."""
    raise typer.Exit(0 if _run(run_demo(out)) else 1)


@app.command()
def check(config: Config = None) -> None:
    """Say what is wrong with the configuration, the database, the clock or a credential."""
    settings = load_config(config)

    async def show() -> bool:
        failed = False
        async for one in findings(settings):
            failed |= one.verdict == "failed"
            line = f"{_VERDICTS[one.verdict]} {escape(one.subject)}: {escape(one.message)}"
            out.print(line, highlight=False, soft_wrap=True)
        return failed

    raise typer.Exit(1 if _run(show()) else 0)


@app.command()
def migrate(config: Config = None) -> None:
    """Bring the database up to date; `serve` does this too."""
    settings = load_config(config)

    async def bring() -> list[str]:
        database = await open_database(settings.database, patience=PATIENCE)
        try:
            return await migrate_database(database, now=wall_clock())
        finally:
            await database.close()

    applied = _run(bring())
    out.print("\n".join(applied) if applied else "up to date")


@app.command()
def copy(
    source: Annotated[
        str, typer.Option("--from", help="The database of a relay that is stopped; it stays as it is.")
    ],
    target: Annotated[str, typer.Option("--to", help="An empty database.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Copy all that a relay remembers to another database; after an interruption, run it again to go on."""
    # Killed at any moment it goes on later: there is nothing to tidy, and it has not ended well.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    began = time.monotonic()
    columns = (
        *(bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn()),
        *(_Rate(), bar.TimeRemainingColumn()),
    )
    bars = bar.Progress(*columns, console=err, disable=as_json or not err.is_terminal)
    tasks: dict[str, bar.TaskID] = {}

    def show(progress: Progress) -> None:
        doing = progress.doing
        if doing not in tasks:
            # What was there before is no sign of speed.
            tasks[doing] = bars.add_task(doing, total=progress.total, completed=progress.done)
        bars.update(tasks[doing], completed=progress.done, description=f"{doing} {progress.table}")

    try:
        with bars:
            counts = _run(copy_database(source, target, now=wall_clock, show=show))
    except CopyFailed as error:
        err.print(f"[red]relay:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if as_json:
        out.print_json(json.dumps({"tables": counts, "seconds": round(time.monotonic() - began, 1)}))
        return
    table = Table("table", Column("rows", justify="right"))
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    out.print(table)
    out.print(
        f"Both databases hold the same. Now set `database:` in the configuration to"
        f" {escape(database_name(target))} and start the relay; none may run on the old one any more.",
        highlight=False,
        soft_wrap=True,
    )


class _Rate(bar.ProgressColumn):
    def render(self, task: bar.Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} rows/s")


@app.command()
def simulate(
    port: Annotated[int, typer.Option(help="0 means any free one.")] = 8090,
    host: str = "127.0.0.1",
    median: Annotated[float, typer.Option(help="Seconds that half of the jobs take at most.")] = 12.0,
    seed: int | None = None,
) -> None:
    """Simulate the four providers' APIs over HTTP, for trying things out and for tests."""
    simulator = Simulator(seed=seed, median=median)
    bound = bind(host, port)
    for name, url in Simulator.base_urls(origin(bound)).items():
        line = f"{name}: base_url: {url}  api_key: {simulator.keys[name]}"
        out.print(line, highlight=False, soft_wrap=True)

    async def run() -> None:
        server = Server(simulator.app)
        server.stop_on_signals()
        await server.serve(sockets=[bound])

    _run(run())


@app.command()
def verify(
    body: Annotated[
        Path, typer.Argument(help="A file with the body as it was received; - is standard input.")
    ],
    secret: Annotated[str, typer.Option(envvar="RELAY_WEBHOOK_SECRET", help="whsec_…")],
    id_: Annotated[str, typer.Option("--id", help="The webhook-id header.")],
    timestamp: Annotated[str, typer.Option(help="The webhook-timestamp header.")],
    signatures: Annotated[str, typer.Option("--signature", help="The webhook-signature header.")],
    any_age: Annotated[bool, typer.Option("--any-age", help="Do not mind how old it is.")] = False,
) -> None:
    """Check the signature of a received webhook."""
    try:
        received = sys.stdin.buffer.read() if str(body) == "-" else body.read_bytes()
    except OSError as error:
        err.print(f"[red]{escape(str(body))} cannot be read: {error.strerror}[/]")
        raise typer.Exit(2) from error
    try:
        now = int(timestamp) if any_age and timestamp.isdigit() else int(time.time())
        signature.verify(secret, id_, timestamp, signatures, received, now=now)
    except signature.BadSignature as error:
        err.print(f"[red]not valid:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    except ValueError as error:
        err.print(f"[red]--secret[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    out.print("[green]valid[/]")


def _show_key(key: str) -> None:
    message = (
        f"[bold]Your admin key, shown only now:[/] {key}\n(set admin_key in the configuration to choose it)"
    )
    err.print(message, highlight=False, soft_wrap=True)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)
