"""`relay listen`: a relay's events, signed as its endpoints get them, to a URL on this machine."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from httpx_sse import EventSource, ServerSentEvent, SSEError
from rich.markup import escape

from relay import __version__, signature
from relay.console import PLAIN, err, out
from relay.redact import BLOT
from relay.remote import HERE, AsJson, Key, Refused, Remote, Url, part

commands = typer.Typer()
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0
# A heartbeat comes every 15 s: what says nothing for so long is gone.
_SILENCE = 45.0
# What comes again when the stream is taken up again is known by its id.
_REMEMBERED = 10_000


@commands.command()
def listen(
    forward: Annotated[str, typer.Option(help="Where to send them, such as http://localhost:3000/hook.")],
    endpoint: Annotated[
        str | None,
        typer.Option(parser=part, metavar="ID", help="What this endpoint gets, signed with its secret."),
    ] = None,
    types: Annotated[
        list[str] | None, typer.Option("--types", help="Only these; may be given several times.")
    ] = None,
    secret: Annotated[
        str | None, typer.Option(envvar="RELAY_WEBHOOK_SECRET", help="whsec_… to sign with.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.", min=0.1)] = 15,
    url: Url = HERE,
    api_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Send what happens to a URL on this machine, as Relay would, until Ctrl-C: nobody needs a tunnel."""
    try:
        target = httpx.URL(forward)
        if target.scheme not in ("http", "https") or not target.host:
            raise httpx.InvalidURL("it must begin with http:// or https://")
        if secret is not None:
            signature.secret_key(secret)
    except httpx.InvalidURL as error:
        err.print(f"[red]--forward[/] {escape(str(error))}", **PLAIN)
        raise typer.Exit(2) from error
    except ValueError as error:
        err.print(f"[red]--secret[/] {escape(str(error))}", **PLAIN)
        raise typer.Exit(2) from error
    remote = Remote(url, api_key)
    query = {"endpoint_id": endpoint, "type": ",".join(types) if types else None}
    headers = _headers(remote, endpoint)
    signing = secret or _secret(remote, endpoint)
    stream = _Stream(remote, {name: value for name, value in query.items() if value is not None})
    try:
        with httpx.Client(timeout=timeout, trust_env=False) as client:
            for event in stream.events():
                _show(event, _forward(client, target, event, headers, signing), as_json)
    except KeyboardInterrupt:
        # How it is meant to end.
        return


@dataclass(slots=True)
class _Stream:
    """The event stream, taken up again whenever it ends."""

    remote: Remote
    query: dict[str, str]
    last: str = ""
    known: dict[str, None] = field(default_factory=dict)

    def events(self) -> Iterator[ServerSentEvent]:
        """Each once, for ever. What the relay refuses ends the program with 1; so does one that cannot be
        reached at all."""
        pause, begun = _FIRST_PAUSE, False
        while True:
            try:
                for event in self._until_it_ends(begun):
                    pause, begun = _FIRST_PAUSE, True
                    if event is not None:
                        yield event
                said = "the stream has ended"
            except Refused as error:
                if not begun or not error.may_pass:
                    raise error.shown() from error
                said = str(error)
            except (httpx.HTTPError, httpx.InvalidURL, SSEError) as error:
                said = f"{self.remote.url} cannot be reached: {error}"
                if not begun:
                    raise Refused(said).shown() from error
            err.print(f"[dim]{escape(said)}; again in {pause:g} s[/]", **PLAIN)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _until_it_ends(self, begun: bool) -> Iterator[ServerSentEvent | None]:
        """None once it has begun, then the events that are new."""
        headers = {"authorization": f"Bearer {self.remote.key}", "accept": "text/event-stream"}
        if self.last:
            headers["last-event-id"] = self.last
        address = self.remote.url.rstrip("/") + "/v1/events/stream"
        silence = httpx.Timeout(30, read=_SILENCE)
        with (
            httpx.Client(trust_env=False, timeout=silence) as client,
            client.stream("GET", address, params=self.query, headers=headers) as answer,
        ):
            if not answer.is_success:
                answer.read()
                raise Refused.of(answer)
            if not begun:
                err.print(f"listening to {escape(self.remote.url)} … Ctrl-C ends it", **PLAIN)
            yield None
            for event in EventSource(answer).iter_sse():
                self.last = event.id or self.last
                # The first one only says where to go on from.
                if event.data and event.id not in self.known:
                    self._remember(event.id)
                    yield event

    def _remember(self, id_: str) -> None:
        self.known[id_] = None
        if len(self.known) > _REMEMBERED:
            del self.known[next(iter(self.known))]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the URL said, or why it said nothing."""

    status: int | None
    duration_ms: int
    error: str | None = None


def _forward(
    client: httpx.Client, target: httpx.URL, event: ServerSentEvent, headers: dict[str, str], secret: str
) -> _Answer:
    body = event.data.encode()
    signed = signature.headers([secret], event.id, int(time.time()), body)
    own = {"content-type": "application/json", "user-agent": f"Relay/{__version__}"}
    began = time.monotonic()
    try:
        answer = client.post(target, content=body, headers={**headers, **own, **signed})
    except httpx.HTTPError as error:
        return _Answer(None, _since(began), str(error) or type(error).__name__)
    return _Answer(answer.status_code, _since(began))


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)


def _show(event: ServerSentEvent, answer: _Answer, as_json: bool) -> None:
    if as_json:
        said = {
            "id": event.id,
            "type": event.event,
            "status": answer.status,
            "duration_ms": answer.duration_ms,
            "error": answer.error,
        }
        print(json.dumps(said), flush=True)
        return
    good = answer.status is not None and 200 <= answer.status < 300
    outcome = f"[{'green' if good else 'red'}]{answer.status or escape(answer.error or '')}[/]"
    at = time.strftime("%H:%M:%S")
    out.print(f"{at} {outcome} {answer.duration_ms} ms {escape(event.event)} {event.id}", **PLAIN)


def _secret(remote: Remote, endpoint: str | None) -> str:
    """What these events are signed with for real, as far as the key may know it."""
    path = f"/v1/endpoints/{endpoint}/secret" if endpoint else "/v1/signing-secret"
    try:
        return str(remote.ask("GET", path)["secret"])
    except Refused as error:
        if error.status != 403:
            raise error.shown() from error
    if endpoint:
        raise Refused(
            "only a key with the scope admin may see the endpoint's secret: use one, or give --secret whsec_…"
        ).shown()
    fresh = signature.new_secret()
    err.print(f"signed with a secret for now only: [bold]{fresh}[/]", **PLAIN)
    return fresh


def _headers(remote: Remote, endpoint: str | None) -> dict[str, str]:
    """The endpoint's own headers, as far as they are shown."""
    if endpoint is None:
        return {}
    given: dict[str, Any] = remote.call("GET", f"/v1/endpoints/{endpoint}")["headers"]
    hidden: Sequence[str] = [name for name, value in given.items() if value == BLOT]
    if hidden:
        err.print(f"[dim]without {escape(', '.join(hidden))}, which is not shown[/]", **PLAIN)
    return {name: value for name, value in given.items() if value != BLOT}
