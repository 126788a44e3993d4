"""Check the signature of what a webhook brought."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from relay import signature
from relay.console import err, out

commands = typer.Typer()


@commands.command()
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
