"""The command line. Exit codes: 0 done, 1 the thing failed, 2 usage or configuration."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Annotated

import typer

from relay import __version__
from relay.console import complain, out
from relay.errors import ConfigError, StoreError

app = typer.Typer(
    name="relay",
    help="Watches AI generation jobs and tells your services when each one ends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Which module has which commands. Of those that are not asked for none is imported: most need no server, and
# begin in a third of the time.
MODULES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "relay.run": ("serve", "demo", "simulate"),
        "relay.local": ("check", "migrate", "copy", "backup", "rekey", "keys"),
        "relay.remote": ("track", "replay", "generations", "endpoints", "deliveries", "replays", "accounts"),
        "relay.listen": ("listen",),
        "relay.doctor": ("doctor",),
        "relay.verify": ("verify",),
    }
)


def main() -> None:
    """The entry point of `relay`."""
    asked = [module for module, commands in MODULES.items() if {*sys.argv[1:2]} & {*commands}]
    for module in asked or MODULES:
        app.add_typer(import_module(module).commands)
    try:
        app()
    except (ConfigError, StoreError) as error:
        complain(str(error))
        sys.exit(2 if isinstance(error, ConfigError) else 1)


@app.callback(invoke_without_command=True)
def about(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show it.")] = False
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit
