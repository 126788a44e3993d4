"""What every request can reach: built once by `relay.app`, typed, and nothing else is shared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

from relay.asker import Asker
from relay.batch import Batch
from relay.bell import Bell
from relay.callback import Callbacks
from relay.config import Settings
from relay.deliver import Deliverer
from relay.hold import Holder
from relay.ingest import Ingest
from relay.poll import Poller
from relay.providers import Account
from relay.redact import Redactor
from relay.shard import Held
from relay.store import Store
from relay.store.generations import Hint, Watch, Watched


@dataclass(frozen=True, slots=True)
class Relay:
    """A running relay. `watch` and `hint` return when the group they were written in is durable; logs and
    refusals go through `redactor`: credentials that come later are added to it."""

    settings: Settings
    store: Store
    accounts: Mapping[str, Account]
    callbacks: Callbacks
    ingest: Ingest
    asker: Asker
    poller: Poller
    deliverer: Deliverer
    shards: Held
    holder: Holder
    bell: Bell
    redactor: Redactor
    watch: Batch[Watch, Watched]
    hint: Batch[Hint, None]
    now: Callable[[], int]


class State(TypedDict):
    relay: Relay
