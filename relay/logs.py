"""Logs: one wide line for what happened, JSON or for eyes, without secrets."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TextIO

log = logging.getLogger(__name__)

# Of a field so many characters are kept, whoever's word it was.
LONGEST_FIELD = 1000
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
# These print URLs, headers and bodies, and with them credentials, at lower levels.
_TALKATIVE = ("httpx", "httpcore", "aiohttp", "apscheduler", "aiosqlite", "asyncpg", "sse_starlette")


class WideFormatter(logging.Formatter):
    """The event's name, then its fields as `key=value`, or all of it as one JSON object, without what `clean`
    takes away, in tracebacks too; a line of JSON stays one, whatever that is. A long field is cut."""

    def __init__(self, *, as_json: bool, clean: Callable[[str], str]) -> None:
        super().__init__()
        self._as_json, self._clean = as_json, clean

    def format(self, record: logging.LogRecord) -> str:
        line = self._line(record, str)
        # Hardly any holds a secret, and to clean one text is faster than many.
        return line if self._clean(line) == line else self._line(record, self._clean)

    def _line(self, record: logging.LogRecord, clean: Callable[[str], str]) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        said = clean(record.getMessage())
        fields = {
            name: self._told(value, clean)
            for name, value in vars(record).items()
            if name not in _STANDARD and value is not None
        }
        trace = clean(self.formatException(record.exc_info)) if record.exc_info else None
        if self._as_json:
            line: dict[str, object] = {"at": at, "level": record.levelname.lower(), "event": said}
            line = {**line, **{name: value for name, value in fields.items() if name not in line}}
            return json.dumps({**line, "trace": trace} if trace else line)
        tail = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{at} {record.levelname:<7} {said}{tail}" + (f"\n{trace}" if trace else "")

    def _told(self, value: object, clean: Callable[[str], str]) -> object:
        if value is None or isinstance(value, int | float):
            return value
        if isinstance(value, Mapping):
            return {clean(str(name)): self._told(one, clean) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._told(one, clean) for one in value]
        text = str(value)
        # Half a secret would not be known as one.
        return clean(text) if len(text) <= LONGEST_FIELD else self._clean(text)[:LONGEST_FIELD] + "…"


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        # The standard library's would print what could not be written.
        with suppress(OSError, ValueError):
            self.stream.write(f"a line of {record.name} could not be written\n")


def set_up(level: str, clean: Callable[[str], str]) -> None:
    """Logs go to standard error: for eyes on a terminal, as JSON elsewhere. So does whatever the program dies
    of, and every warning of Python's. All of it goes through `clean`."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(WideFormatter(as_json=not sys.stderr.isatty(), clean=clean))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _died
    threading.excepthook = lambda died: _died(
        died.exc_type, died.exc_value or died.exc_type(), died.exc_traceback
    )
    sys.unraisablehook = lambda died: _died(
        died.exc_type, died.exc_value or died.exc_type(), died.exc_traceback
    )
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Whoever sends it nonsense would fill the log.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # A tick that is skipped because the last one is still at it is no news.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)


def _died(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("program.failed", exc_info=(kind, error, trace))
