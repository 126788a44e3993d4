"""Tracing: one trace for each generation, or event of another kind, from callback or poll to delivered.

The ids of a trace and of its first span are made of the id of what it is about: whichever relay goes on with
it, after whatever crash, knows them without being told. What a span tells are ids, codes and names.

OpenTelemetry is an extra, and is only imported by who traces.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from threading import Thread
from typing import TYPE_CHECKING, Literal, Self

from relay import __version__
from relay.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator

MISSING = "needs the extra: pip install 'relay-notifier[otel]'"
_TIMEOUT = 5
_LAST_TRY = 3
_NANOSECONDS = 1_000_000


class Tracing:
    """Takes notes of what is over, and sends them to a collector in a thread of its own; when that does not
    take them, they are dropped. Times are unix milliseconds."""

    def __init__(self, provider: "TracerProvider", *, share: float, propagates: bool) -> None:
        from opentelemetry import trace

        self._trace, self._provider = trace, provider
        self._tracer = provider.get_tracer("relay", __version__)
        self._share, self._propagates = share, propagates
        self._kinds = {
            "internal": trace.SpanKind.INTERNAL,
            "client": trace.SpanKind.CLIENT,
            "server": trace.SpanKind.SERVER,
        }

    @classmethod
    def open(
        cls,
        endpoint: str,
        *,
        headers: Mapping[str, str],
        service: str,
        relay: str,
        share: float,
        propagates: bool,
    ) -> Self:
        """`endpoint` takes OTLP over HTTP; `share` of all traces are sent; `close` it in the end.
        Raises ConfigError where OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        except ImportError as error:
            raise ConfigError(f"tracing.endpoint: {MISSING}") from error
        about = {"service.name": service, "service.version": __version__, "service.instance.id": relay}
        provider = TracerProvider(
            resource=Resource.create(about),
            sampler=ALWAYS_ON,  # whether a trace is sent is decided here, alike by every relay
            id_generator=_ids(),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, headers=dict(headers), timeout=_TIMEOUT)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        return cls(provider, share=share, propagates=propagates)

    async def close(self) -> None:
        """Sends what is left, or drops it within some seconds."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            try:
                self._provider.shutdown()
            finally:
                # Nobody waits any more where the loop is closed.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(over.set)

        # It tries for its time-out, and again: a thread that no end of a process waits for.
        Thread(target=shut_down, name="tracing", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), _LAST_TRY)

    def new_span(self) -> int:
        return secrets.randbits(64) | 1

    def headers(self, about: str, span: int) -> Mapping[str, str]:
        """What tells a subscriber which span its request is; nothing unless that is wanted."""
        if not self._propagates:
            return {}
        trace_id, _ = _ids_of(about)
        return {"traceparent": f"00-{trace_id:032x}-{span:016x}-{int(self._is_sent(trace_id)):02x}"}

    def note(
        self,
        name: str,
        about: str,
        *,
        begun: int,
        ended: int,
        kind: Literal["internal", "client", "server"] = "internal",
        first: bool = False,
        span: int | None = None,
        failed: bool = False,
        attributes: Mapping[str, str | int | None],
    ) -> None:
        """What was done about a generation or an event, and when; the `first` span of its trace is the one
        that all others are part of."""
        trace_id, first_id = _ids_of(about)
        if not self._is_sent(trace_id):
            return
        trace, given = self._trace, self._provider.id_generator
        given.trace, given.span = trace_id, first_id if first else span or self.new_span()  # type: ignore[attr-defined]
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        above = trace.SpanContext(trace_id, first_id, is_remote=True, trace_flags=flags)
        parent = trace.INVALID_SPAN if first else trace.NonRecordingSpan(above)
        noted = self._tracer.start_span(
            name,
            trace.set_span_in_context(parent),
            self._kinds[kind],
            {key: value for key, value in attributes.items() if value is not None},
            start_time=begun * _NANOSECONDS,
        )
        if failed:
            noted.set_status(trace.Status(trace.StatusCode.ERROR))
        noted.end(max(begun, ended) * _NANOSECONDS)

    def _is_sent(self, trace_id: int) -> bool:
        return (trace_id & 0xFFFFFFFF) < self._share * 2**32


def is_installed() -> bool:
    """Whether tracing can be had here."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except (ImportError, ValueError):
        return False


def _ids_of(about: str) -> tuple[int, int]:
    """The ids of a trace and of its first span."""
    made = hashlib.sha256(about.encode()).digest()
    return int.from_bytes(made[:16]) or 1, int.from_bytes(made[16:24]) or 1


def _ids() -> "IdGenerator":
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class Given(IdGenerator):
        """The ids that the next span is to have: spans are begun one after the other, in one thread."""

        trace = span = 0

        def generate_trace_id(self) -> int:
            return self.trace

        def generate_span_id(self) -> int:
            return self.span

    return Given()
