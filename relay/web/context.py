"""What every request can reach: built once by `relay.app`, typed, and nothing else is shared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from relay.asker import Asker
from relay.batch import Batch
from relay.bell import Bell
from relay.callback import Callbacks
from relay.catalog import Catalog
from relay.config import Settings
from relay.deliver import Deliverer
from relay.hold import Holder
from relay.ingest import Ingest
from relay.keyring import KeyRing
from relay.limit import Limit
from relay.live import Live
from relay.metrics import Metrics
from relay.poll import Poller
from relay.prune import Pruner
from relay.pulse import Pulse
from relay.redact import Redactor
from relay.replay import Counting
from relay.roster import Roster
from relay.shard import Held
from relay.store import Store
from relay.store.generations import Hint, Watch, Watched
from relay.tracing import Tracing
from relay.web.auth import Gate


@dataclass(frozen=True, slots=True)
class Relay:
    """A running relay. `watch` and `hint` return when the group they were written in is durable. Tests are
    limited for each endpoint, replays for each tenant. Logs and refusals go through `redactor`. `pulse`
    knows which of its loops are alive."""

    settings: Settings
    store: Store
    keyring: KeyRing
    accounts: Roster
    callbacks: Callbacks
    ingest: Ingest
    live: Live
    catalog: Catalog
    asker: Asker
    poller: Poller
    deliverer: Deliverer
    shards: Held
    holder: Holder
    pruner: Pruner
    bell: Bell
    gate: Gate
    test_limit: Limit
    replay_limit: Limit
    counting: Counting
    pulse: Pulse
    redactor: Redactor
    metrics: Metrics
    tracing: Tracing | None
    watch: Batch[Watch, Watched]
    hint: Batch[Hint, None]
    now: Callable[[], int]


class State(TypedDict):
    relay: Relay
