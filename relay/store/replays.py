"""Replays at rest, and what they are of."""

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

from relay.endpoint import Endpoint
from relay.errors import Conflict, NotFound
from relay.ids import first_id, new_id
from relay.keyring import KeyRing
from relay.selection import Found, Replay, Selection, Status, Wanted, is_of_delivery
from relay.store.audit import Entry, note
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.deliveries import LONGEST_ATTEMPT, REPLAY
from relay.store.endpoints import read_endpoint
from relay.store.filters import where
from relay.store.idempotency import Idempotency, created, reserve

# So many deliveries of an endpoint that are due and that nobody has taken are as much as it takes for now.
ENOUGH_WAITING = 16
# Of a tenant, open at once: each is looked after in every beat.
MOST_OPEN = 20
# Rows that are read, and bodies that are in memory, at once.
READ, BODIES = 2_000, 50
# So many seconds filters are asked in one go: somebody else may wait for their turn.
ASKING = 1.0
# Events, each with each endpoint, that are compared at once.
PAIRS = 50_000


@dataclass(frozen=True, slots=True)
class Stretch:
    """What was found behind a position, and the position behind it; `more` says that there may be more of it
    at once. The position is None when there is nothing left of this kind."""

    found: Sequence[Found]
    position: str | None
    more: bool


class Replays:
    """Every statement about replays; each method is one transaction, but for the bodies that filters look
    into: those are read by themselves, and asked about in none."""

    def __init__(self, database: Database, keyring: KeyRing) -> None:
        self._db, self._keyring = database, keyring

    @repeated
    async def create(
        self, replay: Replay, idempotency: Idempotency | None, *, entry: Entry | None = None
    ) -> Replay | None:
        """The new replay, or the one that the key created before; None when that one is gone.

        Raises Conflict, which names it, while another one is of the same endpoint, or of all of them; and
        while MOST_OPEN of the tenant have not ended.
        """
        one = replay.selection
        async with self._db.write() as tx:
            before = await reserve(
                tx, one.tenant, idempotency, resource_id=replay.id, status=202, now=replay.created_at
            )
            if before is not None:
                return await self._get(tx, one.tenant, before[0])
            # One at a time of a tenant: what one relay has just begun, the next one finds.
            await tx.execute("UPDATE tenants SET id = id WHERE id = :tenant", tenant=one.tenant)
            others = await tx.fetch(_OPEN_OF_TENANT, tenant=one.tenant)
            for row in others:
                if one.endpoint_id is None or row["endpoint_id"] in (None, one.endpoint_id):
                    raise _conflict(row)
            if len(others) >= MOST_OPEN:
                raise Conflict(f"{MOST_OPEN} replays have not ended: wait for one, or cancel it")
            await tx.execute(_INSERT, **_values(replay))
            await note(tx, entry)
        return replay

    async def created_by(self, tenant: str, idempotency: Idempotency) -> Replay | None:
        """The replay that this key created. Raises Invalid when it was asked for otherwise, Conflict when it
        is gone."""
        async with self._db.read() as tx:
            before = await created(tx, tenant, idempotency)
            found = await self._get(tx, tenant, before[0]) if before is not None else None
        if before is not None and found is None:
            raise Conflict("what this Idempotency-Key created is gone")
        return found

    async def get(self, tenant: str, replay_id: str) -> Replay | None:
        async with self._db.read() as tx:
            return await self._get(tx, tenant, replay_id)

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Sequence[Replay]:
        """Newest first, those after the id `cursor`. `filters`: status, endpoint_id, since, until."""
        conditions, order, values = where(
            tenant,
            filters,
            prefix="rpl",
            columns={"status": "status", "endpoint_id": "endpoint_id"},
            cursor=cursor,
        )
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"SELECT * FROM replays WHERE {conditions} ORDER BY {order} LIMIT :limit",
                limit=limit,
                **values,
            )
        return [_read(row) for row in rows]

    async def open(self) -> Sequence[Replay]:
        """All that have not ended, whoever's they are, the oldest first."""
        async with self._db.read() as tx:
            return [_read(row) for row in await tx.fetch(_OPEN)]

    async def obstacle(self, selection: Selection) -> str | None:
        """Why nothing can be made pending for its endpoint, ever; None when it is of all of them."""
        if selection.endpoint_id is None:
            return None
        async with self._db.read() as tx:
            rows = await tx.fetch(
                "SELECT disabled_at, deleted_at FROM endpoints WHERE id = :id", id=selection.endpoint_id
            )
        if not rows or rows[0]["deleted_at"] is not None:
            return "its endpoint has been deleted"
        if rows[0]["disabled_at"] is not None:
            return f"its endpoint {selection.endpoint_id} is disabled: enable it first"
        return None

    async def crowded(self, destinations: Collection[str], *, now: int) -> set[str]:
        """Those that do not keep up: what comes fresh must not wait behind what is replayed."""
        names = sorted(destinations)
        if not names:
            return set()
        # A power of two, so that only a few texts are ever prepared.
        names += names[-1:] * ((1 << (len(names) - 1).bit_length()) - len(names))
        values = {f"name_{place}": name for place, name in enumerate(names)}
        asked = ", ".join(f"(CAST(:{name} AS TEXT))" for name in values)
        async with self._db.read() as tx:
            rows = await tx.fetch(
                f"""
                WITH asked (destination) AS (VALUES {asked})
                SELECT destination FROM asked WHERE (
                    SELECT d.due_at FROM deliveries d
                    WHERE d.destination = asked.destination AND d.due_at <= :now
                    ORDER BY d.due_at LIMIT 1 OFFSET {ENOUGH_WAITING - 1}
                ) IS NOT NULL
                """,
                now=now,
                **values,
            )
        return {row["destination"] for row in rows}

    async def look(
        self, selection: Selection, position: str, *, limit: int, until: int, seconds: float = ASKING
    ) -> Stretch:
        """What it is of among the next `limit` rows behind a position, or fewer of them where endpoints are
        many; of what is missing, what was made before `until`, which is not later than its own. After so
        many `seconds` no filter is asked about one more event, and the stretch ends there."""
        async with self._db.read(browse=True) as tx:
            endpoints = await self._listening(tx, selection)
            if is_of_delivery(position):
                rows = await _finished(tx, selection, position, limit)
                found = _of_deliveries(selection, rows, endpoints)
                until = selection.until
            else:
                limit = min(limit, max(1, PAIRS // max(1, len(endpoints))))
                rows = await _announced(tx, selection, position, limit, until)
                found = await _lacking(tx, selection, rows, endpoints)
        if not is_of_delivery(position):
            found, asked_to = await self._let_through(found, endpoints, seconds)
            if asked_to is not None:
                return Stretch(found, asked_to, more=True)
        if len(rows) == limit:
            return Stretch(found, rows[-1]["id"], more=True)
        if until < selection.until:
            return Stretch(found, rows[-1]["id"] if rows else position, more=False)
        return Stretch(found, None, more=False)

    async def tally(self, selection: Selection, position: str, *, limit: int) -> tuple[int, str | None]:
        """How many `look` would find among the next `limit` rows, and the position behind them; the rows stay
        in the database, but where filters must look into them."""
        async with self._db.read(browse=True) as tx:
            endpoints = await self._listening(tx, selection)
            is_filtered = not is_of_delivery(position) and any(one.filter for one in endpoints.values())
            if selection.generation_id is None and not is_filtered:
                tally = _tally_finished if is_of_delivery(position) else _tally_lacking
                return await tally(tx, selection, position, limit, endpoints)
        stretch = await self.look(selection, position, limit=min(limit, READ), until=selection.until)
        return len(stretch.found), stretch.position

    async def advance(
        self, replay: Replay, chosen: Sequence[Found], position: str | None, *, paced_at: int, now: int
    ) -> bool:
        """Makes pending what was chosen, and writes down how far it has come; None is the end. Changes
        nothing, and is False, when it was canceled or somebody else went on with it since it was read."""
        status = Status.RUNNING if position is not None else Status.COMPLETED
        finished = [one for one in chosen if one.delivery_id is not None]
        lacking = [one for one in chosen if one.delivery_id is None]
        made = [_made(replay, one, now) for one in lacking]
        again = [_again(replay, one, now) for one in finished]
        async with self._db.write() as tx:
            moved = await tx.execute(
                _ADVANCE,
                id=replay.id,
                status=status.value,
                position=replay.position,
                position_after=position or replay.position,
                paced_at=replay.paced_at,
                paced_after=paced_at,
                ended_at=now if position is None else None,
                now=now,
            )
            if not moved:
                return False
            await tx.execute_many(_MAKE, made)
            await tx.execute_many(REPLAY, sorted(again, key=itemgetter("id")))
            ids = [row["id"] for row in (*again, *made)]
            if ids:
                await tx.execute(_COUNT, id=replay.id, ids=ids)
        return True

    async def fail(self, replay: Replay, why: str, *, now: int) -> None:
        """It cannot go on."""
        async with self._db.write() as tx:
            await tx.execute(_END, id=replay.id, status=Status.FAILED.value, error=why, now=now)

    async def cancel(self, tenant: str, replay_id: str, *, now: int, entry: Entry | None = None) -> None:
        """What it has made pending stays so. Raises NotFound, or Conflict when it has ended otherwise."""
        async with self._db.write() as tx:
            found = await self._get(tx, tenant, replay_id)
            if found is None:
                raise NotFound(f"no replay {replay_id}")
            canceled = await tx.execute(_END, id=replay_id, status=Status.CANCELED.value, error=None, now=now)
            await note(tx, entry if canceled else None)
            after = await self._get(tx, tenant, replay_id)
        if after is not None and after.status is not Status.CANCELED:
            raise Conflict(f"this replay has ended already: it is {after.status}")

    async def _let_through(
        self, lacking: Sequence[Found], endpoints: Mapping[str, Endpoint], seconds: float
    ) -> tuple[Sequence[Found], str | None]:
        """What the endpoints' filters let through; and the last event that they were asked about, when time
        was over before the end. Few bodies are in memory at once, and others have their turn after every
        evaluation."""
        clock = asyncio.get_running_loop().time
        over, let_through = clock() + seconds, list[Found]()
        filters = {id_ for id_, one in endpoints.items() if one.filter is not None}
        if not filters:
            return lacking, None
        events = [(id_, list(some)) for id_, some in groupby(lacking, key=attrgetter("event_id"))]
        for start in range(0, len(events), BODIES):
            portion = events[start : start + BODIES]
            bodies = await self._bodies(
                [id_ for id_, some in portion if any(one.endpoint_id in filters for one in some)]
            )
            for id_, some in portion:
                for one in some:
                    if one.endpoint_id not in filters:
                        let_through.append(one)
                    elif id_ in bodies:  # it may just have been removed
                        if endpoints[one.endpoint_id].lets_through(bodies[id_]):
                            let_through.append(one)
                        await asyncio.sleep(0)
                if id_ in bodies and clock() >= over and id_ != events[-1][0]:
                    return let_through, id_
        return let_through, None

    async def _bodies(self, ids: Sequence[str]) -> Mapping[str, bytes]:
        if not ids:
            return {}
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch("SELECT id, body FROM events WHERE id IN (:ids)", ids=ids)
        return {row["id"]: row["body"] for row in rows}

    async def _get(self, tx: Transaction, tenant: str, replay_id: str) -> Replay | None:
        rows = await tx.fetch(
            "SELECT * FROM replays WHERE id = :id AND tenant = :tenant", id=replay_id, tenant=tenant
        )
        return _read(rows[0]) if rows else None

    async def _listening(self, tx: Transaction, selection: Selection) -> Mapping[str, Endpoint]:
        """The endpoints that it is of, by their ids: those that take something."""
        rows = await tx.fetch(
            """
            SELECT * FROM endpoints
            WHERE tenant = :tenant AND deleted_at IS NULL AND disabled_at IS NULL ORDER BY id
            """,
            tenant=selection.tenant,
        )
        endpoints = [read_endpoint(self._keyring, row) for row in rows]
        return {one.id: one for one in endpoints if selection.endpoint_id in (None, one.id)}


_COLUMNS = [one.name for one in fields(Selection)]
_OPEN = "SELECT * FROM replays WHERE ended_at IS NULL ORDER BY id"
_OPEN_OF_TENANT = (
    "SELECT id, endpoint_id FROM replays WHERE tenant = :tenant AND ended_at IS NULL ORDER BY id"
)
_INSERT = """
    INSERT INTO replays (
        id, tenant, wanted, since, until, endpoint_id, generation_id, account, event_type, rate_limit, status,
        total, done, position, paced_at, created_at, updated_at
    ) VALUES (
        :id, :tenant, :wanted, :since, :until, :endpoint_id, :generation_id, :account, :event_type,
        :rate_limit, :status, :total, :done, :position, :paced_at, :created_at, :updated_at
    )
"""
_ADVANCE = """
    UPDATE replays
    SET status = :status, position = :position_after, paced_at = :paced_after, updated_at = :now,
        ended_at = CAST(:ended_at AS BIGINT)
    WHERE id = :id AND position = :position AND paced_at = :paced_at AND ended_at IS NULL
"""
# Of what was chosen, all that has its mark has got it now: nobody else went on with it meanwhile.
_COUNT = """
    UPDATE replays
    SET done = done + (SELECT COUNT(*) FROM deliveries d WHERE d.id IN (:ids) AND d.replay_id = :id)
    WHERE id = :id
"""
_END = """
    UPDATE replays SET status = :status, error = CAST(:error AS TEXT), ended_at = :now, updated_at = :now
    WHERE id = :id AND ended_at IS NULL
"""
_MAKE = """
    INSERT INTO deliveries (
        id, tenant, event_id, endpoint_id, callback_url, destination, status, attempts, run_attempts,
        next_trigger, due_at, lease, replay_id, created_at, updated_at
    )
    SELECT :id, e.tenant, e.id, p.id, NULL, p.id, 'pending', 0, 0,
        'replay', :now, NULL, :replay_id, :now, :now
    FROM events e JOIN endpoints p ON p.id = :endpoint_id
    WHERE e.id = :event_id AND p.tenant = e.tenant AND p.disabled_at IS NULL
    ON CONFLICT DO NOTHING
"""
_FINISHED = """
    SELECT d.id, d.tenant, d.event_id, d.endpoint_id, d.destination, d.due_at, d.lease, d.updated_at,
        e.type, e.account, e.generation_id
    FROM deliveries d JOIN events e ON e.id = d.event_id
"""
_FAILED = "AND d.status IN ('failed', 'canceled')"
_ANNOUNCED = "SELECT e.id, e.tenant, e.type, e.account, e.generation_id FROM events e"


async def _finished(tx: Transaction, selection: Selection, position: str, limit: int) -> Sequence[Row]:
    values = {"position": position, "until": first_id("dlv", selection.until), "limit": limit}
    failed = _FAILED if selection.wanted is Wanted.FAILED else ""
    if selection.generation_id is not None:
        # Few: sorting them beats reading all in order.
        return await tx.fetch(
            f"""
            {_FINISHED} WHERE e.generation_id = :generation_id AND d.id > :position AND d.id < :until {failed}
            ORDER BY d.id || '' LIMIT :limit
            """,
            generation_id=selection.generation_id,
            **values,
        )
    # By their ids alone, whoever's they are: so many cost the same, whatever a planner knows of the table.
    return await tx.fetch(
        f"{_FINISHED} WHERE d.id > :position AND d.id < :until {failed} ORDER BY d.id LIMIT :limit", **values
    )


async def _announced(
    tx: Transaction, selection: Selection, position: str, limit: int, until: int
) -> Sequence[Row]:
    values = {"position": position, "until": first_id("evt", min(until, selection.until)), "limit": limit}
    if selection.generation_id is not None:
        return await tx.fetch(
            f"""
            {_ANNOUNCED} WHERE e.generation_id = :generation_id AND e.id > :position AND e.id < :until
            ORDER BY e.id || '' LIMIT :limit
            """,
            generation_id=selection.generation_id,
            **values,
        )
    return await tx.fetch(
        f"{_ANNOUNCED} WHERE e.id > :position AND e.id < :until ORDER BY e.id LIMIT :limit", **values
    )


def _of_deliveries(
    selection: Selection, rows: Sequence[Row], endpoints: Mapping[str, Endpoint]
) -> Sequence[Found]:
    takers = _takers(selection, endpoints)
    return [
        Found(
            position=row["id"],
            event_id=row["event_id"],
            delivery_id=row["id"],
            endpoint_id=row["endpoint_id"],
            destination=row["destination"],
            ready_at=0 if row["lease"] is None else row["updated_at"] + LONGEST_ATTEMPT,
        )
        for row in rows
        if row["tenant"] == selection.tenant
        and row["due_at"] is None
        and row["endpoint_id"] in takers
        and selection.includes(row["type"], row["account"], row["generation_id"])
    ]


def _takers(selection: Selection, endpoints: Mapping[str, Endpoint]) -> set[str | None]:
    """Whose deliveries it is of; None is a generation's callback URL."""
    return {*endpoints, *([None] if selection.endpoint_id is None else [])}


async def _tally_finished(
    tx: Transaction, selection: Selection, position: str, limit: int, endpoints: Mapping[str, Endpoint]
) -> tuple[int, str | None]:
    failed = _FAILED if selection.wanted is Wanted.FAILED else ""
    until = first_id("dlv", selection.until)
    last = await tx.fetch(
        f"""
        SELECT d.id FROM deliveries d WHERE d.id > :position AND d.id < :until {failed}
        ORDER BY d.id LIMIT 1 OFFSET :skipped
        """,
        position=position,
        until=until,
        skipped=limit - 1,
    )
    groups = await tx.fetch(
        f"""
        SELECT d.tenant, d.endpoint_id, e.type, e.account, COUNT(*) AS count
        FROM deliveries d JOIN events e ON e.id = d.event_id
        WHERE d.id > :position AND d.id <= :last AND d.due_at IS NULL {failed}
        GROUP BY d.tenant, d.endpoint_id, e.type, e.account
        """,
        position=position,
        last=last[0]["id"] if last else until,
    )
    takers = _takers(selection, endpoints)
    count = sum(
        row["count"]
        for row in groups
        if row["tenant"] == selection.tenant
        and row["endpoint_id"] in takers
        and selection.includes(row["type"], row["account"], None)
    )
    return count, last[0]["id"] if last else None


async def _tally_lacking(
    tx: Transaction, selection: Selection, position: str, limit: int, endpoints: Mapping[str, Endpoint]
) -> tuple[int, str | None]:
    """What is wanted but for what is there."""
    until = first_id("evt", selection.until)
    last = await tx.fetch(
        """
        SELECT e.id FROM events e WHERE e.id > :position AND e.id < :until
        ORDER BY e.id LIMIT 1 OFFSET :skipped
        """,
        position=position,
        until=until,
        skipped=limit - 1,
    )
    stretch = {"position": position, "last": last[0]["id"] if last else until}
    announced = await tx.fetch(
        """
        SELECT e.tenant, e.type, e.account, COUNT(*) AS count FROM events e
        WHERE e.id > :position AND e.id <= :last GROUP BY e.tenant, e.type, e.account
        """,
        **stretch,
    )
    there = await tx.fetch(
        """
        SELECT e.tenant, e.type, e.account, d.endpoint_id, COUNT(*) AS count
        FROM events e JOIN deliveries d ON d.event_id = e.id
        WHERE e.id > :position AND e.id <= :last GROUP BY e.tenant, e.type, e.account, d.endpoint_id
        """,
        **stretch,
    )
    count = 0
    for row in there:
        taker = endpoints.get(row["endpoint_id"])
        if taker is not None and _lacks(selection, row, taker):
            count -= row["count"]
    for endpoint in endpoints.values():
        count += sum(row["count"] for row in announced if _lacks(selection, row, endpoint))
        # Others get on between them.
        await asyncio.sleep(0)
    return count, last[0]["id"] if last else None


def _lacks(selection: Selection, row: Row, endpoint: Endpoint) -> bool:
    """Whether the endpoint should have such events."""
    return (
        row["tenant"] == selection.tenant
        and selection.can_lack(row["type"])
        and selection.includes(row["type"], row["account"], selection.generation_id)
        and endpoint.takes(row["type"], row["account"])
    )


async def _lacking(
    tx: Transaction, selection: Selection, rows: Sequence[Row], endpoints: Mapping[str, Endpoint]
) -> Sequence[Found]:
    """What the endpoints want, as far as bodies do not matter, and have no delivery of."""
    wanted = [
        (row["id"], one.id)
        for row in rows
        if row["tenant"] == selection.tenant
        and selection.can_lack(row["type"])
        and selection.includes(row["type"], row["account"], row["generation_id"])
        for one in endpoints.values()
        if one.takes(row["type"], row["account"])
    ]
    if not wanted:
        return []
    there = defaultdict[str, set[str]](set)
    for row in await tx.fetch(
        "SELECT event_id, endpoint_id FROM deliveries WHERE event_id IN (:ids)",
        ids=sorted({event_id for event_id, _ in wanted}),
    ):
        there[row["event_id"]].add(row["endpoint_id"])
    return [
        Found(event_id, event_id, None, endpoint_id, endpoint_id)
        for event_id, endpoint_id in wanted
        if endpoint_id not in there[event_id]
    ]


def _again(replay: Replay, one: Found, now: int) -> dict[str, Any]:
    return {
        "id": one.delivery_id,
        "tenant": replay.selection.tenant,
        "delivered": int(replay.selection.wanted is Wanted.ALL),
        "replay_id": replay.id,
        "now": now,
        "over": now - LONGEST_ATTEMPT,
    }


def _made(replay: Replay, one: Found, now: int) -> dict[str, Any]:
    return {
        "id": new_id("dlv", now),
        "event_id": one.event_id,
        "endpoint_id": one.endpoint_id,
        "replay_id": replay.id,
        "now": now,
    }


def _conflict(row: Row) -> Conflict:
    of = "of this endpoint" if row["endpoint_id"] is not None else "of all endpoints"
    return Conflict(f"the replay {row['id']} {of} has not ended: wait for it, or cancel it")


def _values(replay: Replay) -> dict[str, Any]:
    values = asdict(replay)
    selection = values.pop("selection")
    del values["ended_at"], values["error"]
    return {
        **selection,
        **values,
        "wanted": replay.selection.wanted.value,
        "status": replay.status.value,
    }


def _read(row: Row) -> Replay:
    values = dict(row)
    selection = {name: values.pop(name) for name in _COLUMNS}
    return Replay(
        **{**values, "status": Status(values["status"])},
        selection=Selection(**{**selection, "wanted": Wanted(selection["wanted"])}),
    )
