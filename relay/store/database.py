"""What a driver offers the store: transactions over one SQL text with `:named` parameters."""

import logging
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

from relay.errors import Collision

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
Row = Mapping[str, Any]
_TRIES = 3


class Transaction(Protocol):
    """Statements between BEGIN and COMMIT; what raises inside rolls everything back."""

    async def execute(self, sql: str, **values: Any) -> int:
        """Returns the number of rows that were changed."""

    async def execute_many(self, sql: str, rows: Sequence[Row]) -> None: ...

    async def fetch(self, sql: str, **values: Any) -> list[Row]:
        """All rows; a sequence among the values becomes the list of an `IN (:name)`."""


class Database(Protocol):
    """One open database. Driver errors come out as StoreError."""

    skip_locked: str  # what a claim's SELECT ends with where rows can be locked
    alone: bool  # whether no other relay can be using it
    name: str  # where it is, without a credential
    dialect: str  # `0001_start.<dialect>.sql` is applied with `0001_start.sql`
    finds_table: str  # the query that finds one row when there is a table :name

    def write(self, *, exclusive: bool = False) -> AbstractAsyncContextManager[Transaction]:
        """A transaction that may write; one that is `exclusive` has waited until no other one is, of whatever
        relay, and may take its time."""

    def read(self, *, browse: bool = False) -> AbstractAsyncContextManager[Transaction]:
        """For statements that change nothing; each sees what is committed when it begins.

        `browse`: one that may take long, and must not make the others wait.
        """

    async def notify(self, message: str) -> None:
        """Tells whoever listens on this database; at most 7,999 bytes."""

    def listening(self, heard: Callable[[str], None]) -> AbstractAsyncContextManager[None]:
        """Calls `heard` with every message, one's own too, as long as the connection for it holds."""

    async def probe(self) -> None:
        """Raises StoreError when it would not take a write now."""

    async def free(self) -> int | None:
        """Bytes that are left for it to grow into; None where that cannot be seen from here. Raises
        StoreError."""

    async def sizes(self) -> Mapping[str, int]:
        """Bytes: `main` of the database, and where it has such, `wal` of what is written beside it and `free`
        of what is unused in it."""

    async def shrink(self, pages: int) -> bool:
        """Gives up to so many unused pages back to the file system, those that are too many to keep for what
        comes next; whether there may be more."""

    async def tidy(self) -> None:
        """Keeps what is written beside the database from growing without end; to be called now and then."""

    async def close(self) -> None: ...


def repeated(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """A method that is one transaction; when another one was in the way, it begins anew, twice at most."""

    @wraps(method)
    async def until_it_is_done(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(_TRIES - 1):
            try:
                return await method(*args, **kwargs)
            except Collision:
                log.info("store.repeated", extra={"method": method.__qualname__})
        return await method(*args, **kwargs)

    return until_it_is_done


def expand(sql: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`IN (:ids)` with one parameter per item of `ids`.

    Padded to a power of two with the last item, so that only a few texts are ever prepared.
    """
    scalars = {name: value for name, value in values.items() if not isinstance(value, list | tuple)}
    for name, items in values.items():
        if name in scalars:
            continue
        size = 1 << max(0, len(items) - 1).bit_length()
        padded = [*items, *([items[-1] if items else None] * (size - len(items)))]
        names = [f"{name}_{index}" for index in range(size)]
        sql = re.sub(rf":{name}\b", ", ".join(f":{one}" for one in names), sql)
        scalars.update(zip(names, padded, strict=True))
    return sql, scalars
