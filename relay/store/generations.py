"""Generations at rest."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from relay.errors import Collision, Conflict, Invalid
from relay.generation import FINAL, Generation, LearnedBy, Status, Update
from relay.hints import Turns, ask_at, hint_asks
from relay.schedule import CALLED, Ask
from relay.store.database import Database, Row, Transaction, repeated
from relay.store.filters import where
from relay.store.idempotency import Idempotency, correct, reserve

_UPDATE = TypeAdapter(Update)
# Of what is due in an account, so many that have been due longest are compared.
CONSIDERED = 500
_FINAL = ", ".join(f"'{status}'" for status in sorted(FINAL))


@dataclass(frozen=True, slots=True)
class Watch:
    """A wish to watch a job."""

    generation: Generation
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class Watched:
    """What became of the wish: the generation, None when it is gone; the error when the wish is refused."""

    generation: Generation | None
    created: bool
    error: Invalid | None = None


@dataclass(frozen=True, slots=True)
class Hint:
    """A callback for a generation; `job_id` is what it claims, if anything."""

    generation_id: str
    job_id: str | None


def _no_limits(account: str) -> None: ...


class Generations:
    """Every statement about generations but those that announce their ends; a method is a transaction."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @repeated
    async def create(self, wishes: Sequence[Watch]) -> Sequence[Watched]:
        """Begins to watch each job that is not yet watched; durable when it returns."""
        async with self._db.write() as tx:
            earlier = await _earlier(tx, wishes)
            watched = await _create(tx, [wish for wish in wishes if wish.generation.id not in earlier])
            for wish in wishes:
                new = wish.generation
                if new.id in earlier:
                    watched[new.id] = await _again(tx, new.tenant, earlier[new.id], watched)
        return [watched[wish.generation.id] for wish in wishes]

    async def get(self, tenant: str, generation_id: str) -> Generation | None:
        async with self._db.read() as tx:
            return await _get(tx, tenant, generation_id)

    async def get_many(self, ids: Sequence[str], *, browse: bool = False) -> Sequence[Generation]:
        """Those of the ids that exist, whoever's they are."""
        async with self._db.read(browse=browse) as tx:
            return [
                _read(row) for row in await tx.fetch("SELECT * FROM generations WHERE id IN (:ids)", ids=ids)
            ]

    async def page(
        self, tenant: str, filters: Mapping[str, Any], *, limit: int, cursor: str | None
    ) -> Mapping[str, int]:
        """The ids, newest first, those after `cursor`, each with how many bytes of JSON it has.

        `filters`: account, provider, job_id, status; since and until on the time of creation.
        """
        conditions, order, values = where(
            tenant,
            filters,
            prefix="gen",
            columns={"account": "account", "provider": "provider", "job_id": "job_id", "status": "status"},
            narrow=("job_id",),
            leading=("account", "status"),
            cursor=cursor,
        )
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                f"""
                SELECT id, LENGTH(metadata) + LENGTH(COALESCE(answer, '')) AS size
                FROM generations WHERE {conditions}
                ORDER BY {order} LIMIT :limit
                """,
                limit=limit,
                **values,
            )
        return {row["id"]: row["size"] for row in rows}

    async def describe(self, tenant: str, generation_id: str, metadata: Mapping[str, Any]) -> None:
        """Replaces the metadata."""
        async with self._db.write() as tx:
            await tx.execute(
                "UPDATE generations SET metadata = :metadata WHERE id = :id AND tenant = :tenant",
                id=generation_id,
                tenant=tenant,
                metadata=json.dumps(metadata),
            )

    async def ended(self, account: str, *, limit: int) -> Sequence[Generation]:
        """The last ones of an account that ended, the first of them first."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch(
                """
                SELECT * FROM generations WHERE account = :account AND known_at IS NOT NULL
                ORDER BY known_at DESC LIMIT :limit
                """,
                account=account,
                limit=limit,
            )
        return [_read(row) for row in reversed(rows)]

    @repeated
    async def name_job(self, generation: Generation, job_id: str, *, ask: Ask | None) -> None:
        """Ties a generation to the job it watches, and says when to ask about it.

        Raises Conflict when it has another job already, or another generation has this one.
        """
        async with self._db.write() as tx:
            named = await tx.execute(
                f"""
                UPDATE generations
                SET job_id = :job_id, claimed_job_id = NULL,
                    chance = COALESCE(:chance, chance), rate = COALESCE(:rate, rate),
                    due_at = CASE WHEN status IN ({_FINAL}) THEN NULL ELSE COALESCE(:due_at, due_at) END
                WHERE id = :id AND (job_id IS NULL OR job_id = :job_id) AND NOT EXISTS (
                    SELECT 1 FROM generations AS other
                    WHERE other.tenant = :tenant AND other.account = :account AND other.job_id = :job_id
                        AND other.id <> :id
                )
                """,
                id=generation.id,
                tenant=generation.tenant,
                account=generation.account,
                job_id=job_id,
                due_at=ask.due_at if ask is not None else None,
                chance=ask.chance if ask is not None else None,
                rate=ask.rate if ask is not None else None,
            )
        if not named:
            raise Conflict("this generation has another job, or another generation watches this job")

    async def delete(self, tenant: str, generation_id: str) -> bool:
        """Stops watching; the events that were announced stay."""
        async with self._db.write() as tx:
            deleted = await tx.execute(
                "DELETE FROM generations WHERE id = :id AND tenant = :tenant", id=generation_id, tenant=tenant
            )
        return deleted > 0

    async def watching(self, account: str, job_id: str) -> Sequence[str]:
        """The ids of the generations that watch a job and have not ended, whoever's they are."""
        async with self._db.read() as tx:
            rows = await tx.fetch(
                f"""
                SELECT id FROM generations
                WHERE account = :account AND job_id = :job_id AND status NOT IN ({_FINAL})
                """,
                account=account,
                job_id=job_id,
            )
        return [row["id"] for row in rows]

    @repeated
    async def hint(
        self, hints: Sequence[Hint], *, turns: Callable[[str], Turns | None] = _no_limits, now: int
    ) -> None:
        """Makes generations due as soon as their callbacks may have them asked about, `turns` giving those of
        an account; one that is being asked about, when that ask has ended: it may have seen less than
        the callback knows."""
        async with self._db.write() as tx:
            ids = sorted({hint.generation_id for hint in hints})
            # What is read next stays so until it is written: nobody begins or ends an ask in between.
            await tx.execute_many(_HOLD, [{"id": id_} for id_ in ids])
            found = {row["id"]: dict(row) for row in await tx.fetch(_HINTED, ids=ids)}
            heard = []
            for hint in hints:
                one = found.get(hint.generation_id)
                if one is None or (one["job_id"] is None and hint.job_id is None):
                    continue
                one["hints"] += 1
                if one["lease"] is None:
                    one["due_at"] = ask_at(
                        one["due_at"], one["asked_at"], one["hints"], turns(one["account"]), now=now
                    )
                heard.append(
                    {
                        "id": hint.generation_id,
                        "job_id": hint.job_id,
                        "due_at": one["due_at"],
                        "hint_asks": hint_asks(one["hints"]),
                        "called": CALLED,
                    }
                )
            await tx.execute_many(_HINT, heard)

    async def drop_claim(self, generation: Generation) -> None:
        """Forgets the job id that a callback claimed, unless another has claimed another meanwhile."""
        async with self._db.write() as tx:
            await tx.execute(
                """
                UPDATE generations SET claimed_job_id = NULL, hint_asks = NULL
                WHERE id = :id AND hints = :hints
                """,
                id=generation.id,
                hints=generation.hints,
            )

    async def claim(
        self, wanted: Mapping[str, int], *, now: int, lease: str, lease_until: int
    ) -> Sequence[Generation]:
        """Takes what is due, up to so many of each account, the likeliest to have ended first (of those that
        have been due longest); a crash gives it back at `lease_until`."""
        rows = [
            {"account": account, "limit": limit, "now": now, "lease": lease, "lease_until": lease_until}
            for account, limit in wanted.items()
        ]
        if not rows:
            return []
        async with self._db.write() as tx:
            await tx.execute_many(
                f"""
                WITH waiting AS (
                    SELECT id, chance + rate * (:now - due_at) AS likely FROM generations
                    WHERE account = :account AND due_at <= :now
                    ORDER BY due_at LIMIT {CONSIDERED} {self._db.skip_locked}
                ), due AS (
                    SELECT id FROM waiting ORDER BY likely DESC, id LIMIT :limit
                )
                UPDATE generations SET due_at = :lease_until, lease = :lease
                FROM due WHERE generations.id = due.id
                """,
                rows,
            )
            return await _claimed(tx, list(wanted), lease=lease, lease_until=lease_until)

    async def watching_accounts(self) -> Sequence[str]:
        """The names of the accounts that have open generations, configured or not."""
        async with self._db.read(browse=True) as tx:
            rows = await tx.fetch("SELECT DISTINCT account FROM generations WHERE known_at IS NULL")
        return [row["account"] for row in rows]

    async def claim_overdue(
        self, wanted: Mapping[str, int], *, now: int, lease: str, lease_until: int
    ) -> Sequence[Generation]:
        """Takes open generations whose deadline has passed, up to so many of each account."""
        rows = [
            {"account": account, "limit": limit, "now": now, "lease": lease, "lease_until": lease_until}
            for account, limit in wanted.items()
        ]
        if not rows:
            return []
        async with self._db.write() as tx:
            await tx.execute_many(
                f"""
                WITH due AS (
                    SELECT id FROM generations
                    WHERE known_at IS NULL AND account = :account AND deadline_at <= :now AND due_at <= :now
                    ORDER BY deadline_at LIMIT :limit {self._db.skip_locked}
                )
                UPDATE generations SET due_at = :lease_until, lease = :lease
                FROM due WHERE generations.id = due.id
                """,
                rows,
            )
            return await _claimed(tx, list(wanted), lease=lease, lease_until=lease_until)

    @repeated
    async def recover(self, accounts: Collection[str], *, now: int) -> int:
        """Makes due now what was being asked about at these accounts, where no relay can be asking."""
        if not accounts:
            return 0
        async with self._db.write() as tx:
            return await tx.execute(
                """
                UPDATE generations SET due_at = :now, lease = NULL
                WHERE account IN (:accounts) AND due_at > :now AND lease IS NOT NULL
                """,
                accounts=sorted(accounts),
                now=now,
            )

    async def claim_one(self, generation_id: str, *, lease: str, lease_until: int) -> Generation | None:
        """Takes one generation whether it is due or not; None when nothing can be asked about it any more."""
        async with self._db.write() as tx:
            taken = await tx.execute(
                f"""
                UPDATE generations SET due_at = :lease_until, lease = :lease
                WHERE id = :id AND status NOT IN ({_FINAL})
                """,
                id=generation_id,
                lease=lease,
                lease_until=lease_until,
            )
            if not taken:
                return None
            rows = await tx.fetch("SELECT * FROM generations WHERE id = :id", id=generation_id)
        return _read(rows[0])


_CREATE = """
    INSERT INTO generations (
        id, tenant, account, provider, job_id, status, metadata, callback_url, awaits_callback,
        late, created_at, deadline_at, due_at, chance, rate, outage, asks, errors, missing, hints, version
    ) VALUES (
        :id, :tenant, :account, :provider, :job_id, :status, :metadata, :callback_url,
        :awaits_callback, 0, :created_at, :deadline_at, :due_at, :chance, :rate, 0, 0, 0, 0, 0, 0
    )
    ON CONFLICT (tenant, account, job_id) DO NOTHING
"""

_HOLD = "UPDATE generations SET hints = hints WHERE id = :id"
_HINTED = f"""
    SELECT id, account, job_id, due_at, asked_at, hints, lease FROM generations
    WHERE id IN (:ids) AND status NOT IN ({_FINAL})
"""
_HINT = f"""
    UPDATE generations
    SET hints = hints + 1, hint_asks = COALESCE(hint_asks, :hint_asks), chance = :called,
        due_at = CASE
            WHEN lease IS NULL AND (due_at IS NULL OR due_at > :due_at) THEN :due_at
            ELSE due_at
        END,
        missing = CASE WHEN job_id IS NULL THEN 0 ELSE missing END,
        claimed_job_id = CASE WHEN job_id IS NULL THEN :job_id ELSE NULL END
    WHERE id = :id AND status NOT IN ({_FINAL}) AND COALESCE(job_id, :job_id) IS NOT NULL
"""


def _values(new: Generation) -> dict[str, Any]:
    return {
        "id": new.id,
        "tenant": new.tenant,
        "account": new.account,
        "provider": new.provider,
        "job_id": new.job_id,
        "status": new.status.value,
        "metadata": json.dumps(new.metadata),
        "callback_url": new.callback_url,
        "awaits_callback": int(new.awaits_callback),
        "created_at": new.created_at,
        "deadline_at": new.deadline_at,
        "due_at": new.due_at,
        "chance": new.chance,
        "rate": new.rate,
    }


async def _earlier(tx: Transaction, wishes: Sequence[Watch]) -> dict[str, tuple[str, int] | Invalid]:
    """What the Idempotency-Keys that were used before have created, by the id of the wish."""
    keyed = [(wish.generation, wish.idempotency) for wish in wishes if wish.idempotency is not None]
    earlier: dict[str, tuple[str, int] | Invalid] = {}
    for new, key in sorted(keyed, key=lambda one: (one[0].tenant, one[1].key)):
        try:
            before = await reserve(tx, new.tenant, key, resource_id=new.id, status=201, now=new.created_at)
        except Invalid as error:
            earlier[new.id] = error
            continue
        if before is not None:
            earlier[new.id] = before
    return earlier


async def _again(
    tx: Transaction, tenant: str, before: tuple[str, int] | Invalid, watched: Mapping[str, Watched]
) -> Watched:
    """What a key that was used before gives: maybe in this very transaction."""
    if isinstance(before, Invalid):
        return Watched(None, created=False, error=before)
    id_, status = before
    return watched.get(id_) or Watched(await _get(tx, tenant, id_), created=status == 201)


async def _create(tx: Transaction, wishes: Sequence[Watch]) -> dict[str, Watched]:
    """What became of each, by the id it was given."""
    if not wishes:
        return {}
    wanted = [wish.generation for wish in wishes]
    by_job = sorted(wanted, key=lambda one: (one.tenant, one.account, one.job_id or ""))
    await tx.execute_many(_CREATE, [_values(one) for one in by_job])
    rows = await tx.fetch("SELECT id FROM generations WHERE id IN (:ids)", ids=[one.id for one in wanted])
    created = {row["id"] for row in rows}
    watched = {one.id: Watched(one, created=True) for one in wanted if one.id in created}
    for wish in wishes:
        new = wish.generation
        if new.id in created:
            continue
        known = await _by_job(tx, new)
        if wish.idempotency is not None:
            await correct(tx, new.tenant, wish.idempotency, resource_id=known.id, status=200)
        watched[new.id] = Watched(known, created=False)
    return watched


def write_update(update: Update | None) -> str | None:
    return json.dumps(asdict(update)) if update is not None else None


async def _get(tx: Transaction, tenant: str, generation_id: str) -> Generation | None:
    rows = await tx.fetch(
        "SELECT * FROM generations WHERE id = :id AND tenant = :tenant", id=generation_id, tenant=tenant
    )
    return _read(rows[0]) if rows else None


async def _claimed(
    tx: Transaction, accounts: Sequence[str], *, lease: str, lease_until: int
) -> Sequence[Generation]:
    rows = await tx.fetch(
        """
        SELECT * FROM generations
        WHERE account IN (:accounts) AND due_at = :lease_until AND lease = :lease
        """,
        accounts=accounts,
        lease=lease,
        lease_until=lease_until,
    )
    return [_read(row) for row in rows]


async def _by_job(tx: Transaction, new: Generation) -> Generation:
    rows = await tx.fetch(
        "SELECT * FROM generations WHERE tenant = :tenant AND account = :account AND job_id = :job_id",
        tenant=new.tenant,
        account=new.account,
        job_id=new.job_id,
    )
    if not rows:
        raise Collision("the generation that watched this job has just been deleted")
    return _read(rows[0])


def _read(row: Row) -> Generation:
    values = dict(row)
    del values["event_id"]
    answer = values.pop("answer")
    learned_by = values["learned_by"]
    return Generation(
        **{
            **values,
            "status": Status(values["status"]),
            "metadata": json.loads(values["metadata"]),
            "awaits_callback": bool(values["awaits_callback"]),
            "late": bool(values["late"]),
            "learned_by": LearnedBy(learned_by) if learned_by else None,
            "update": _UPDATE.validate_python(json.loads(answer)) if answer is not None else None,
        }
    )
