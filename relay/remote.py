"""Commands that ask a running relay over its API. `--json` prints what the API answered."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self
from urllib.parse import quote

import httpx
import typer
from rich import progress as bar
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from relay.console import PLAIN, err, out
from relay.times import parse_duration, rfc3339

commands = typer.Typer()
generations = typer.Typer(no_args_is_help=True)
endpoints = typer.Typer(no_args_is_help=True)
deliveries = typer.Typer(no_args_is_help=True)
replays = typer.Typer(no_args_is_help=True)
accounts = typer.Typer(no_args_is_help=True)
commands.add_typer(generations, name="generations", help="The jobs that are watched.")
commands.add_typer(endpoints, name="endpoints", help="The URLs that are told.")
commands.add_typer(deliveries, name="deliveries", help="What was told, attempt by attempt.")
commands.add_typer(replays, name="replays", help="What was, and is, replayed in bulk.")
commands.add_typer(accounts, name="accounts", help="The credentials at providers.")


def part(text: str) -> str:
    """Of a path, whatever is in it."""
    if text in ("", ".", ".."):
        raise typer.BadParameter("must be an id")
    return quote(text, safe="")


def _instant(text: str) -> str:
    """A time as the API takes it, of one or of how long ago it was."""
    try:
        return rfc3339(time.time_ns() // 1_000_000 - parse_duration(text))
    except ValueError:
        if text[:4].isdigit() and "-" in text:
            return text
        raise typer.BadParameter(
            f"{text!r} is neither a time (2026-03-16T14:30:00Z) nor how long ago (30m, 24h, 7d)"
        ) from None


Url = Annotated[str, typer.Option("--url", envvar="RELAY_URL", help="The relay to talk to.")]
Key = Annotated[
    str, typer.Option("--api-key", envvar="RELAY_API_KEY", help="Your API key.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
Instant = Annotated[
    str | None,
    typer.Option(parser=_instant, metavar="TIME", help="2026-03-16T14:30:00Z or, that long ago, 24h."),
]
Id = Annotated[str, typer.Argument(parser=part, metavar="ID")]
Limit = Annotated[int, typer.Option(help="How many at most.", min=1, max=200)]
Filter = Annotated[str | None, typer.Option()]
HERE = "http://127.0.0.1:8080"
_LOOK_AGAIN = 0.3
# Seconds that one request waits for an end, and that a relay which does not answer is waited for.
WAIT, PATIENCE = 30.0, 60.0
COLORS = {
    **dict.fromkeys(("completed", "delivered", "enabled", "ok"), "green"),
    **dict.fromkeys(("failed", "timed_out", "disabled", "failing", "unauthorized"), "red"),
    **dict.fromkeys(("queued", "pending", "sending", "processing", "running"), "yellow"),
}


class Refused(Exception):
    """What a relay did not do, and why; `status` is None where it did not answer at all."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status

    @classmethod
    def of(cls, answer: httpx.Response) -> Self:
        try:
            problem = answer.json()
            details = [f"{one['field']}: {one['message']}" for one in problem.get("errors", [])]
            said = "\n".join(details or [str(problem["detail"])])
        except (ValueError, KeyError, TypeError, AttributeError):
            said = f"answered {answer.status_code}; is this a relay?"
        return cls(said, answer.status_code)

    @property
    def may_pass(self) -> bool:
        """Whether the same may be taken a moment later: by a relay that was just starting, say."""
        return self.status is None or self.status in (429, 502, 503, 504)

    def shown(self) -> typer.Exit:
        """The end of the command, after it was said why."""
        err.print(f"[red]{escape(str(self))}[/]", **PLAIN)
        return typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Remote:
    """A relay's API. What it refuses is shown, and ends the command with 1."""

    url: str
    key: str

    def call(
        self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> Any:
        """The JSON of the answer."""
        try:
            return self.ask(method, path, query=query, body=body)
        except Refused as error:
            raise error.shown() from error

    def list(self, path: str, query: Mapping[str, Any]) -> Any:
        """A page of a list with all of its `limit`: where things are large a relay's own pages end early."""
        page = self.call("GET", path, query=query)
        while page.get("next_cursor") and len(page["data"]) < query["limit"]:
            left = {"limit": query["limit"] - len(page["data"]), "cursor": page["next_cursor"]}
            rest = self.call("GET", path, query={**query, **left})
            page = {**rest, "data": page["data"] + rest["data"]}
        return page

    def ask(self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None) -> Any:
        """The same. Raises Refused, for who has something better to do than to end."""
        answer = self.send(method, path, query=query, body=body)
        if not answer.is_success:
            raise Refused.of(answer)
        try:
            said = answer.json() if answer.content else {}
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Refused(
                f"{self.url} answered {answer.status_code}, but not as a relay does", answer.status_code
            )
        return said

    def send(
        self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> httpx.Response:
        """The answer, also when it refuses. Raises Refused when there is none."""
        if not self.key.strip():
            raise typer.BadParameter(
                "is needed, or RELAY_API_KEY: `relay keys create` makes one", param_hint="--api-key"
            )
        given = {name: value for name, value in (query or {}).items() if value is not None}
        headers = {"authorization": f"Bearer {self.key}"}
        try:
            # Waiting answers take as long as they were told to, and a little.
            return httpx.request(
                method,
                self.url.rstrip("/") + path,
                params=given,
                json=body,
                headers=headers,
                timeout=330,
                trust_env=False,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refused(f"{self.url} cannot be reached: {error}") from error


@commands.command()
def track(
    account: str,
    job_id: Annotated[
        str | None, typer.Argument(help="May be left out where the provider calls back.")
    ] = None,
    callback_url: Annotated[str | None, typer.Option(help="Tell this URL too.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when it has ended; 1 unless completed.")
    ] = False,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Watch a job at one of the accounts."""
    remote = Remote(url, api_key)
    body = {"account": account, "job_id": job_id, "callback_url": callback_url}
    generation = remote.call(
        "POST", "/v1/generations", body={name: value for name, value in body.items() if value is not None}
    )
    if wait:
        if not as_json:
            out.print(f"watching {generation['id']} …", highlight=False)
        generation = _waited(remote, generation, until=None)
    _show(generation, as_json)
    if wait and generation["status"] != "completed":
        raise typer.Exit(1)


@generations.command("list")
def list_generations(
    account: Filter = None,
    provider: Filter = None,
    job_id: Filter = None,
    status: Filter = None,
    since: Instant = None,
    until: Instant = None,
    limit: Limit = 50,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """List generations, the newest first."""
    query = {
        "account": account,
        "provider": provider,
        "job_id": job_id,
        "status": status,
        "since": since,
        "until": until,
        "limit": limit,
    }
    page = Remote(url, api_key).list("/v1/generations", query)
    _table(page, ("id", "account", "job_id", "status", "watched_at", "duration_ms"), as_json)


@generations.command("show")
def show_generation(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Show a generation."""
    _show(Remote(url, api_key).call("GET", f"/v1/generations/{id_}"), as_json)


@generations.command("wait")
def wait_for_generations(
    ids: Annotated[list[str], typer.Argument(parser=part, metavar="ID", help="One or several.")],
    timeout: Annotated[float | None, typer.Option(help="Seconds; for ever without it.", min=0)] = None,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Return when all of them have ended; 1 unless all were completed, in time."""
    remote = Remote(url, api_key)
    until = None if timeout is None else time.monotonic() + timeout
    # All are there before any is waited for.
    found = [remote.call("GET", f"/v1/generations/{id_}") for id_ in ids]
    found = [_waited(remote, one, until=until) for one in found]
    _table(
        {"data": found, "next_cursor": None}, ("id", "account", "job_id", "status", "duration_ms"), as_json
    )
    if any(one["status"] != "completed" for one in found):
        raise typer.Exit(1)


@generations.command("refresh")
def refresh_generation(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Ask the provider now."""
    _show(Remote(url, api_key).call("POST", f"/v1/generations/{id_}/refresh"), as_json)


@endpoints.command("add")
def add_endpoint(
    endpoint_url: str,
    description: Annotated[str | None, typer.Option()] = None,
    event_type: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    account: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="A JMESPath expression over the body.")
    ] = None,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Register a URL; its secret is shown."""
    body = {
        "url": endpoint_url,
        "description": description,
        "event_types": event_type or None,
        "accounts": account or None,
        "filter": filter_,
    }
    _show(Remote(url, api_key).call("POST", "/v1/endpoints", body=body), as_json)


@endpoints.command("list")
def list_endpoints(limit: Limit = 50, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """List endpoints, the newest first."""
    page = Remote(url, api_key).list("/v1/endpoints", {"limit": limit})
    _table(page, ("id", "url", "status", "event_types", "accounts", "created_at"), as_json)


@endpoints.command("show")
def show_endpoint(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Show an endpoint."""
    _show(Remote(url, api_key).call("GET", f"/v1/endpoints/{id_}"), as_json)


@endpoints.command("test")
def test_endpoint(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Send endpoint.test and say how it went; 1 unless it was delivered."""
    remote = Remote(url, api_key)
    delivery = remote.call("POST", f"/v1/endpoints/{id_}/test")
    delivery = _ended(remote, delivery["id"])
    _show(delivery, as_json)
    if delivery["status"] != "delivered":
        raise typer.Exit(1)


@endpoints.command("enable")
def enable_endpoint(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Enable an endpoint."""
    _show(Remote(url, api_key).call("POST", f"/v1/endpoints/{id_}/enable"), as_json)


@endpoints.command("disable")
def disable_endpoint(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Disable an endpoint; its open deliveries are canceled."""
    _show(Remote(url, api_key).call("POST", f"/v1/endpoints/{id_}/disable"), as_json)


@endpoints.command("rotate-secret")
def rotate_secret(
    id_: Id,
    overlap_seconds: Annotated[int, typer.Option(help="How long the old secret signs too.")] = 86_400,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Give an endpoint a new secret."""
    body = {"overlap_seconds": overlap_seconds}
    _show(Remote(url, api_key).call("POST", f"/v1/endpoints/{id_}/secret/rotate", body=body), as_json)


@endpoints.command("delete")
def delete_endpoint(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Delete an endpoint; its open deliveries are canceled."""
    _show(Remote(url, api_key).call("DELETE", f"/v1/endpoints/{id_}") or {"deleted": id_}, as_json)


@deliveries.command("list")
def list_deliveries(
    status: Filter = None,
    endpoint_id: Annotated[str | None, typer.Option("--endpoint")] = None,
    event_id: Annotated[str | None, typer.Option("--event")] = None,
    generation_id: Annotated[str | None, typer.Option("--generation")] = None,
    event_type: Filter = None,
    since: Instant = None,
    until: Instant = None,
    limit: Limit = 50,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """List deliveries, the newest first."""
    query = {
        "status": status,
        "endpoint_id": endpoint_id,
        "event_id": event_id,
        "generation_id": generation_id,
        "event_type": event_type,
        "since": since,
        "until": until,
        "limit": limit,
    }
    page = Remote(url, api_key).list("/v1/deliveries", query)
    _table(page, ("id", "event_type", "url", "status", "attempt_count", "updated_at"), as_json)


@deliveries.command("show")
def show_delivery(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Show a delivery and its attempts."""
    _show(Remote(url, api_key).call("GET", f"/v1/deliveries/{id_}"), as_json)


@deliveries.command("replay")
def replay_delivery(
    id_: Id,
    wait: Annotated[
        bool, typer.Option("--wait", help="Say how the next attempt went; 1 unless delivered.")
    ] = False,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Make a finished delivery pending again."""
    remote = Remote(url, api_key)
    delivery = remote.call("POST", f"/v1/deliveries/{id_}/replay")
    if wait:
        delivery = _ended(remote, id_, after=delivery["attempt_count"])
    _show(delivery, as_json)
    if wait and delivery["status"] != "delivered":
        raise typer.Exit(1)


@commands.command()
def replay(
    since: Instant = None,
    until: Instant = None,
    endpoint_id: Annotated[str | None, typer.Option("--endpoint", help="Default: all of them.")] = None,
    generation_id: Annotated[str | None, typer.Option("--generation")] = None,
    account: Filter = None,
    event_type: Filter = None,
    status: Annotated[
        str, typer.Option(help="failed, missing (wanted, but never sent there) or all.")
    ] = "failed",
    rate_limit: Annotated[float | None, typer.Option(help="How many a second, for each endpoint.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    wait: Annotated[bool, typer.Option(help="Return when it has ended; 1 unless completed.")] = True,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Replay many deliveries: what failed, what is missing, or all; since when, or of which generation."""
    body = {
        "since": since,
        "until": until,
        "endpoint_id": endpoint_id,
        "generation_id": generation_id,
        "account": account,
        "event_type": event_type,
        "status": status,
        "rate_limit": rate_limit,
        "dry_run": dry_run,
    }
    remote = Remote(url, api_key)
    given = {name: value for name, value in body.items() if value is not None}
    made = remote.call("POST", "/v1/replays", body=given)
    if dry_run:
        _show(made, as_json)
        return
    if wait:
        made = _followed(remote, made, quietly=as_json)
    _show(made, as_json)
    if wait and made["status"] != "completed":
        raise typer.Exit(1)


@replays.command("list")
def list_replays(
    status: Filter = None,
    endpoint_id: Annotated[str | None, typer.Option("--endpoint")] = None,
    limit: Limit = 50,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """List replays, the newest first."""
    query = {"status": status, "endpoint_id": endpoint_id, "limit": limit}
    page = Remote(url, api_key).list("/v1/replays", query)
    _table(page, ("id", "deliveries", "endpoint_id", "status", "done", "total", "created_at"), as_json)


@replays.command("show")
def show_replay(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Show how far a replay has come."""
    _show(Remote(url, api_key).call("GET", f"/v1/replays/{id_}"), as_json)


@replays.command("cancel")
def cancel_replay(id_: Id, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """Cancel a replay; what it has made pending goes on."""
    _show(Remote(url, api_key).call("DELETE", f"/v1/replays/{id_}") or {"canceled": id_}, as_json)


@accounts.command("add")
def add_account(
    name: str,
    provider: Annotated[str, typer.Option(help="pixellabs, vivix, pictory or luma.")],
    credential: Annotated[
        str,
        typer.Option(
            envvar="RELAY_CREDENTIAL",
            prompt="The provider's API key",
            hide_input=True,
            help="The provider's API key. As an option it can be read by others on this machine.",
        ),
    ],
    webhook_secret: Annotated[
        str | None,
        typer.Option(
            envvar="RELAY_CREDENTIAL_WEBHOOK_SECRET", help="Of a provider that signs its callbacks."
        ),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="With the API's version prefix.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
    requests_per_day: Annotated[int | None, typer.Option()] = None,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Add an account of your own; its credential is never shown again."""
    body = {
        "name": name,
        "provider": provider,
        "api_key": credential,
        "webhook_secret": webhook_secret,
        "base_url": base_url,
        "requests_per_minute": requests_per_minute,
        "requests_per_day": requests_per_day,
    }
    _show(Remote(url, api_key).call("POST", "/v1/accounts", body=body), as_json)


@accounts.command("list")
def list_accounts(limit: Limit = 50, url: Url = HERE, api_key: Key = "", as_json: AsJson = False) -> None:
    """List the accounts that you have, and how they are."""
    page = Remote(url, api_key).list("/v1/accounts", {"limit": limit})
    _table(page, ("name", "provider", "status", "configured", "base_url", "last_error"), as_json)


@accounts.command("delete")
def delete_account(
    name: Annotated[str, typer.Argument(parser=part)],
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Delete an account that was added; none of its generations may be open."""
    _show(Remote(url, api_key).call("DELETE", f"/v1/accounts/{name}") or {"deleted": name}, as_json)


def _waited(remote: Remote, generation: Any, *, until: float | None) -> Any:
    """The generation once it has ended, or as it is at that time (`time.monotonic`) or now; a relay that is
    being replaced is waited for, too."""
    patience = time.monotonic() + PATIENCE
    while generation["completed_at"] is None:
        left = WAIT if until is None else max(0.0, min(WAIT, until - time.monotonic()))
        try:
            path = f"/v1/generations/{generation['id']}/wait"
            asked_at = time.monotonic()
            generation = remote.ask("GET", path, query={"timeout": left})
            patience = time.monotonic() + PATIENCE
            # One that is about to stop answers at once.
            is_early = time.monotonic() - asked_at < min(1.0, left)
        except Refused as error:
            if not error.may_pass or time.monotonic() > patience:
                raise error.shown() from error
            is_early = True
        if until is not None and time.monotonic() >= until:
            break
        if is_early and generation["completed_at"] is None:
            time.sleep(0.5)
    return generation


def _ended(remote: Remote, delivery_id: str, *, after: int = 0) -> Any:
    """The delivery once it was attempted more than `after` times, or is finished without."""
    while True:
        delivery = _asked(remote, f"/v1/deliveries/{delivery_id}")
        if delivery["attempt_count"] > after or delivery["status"] not in ("pending", "sending"):
            return delivery
        time.sleep(0.2)


def _asked(remote: Remote, path: str) -> Any:
    """What is there; a relay that is being replaced is waited for."""
    patience = time.monotonic() + PATIENCE
    while True:
        try:
            return remote.ask("GET", path)
        except Refused as error:
            if not error.may_pass or time.monotonic() > patience:
                raise error.shown() from error
        time.sleep(0.5)


def _followed(remote: Remote, replay: Mapping[str, Any], *, quietly: bool) -> Any:
    """The replay once it has ended. It goes on without whoever looks at it, so a relay that is being replaced
    is waited for."""
    columns = (
        *(bar.TextColumn("{task.description}"), bar.BarColumn(), bar.MofNCompleteColumn()),
        *(_Rate(), bar.TimeRemainingColumn()),
    )
    bars = bar.Progress(*columns, console=err, disable=quietly or not err.is_terminal)
    task = bars.add_task(replay["id"], total=replay["total"])
    try:
        with bars:
            while replay["ended_at"] is None:
                time.sleep(_LOOK_AGAIN)
                replay = _asked(remote, f"/v1/replays/{replay['id']}")
                # What has failed meanwhile is among it too.
                total = max(replay["total"], replay["done"])
                bars.update(task, completed=replay["done"], total=total)
    except KeyboardInterrupt:
        err.print(f"It goes on: relay replays cancel {replay['id']}", **PLAIN)
        raise typer.Exit(1) from None
    return replay


class _Rate(bar.ProgressColumn):
    def render(self, task: bar.Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f}/s")


def _show(resource: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(resource))
        return
    table = Table(show_header=False, box=None)
    for name, value in resource.items():
        if name != "attempts" and value is not None:
            table.add_row(f"[bold]{name}[/]", _cell(value))
    out.print(table)
    if resource.get("attempts"):
        fields = ("number", "started_at", "trigger", "response_status", "duration_ms", "error")
        _table({"data": resource["attempts"]}, fields, as_json)


def _table(page: Mapping[str, Any], fields: Sequence[str], as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(page))
        return
    table = Table(*(Column(name, no_wrap=name in ("id", "status"), overflow="fold") for name in fields))
    for one in page["data"]:
        table.add_row(*(_cell(one[name]) for name in fields))
    out.print(table)
    if page.get("next_cursor"):
        out.print("[dim]there are more: narrow the filters, or give a higher --limit[/]")


def _cell(value: Any) -> str:
    if value is None:
        return "[dim]–[/]"
    if isinstance(value, dict | list):
        return escape(json.dumps(value, ensure_ascii=False))
    text = escape(str(value))
    return f"[{COLORS[value]}]{text}[/]" if isinstance(value, str) and value in COLORS else text
