"""Logs: one wide line for what happened, JSON or for eyes."""

import json
import logging
import sys
import time

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
# These print URLs and headers of requests, and with them credentials, at lower levels.
_TALKATIVE = ("httpx", "httpcore", "aiohttp", "apscheduler", "aiosqlite", "uvicorn")


class WideFormatter(logging.Formatter):
    """The event's name, then its fields as `key=value`, or all of it as one JSON object."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields = {
            name: value for name, value in vars(record).items() if name not in _STANDARD and value is not None
        }
        trace = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            line = {"at": at, "level": record.levelname.lower(), "event": record.getMessage()}
            line = {**line, **{name: value for name, value in fields.items() if name not in line}}
            return json.dumps({**line, "trace": trace} if trace else line, default=str)
        tail = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{at} {record.levelname:<7} {record.getMessage()}{tail}" + (f"\n{trace}" if trace else "")


def set_up(level: str) -> None:
    """Logs go to standard error: for eyes on a terminal, as JSON elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(WideFormatter(as_json=not sys.stderr.isatty()))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    # A tick that is skipped because the last one is still at it is no news.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
