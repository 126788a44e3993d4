"""Commands that work on the database of the configuration; all but `copy` also beside running relays."""

import json
import re
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import uvloop
from rich import progress as bar
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from relay import signature
from relay.app import PATIENCE, wall_clock
from relay.check import check as findings
from relay.config import load_config
from relay.console import PLAIN, complain, err, out
from relay.copy import Progress, database_name
from relay.copy import copy as copy_database
from relay.errors import ConfigError, Conflict, CopyFailed
from relay.key import Key, Scope, hash_of, id_of, new_key
from relay.keyring import KeyRing
from relay.limit import LOWEST_RATE
from relay.rekey import Rekeyed
from relay.rekey import rekey as rekey_database
from relay.store import Store, open_database, store_on
from relay.store.audit import Entry
from relay.store.backup import backup as copy_file
from relay.store.migrate import migrate as migrate_database
from relay.store.tables import check_whole
from relay.tenant import DEFAULT, NAME
from relay.times import parse_duration, parse_rfc3339, rfc3339
from relay.web.resources import KeyResource, KeyWithText

T = TypeVar("T")
commands, keys = typer.Typer(), typer.Typer(no_args_is_help=True)
commands.add_typer(keys, name="keys", help="Who may use the API: on the database, also of a running relay.")

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="Default: $RELAY_CONFIG, else config.yaml.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_VERDICTS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]", "failed": "[red]failed [/]"}
_USUAL = (Scope.READ, Scope.WRITE, Scope.REPLAY)


@commands.command()
def check(config: Config = None) -> None:
    """Say what is wrong with the configuration, the database, the clock or a credential."""
    settings = load_config(config)

    async def show() -> bool:
        failed = False
        async for one in findings(settings):
            failed |= one.verdict == "failed"
            line = f"{_VERDICTS[one.verdict]} {escape(one.subject)}: {escape(one.message)}"
            out.print(line, **PLAIN)
        return failed

    raise typer.Exit(1 if uvloop.run(show()) else 0)


@commands.command()
def migrate(config: Config = None) -> None:
    """Bring the database up to date; `serve` does this too."""
    settings = load_config(config)

    async def bring() -> list[str]:
        database = await open_database(settings.database, patience=PATIENCE)
        try:
            return await migrate_database(database, now=wall_clock())
        finally:
            await database.close()

    applied = uvloop.run(bring())
    out.print("\n".join(applied) if applied else "up to date")


@commands.command()
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
            counts = uvloop.run(copy_database(source, target, now=wall_clock, show=show))
    except CopyFailed as error:
        complain(str(error))
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
        **PLAIN,
    )


class _Rate(bar.ProgressColumn):
    def render(self, task: bar.Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} rows/s")


@keys.command("create")
def create_key(
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose it is; a new one is made.")] = DEFAULT,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="read, write, replay, admin; default: read,write,replay."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="30d, or 2027-01-01T00:00:00Z.")] = None,
    rate_limit: Annotated[float | None, typer.Option(help="Requests a second, at most.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key; it alone is printed to standard output, and shown only now."""
    now = wall_clock()
    if not re.fullmatch(NAME, tenant):
        raise typer.BadParameter("write lower-case letters, digits, - and _", param_hint="--tenant")
    if rate_limit is not None and not LOWEST_RATE <= rate_limit <= 10_000:
        raise typer.BadParameter("must be from 0.001 to 10000", param_hint="--rate-limit")
    key_id, text = new_key(now)
    key = Key(
        id=key_id,
        tenant=tenant,
        name=name,
        scopes=_scopes(scopes),
        hash=hash_of(text),
        created_at=now,
        expires_at=_expiry(expires, now),
        rate_limit=rate_limit,
    )

    async def create(store: Store) -> None:
        await store.tenants.found(tenant, signature.new_secret(), now=now)
        await store.keys.create(key, entry=Entry(tenant, now, "cli", "key.created", key_id))

    try:
        _with_store(config, create)
    except Conflict as error:
        complain(str(error))
        raise typer.Exit(1) from error
    if as_json:
        out.print_json(KeyWithText.of(key, text).model_dump_json())
        return
    until = f"until {rfc3339(key.expires_at)}" if key.expires_at is not None else "until it is revoked"
    err.print(
        f"{key_id} of tenant {tenant}: {', '.join(key.scopes)}, {until}. It is shown only now:", **PLAIN
    )
    typer.echo(text)


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this one's; default: everybody's.")] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List API keys, the newest first; never the keys themselves."""

    async def read(store: Store) -> Sequence[Key]:
        return await store.keys.all(tenant)

    found = [KeyResource.of(key).model_dump(mode="json") for key in _with_store(config, read)]
    if as_json:
        out.print_json(json.dumps({"data": found, "next_cursor": None}))
        return
    names = ("id", "tenant", "name", "scopes", "created_at", "expires_at", "revoked_at", "last_used_at")
    table = Table(*(Column(name, no_wrap=name == "id", overflow="fold") for name in names))
    for one in found:
        table.add_row(*(_cell(one[name]) for name in names))
    out.print(table)


@keys.command("revoke")
def revoke_key(
    id_: Annotated[str, typer.Argument(metavar="ID", help="key_…, or the whole key.")],
    config: Config = None,
) -> None:
    """Revoke an API key: the next request with it is refused."""
    now, key_id = wall_clock(), id_of(id_) or id_

    async def revoke(store: Store) -> bool:
        key = await store.keys.find(key_id)
        if key is None:
            return False
        entry = Entry(key.tenant, now, "cli", "key.revoked", key_id)
        return await store.keys.revoke(key.tenant, key_id, now=now, entry=entry)

    if not _with_store(config, revoke):
        err.print(f"[red]there is no key {escape(key_id)}: `relay keys list` shows them[/]", **PLAIN)
        raise typer.Exit(1)
    err.print(f"{escape(key_id)} is revoked", **PLAIN)


@commands.command()
def rekey(config: Config = None) -> None:
    """Seal the secrets in the database with the newest secret_key; relays may run meanwhile."""
    bars = bar.Progress(
        bar.TextColumn("{task.description}"), bar.TextColumn("{task.completed:,} rows"), console=err
    )
    tasks: dict[str, bar.TaskID] = {}

    def show(table: str, rows: int) -> None:
        if table not in tasks:
            tasks[table] = bars.add_task(table, total=None)
        bars.update(tasks[table], completed=rows)

    async def seal(store: Store) -> Rekeyed:
        entry = Entry(DEFAULT, wall_clock(), "cli", "secrets.rekeyed", store.sealed.newest)
        await store.audit.add(entry)
        return await rekey_database(store.sealed, show=show)

    with bars:
        done = _with_store(config, seal)
    complaints = [f"{where} cannot be opened: it was changed in the database" for where in done.broken]
    if done.left:
        complaints.append(
            f"{done.left} secrets were sealed with an older key meanwhile: restart every relay with the new"
            " secret_key, then run this again"
        )
    if complaints:
        complain("\n".join(complaints))
        raise typer.Exit(1)
    out.print("Every secret is sealed with the newest secret_key.")


@commands.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; none is overwritten.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Copy the SQLite database to a file, checked; a relay may run on it meanwhile."""
    url = load_config(config).database
    if not url.startswith("sqlite:///"):
        raise ConfigError("database: is no SQLite file: PostgreSQL has pg_dump for this (docs/operating.md)")
    # Killed at any moment it leaves no file of this name.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = (bar.TextColumn("{task.description}"), bar.BarColumn(), bar.TimeRemainingColumn())
    with bar.Progress(*columns, console=err, disable=as_json or not err.is_terminal) as bars:
        task = bars.add_task("copying", total=None)

        def show(done: int, total: int) -> None:
            # What is left after the last page is to read it all again.
            doing = "copying" if done < total else "checking"
            bars.update(task, description=doing, completed=done, total=total)

        began = time.monotonic()
        try:
            size = copy_file(Path(url.removeprefix("sqlite:///")), target, show=show)
        except CopyFailed as error:
            complain(str(error))
            raise typer.Exit(1) from error
    if as_json:
        seconds = round(time.monotonic() - began, 1)
        out.print_json(json.dumps({"file": str(target), "bytes": size, "seconds": seconds}))
        return
    out.print(f"{escape(str(target))}: {decimal(size)}, whole and checked.", **PLAIN)


def _with_store(config: Path | None, work: Callable[[Store], Awaitable[T]]) -> T:
    """What `work` makes of the store of the configuration, brought up to date. Raises ConfigError."""

    async def run() -> T:
        settings = load_config(config)
        database = await open_database(settings.database, alone=False, patience=PATIENCE)
        try:
            await migrate_database(database, now=wall_clock())
            await check_whole(database)
            store = store_on(database, KeyRing(settings.secret_keys))
            await store.sealed.check()
            return await work(store)
        finally:
            await database.close()

    return uvloop.run(run())


def _scopes(given: Sequence[str] | None) -> Sequence[Scope]:
    named = {name.strip() for one in given or () for name in one.split(",")}
    unknown = named - set(Scope)
    if unknown:
        message = f"there is no {', '.join(sorted(unknown)) or 'such one'}: write read, write, replay, admin"
        raise typer.BadParameter(message, param_hint="--scope")
    return [scope for scope in Scope if scope in named] or _USUAL


def _expiry(given: str | None, now: int) -> int | None:
    if given is None:
        return None
    at = parse_rfc3339(given)
    if at is None:
        try:
            at = now + parse_duration(given)
        except ValueError as error:
            message = "write a duration (30d) or a time (2027-01-01T00:00:00Z)"
            raise typer.BadParameter(message, param_hint="--expires") from error
    if at <= now:
        raise typer.BadParameter("must be in the future", param_hint="--expires")
    return at


def _cell(value: Any) -> str:
    return escape(", ".join(value) if isinstance(value, list) else str(value)) if value is not None else "–"
