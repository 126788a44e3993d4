"""A copy of a database file in one piece, made beside the relay that runs on it."""

import os
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from relay.errors import ConfigError, CopyFailed

# So little is copied at once that the relay, which may be writing, hardly waits for the disk; pages.
STEP = 256


def backup(source: Path, target: Path, *, show: Callable[[int, int], None]) -> int:
    """Copies `source` as it is now to `target`, checks the copy and returns its size in bytes.

    It can be read by nobody but its owner. `show` is told how many pages are done, of how many. Raises
    ConfigError when there is nothing to copy or `target` exists, CopyFailed when the copy did not come to
    its end: then there is no `target`.
    """
    if not source.exists():
        raise ConfigError(f"database: {source} does not exist")
    if target.exists():
        raise ConfigError(f"{target} exists: name another file, nothing is overwritten")
    try:
        # Under its name there is a whole copy, or none.
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from error
    os.close(descriptor)
    made = Path(name)
    try:
        _copy(source, made, show)
        _claim(target)
        made.replace(target)
        _sync(target.parent)
        return target.stat().st_size
    except (sqlite3.Error, OSError) as error:
        raise CopyFailed(f"{target}: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def _copy(source: Path, made: Path, show: Callable[[int, int], None]) -> None:
    with (
        closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=rw", uri=True, timeout=5)) as reader,
        closing(sqlite3.connect(made, isolation_level=None)) as writer,
    ):
        reader.isolation_level = None
        # Nothing but that whoever closes last tidies up is to be written by this one.
        reader.execute("PRAGMA query_only = ON")
        # One snapshot for all steps: otherwise each write of the relay would have it begin anew.
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        reader.backup(writer, pages=STEP, progress=lambda _, left, total: show(total - left, total))
        reader.execute("ROLLBACK")
        # It is one file until somebody uses it.
        writer.execute("PRAGMA journal_mode = DELETE")
        [[verdict]] = writer.execute("PRAGMA integrity_check(1)").fetchall()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"the copy is damaged, and so the database may be: {verdict}")
    _sync(made)


def _claim(target: Path) -> None:
    """Makes the empty file that is then replaced, where nobody else has made one meanwhile."""
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
