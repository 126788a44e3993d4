"""Commands that run until they are ended."""

import os
from typing import Annotated

import typer
import uvloop

from relay.app import serve as serve_relay
from relay.config import load_config
from relay.console import PLAIN, complain, err, out
from relay.demo import demo as run_demo
from relay.errors import ConfigError, StoreError
from relay.local import Config
from relay.logs import set_up
from relay.redact import Redactor
from relay.server import Server, bind, origin
from relay.simulator import Simulator

commands = typer.Typer()


@commands.command()
def serve(config: Config = None) -> None:
    """Run the relay until SIGTERM or Ctrl-C."""
    settings = load_config(config)
    redactor = Redactor(*settings.secrets, os.environ.get("PGPASSWORD", ""))
    set_up(settings.log_level, redactor)
    try:
        uvloop.run(serve_relay(settings, show_key=_show_key, redactor=redactor))
    except (ConfigError, StoreError) as error:
        complain(redactor(str(error)))
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


@commands.command()
def demo() -> None:
    """Relay, simulated providers and a subscriber on this machine: no key, no configuration."""
    raise typer.Exit(0 if uvloop.run(run_demo(out)) else 1)


@commands.command()
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
        out.print(line, **PLAIN)

    async def run() -> None:
        server = Server(simulator.app)
        server.stop_on_signals()
        await server.serve(sockets=[bound])

    uvloop.run(run())


def _show_key(key: str) -> None:
    message = (
        f"[bold]Your admin key, shown only now:[/] {key}\n(set admin_key in the configuration to choose it)"
    )
    err.print(message, **PLAIN)
