"""What Relay remembers: one SQL text, a file per noun; each method is one transaction.

The rules that keep the text one: `:named` parameters; CAST, never `::`; BIGINT milliseconds, TEXT ids and
JSON, BYTEA bodies; no database's own functions; a claim is `WITH due AS (SELECT …) UPDATE … FROM due`;
sort by NOT NULL columns; writes of the hot path are lists and idempotent; what is asked for its count does
not begin with WITH.

The rules that keep it right when several relays write at once: a statement sees what is committed when it
begins, so a condition stands in the statement that writes, not in one before it; rows are locked in the
order of their ids, kinds in this one: keys, tenants, replays, generations, endpoints, events, deliveries,
attempts. What meets another transaction all the same raises Collision, and is `repeated`.
"""

from dataclasses import dataclass
from pathlib import Path

from relay.errors import ConfigError
from relay.keyring import KeyRing
from relay.store.accounts import Accounts
from relay.store.audit import Audit
from relay.store.credentials import Credentials
from relay.store.database import Database
from relay.store.deliveries import Deliveries
from relay.store.endpoints import Endpoints
from relay.store.events import Events
from relay.store.generations import Generations
from relay.store.keys import Keys
from relay.store.replays import Replays
from relay.store.retention import Retention
from relay.store.sealed import Sealed
from relay.store.shards import Shards
from relay.store.sqlite import SQLite
from relay.store.tenants import Tenants
from relay.store.types import Types


@dataclass(frozen=True, slots=True)
class Store:
    """Everything at rest, by noun."""

    database: Database
    endpoints: Endpoints
    generations: Generations
    events: Events
    deliveries: Deliveries
    tenants: Tenants
    types: Types
    keys: Keys
    audit: Audit
    accounts: Accounts
    credentials: Credentials
    shards: Shards
    replays: Replays
    retention: Retention
    sealed: Sealed


async def open_database(url: str, *, alone: bool = True, patience: float = 0) -> Database:
    """The database that `database:` names; not `alone`, beside the relay that runs on it, for a word with it.
    `patience`: for so many seconds a server that is not there yet is waited for.

    Raises ConfigError when it cannot be opened, DatabaseInUse when another relay runs on it.
    """
    if url.startswith("sqlite:///"):
        return await SQLite.open(Path(url.removeprefix("sqlite:///")), alone=alone)
    if url.startswith(("postgresql://", "postgres://")):
        try:
            from relay.store.postgres import PostgreSQL  # an extra: only who uses it needs it
        except ImportError as error:
            raise ConfigError(
                "database: PostgreSQL needs the extra: pip install 'relay-notifier[postgres]'"
            ) from error
        return await PostgreSQL.open(url, patience=patience)
    raise ConfigError(
        "database: write sqlite:///relay.db, sqlite:////absolute/path/relay.db"
        " or postgresql://user:password@host:5432/database"
    )


def store_on(database: Database, keyring: KeyRing) -> Store:
    """The store; `keyring` seals the secrets in it."""
    return Store(
        database=database,
        endpoints=Endpoints(database, keyring),
        generations=Generations(database),
        events=Events(database, keyring),
        deliveries=Deliveries(database, keyring),
        tenants=Tenants(database, keyring),
        types=Types(database),
        keys=Keys(database),
        audit=Audit(database),
        accounts=Accounts(database),
        credentials=Credentials(database, keyring),
        shards=Shards(database),
        replays=Replays(database, keyring),
        retention=Retention(database),
        sealed=Sealed(database, keyring),
    )
