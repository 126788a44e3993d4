"""Metrics: what is counted while the relay works, for Prometheus.

Whatever is counted where deliveries pass costs an addition under a lock. No label holds an id, a URL or a
tenant, and none has values without end.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from relay import __version__, account
from relay.breaker import State
from relay.delivery import Claimed, Settlement, Status
from relay.errors import ProviderError
from relay.generation import Generation
from relay.health import Status as Health

# Of so many accounts each has a value of its own; what comes later is one together.
MOST_ACCOUNTS = 100
OTHER = "other"
# Other codes are a foreign provider file's own words.
_CODES = frozenset(
    {"unreachable", "unavailable", "rate_limited", "unauthorized", "blocked", "unreadable", "refused"}
)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAGS = (*_SECONDS, 30, 60, 300, 1800, 7200)
_WRITES = (0.001, 0.0025, *_SECONDS[:-1])
_SIZES = (1, 2, 5, 10, 25, 50, 100, 250, 500)
_ENDINGS = (Status.DELIVERED, Status.FAILED)
_ASKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """The metrics of one relay, in a registry of its own. Times go in as milliseconds, and out as seconds.

    `configured` are the names of the accounts in the configuration, which come first to have values of
    their own.
    """

    def __init__(self, configured: Iterable[str] = ()) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._accounts: set[str] = set()
        for name in configured:
            self.account(name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"relay_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"relay_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"relay_{name}", text, labels, registry=registry, buckets=buckets)

        gauge("build_info", "Which release this is.", "version").labels(__version__).set(1)
        of_account = ("provider", "account")

        self._ended = counter(
            "generations_ended_total", "Generations whose end is known.", *of_account, "status"
        )
        self._known_lag = histogram(
            "known_lag_seconds",
            "From the end at the provider to when it was known here: as the provider says (basis=told), or at"
            " most, since it last said otherwise (basis=at_most).",
            _LAGS,
            *("provider", "basis"),
        )
        self._asks_each = histogram(
            "asks_per_generation", "Requests to the provider until the end was known.", _ASKS, "provider"
        )
        self._asks = counter("asks_total", "Requests to providers, by how they went.", *of_account, "outcome")
        self._callbacks = counter("callbacks_total", "Callbacks that were taken.", "provider")

        self._attempts = counter("attempts_total", "Attempts, by how they went.", "outcome", "status")
        self._attempt_seconds = histogram(
            "attempt_duration_seconds", "How long attempts took, until their answers were read.", _LAGS[3:]
        )
        self._deliveries = counter("deliveries_ended_total", "Deliveries that attempts have ended.", "status")
        self._announce_lag = histogram(
            "announce_lag_seconds",
            "From when an event was stored to its delivery's first attempt, and to when it was delivered.",
            _LAGS,
            "until",
        )
        self._until_attempt = self._announce_lag.labels("first_attempt")
        self._until_delivered = self._announce_lag.labels("delivered")
        # Looking for a child costs more than counting in it.
        self._attempted = lru_cache(maxsize=100)(self._attempts.labels)
        self._delivery_ended = {one: self._deliveries.labels(one.value) for one in _ENDINGS}

        self._write_size = histogram("store_batch_size", "What was written at once.", _SIZES, "batch")
        self._write_seconds = histogram(
            "store_batch_duration_seconds", "How long that took, until it was durable.", _WRITES, "batch"
        )
        self._pruned = counter("pruned_rows_total", "What was removed because it was old.", "kind")
        self._prune_seconds = histogram(
            "prune_step_duration_seconds",
            "For how long one step of removing kept others from writing.",
            _WRITES,
        )
        self._loop_lag = histogram(
            "event_loop_lag_seconds", "By how much what was due at once began later.", _WRITES
        )

        # What is looked up when somebody asks.
        self.database_up = gauge("database_up", "1 while the database answers what is asked here.")
        self.deliveries_open = gauge(
            "deliveries_open",
            "Deliveries that have not ended, of at most 100,000: due now, and later or in hand. Every relay"
            " of a fleet says the same: take the largest.",
            "when",
        )
        self.oldest_due = gauge(
            "delivery_oldest_due_age_seconds",
            "For how long the delivery has been due that has been for longest; those of paused endpoints"
            " too. Every relay of a fleet says the same: take the largest.",
        )
        self.in_hand = gauge("deliveries_in_hand", "Deliveries in the memory of this relay.", "state")
        self.breakers = gauge("breakers", "Destinations in the memory of this relay, by state.", "state")
        self.accounts = gauge(
            "accounts", "Accounts that this relay asks with, by how they are.", *of_account, "status"
        )
        self.available = gauge(
            "account_requests_available", "Requests that an account may make at once now.", *of_account
        )
        self.left_today = gauge(
            "account_requests_left_today", "What is left of an account's requests_per_day.", *of_account
        )
        self.budget_wait = gauge(
            "account_wait_seconds", "How long an account must wait for its next request.", *of_account
        )
        self.failures = gauge("account_failures", "Failures in a row of an account.", *of_account)
        self.shards = gauge("shards_held", "Shards that this relay holds.")
        self.relays = gauge("relays", "Relays over this database, as this one knows.")
        self.database_bytes = gauge(
            "database_bytes",
            "The size of the database; SQLite: of its file (main), of what is written beside it (wal), and of"
            " what of the file is unused (free).",
            "part",
        )

    def render(self) -> bytes:
        """All of it, in Prometheus' text format; may be called in another thread."""
        return generate_latest(self.registry)

    def account(self, name: str) -> str:
        """What an account is called in labels: tenants that call theirs the same are one together."""
        shown = name if account.owner(name) is None else f"added:{account.shown(name)}"
        if shown not in self._accounts:
            if len(self._accounts) >= MOST_ACCOUNTS:
                return OTHER
            self._accounts.add(shown)
        return shown

    def asked(self, provider: str, account: str, error: ProviderError | None) -> None:
        """A provider was asked."""
        outcome = "ok" if error is None else error.code if error.code in _CODES else OTHER
        self._asks.labels(provider, self.account(account), outcome).inc()

    def called_back(self, provider: str) -> None:
        self._callbacks.labels(provider).inc()

    def ended(self, generation: Generation) -> None:
        """The end of a generation has just been recorded."""
        provider, known_at, update = generation.provider, generation.known_at, generation.update
        self._ended.labels(provider, self.account(generation.account), generation.status.value).inc()
        self._asks_each.labels(provider).observe(generation.asks + 1)
        if known_at is None:
            return
        if update is not None and update.completed_at is not None:
            self._known_lag.labels(provider, "told").observe(max(0, known_at - update.completed_at) / 1000)
        elif generation.open_at is not None:
            lag = max(0, known_at - generation.open_at) / 1000
            self._known_lag.labels(provider, "at_most").observe(lag)

    def settled(self, claimed: Claimed, settlement: Settlement) -> None:
        """An attempt has ended."""
        answer = settlement.answer
        outcome = "accepted" if answer.code is None else answer.code.value
        status = f"{answer.status // 100}xx" if answer.status is not None else "none"
        self._attempted(outcome, status).inc()
        self._attempt_seconds.observe(answer.duration_ms / 1000)
        if settlement.status in _ENDINGS:
            self._delivery_ended[settlement.status].inc()
        # What was replayed is no news any more.
        if not claimed.is_replayed:
            if claimed.attempts == 0:
                self._until_attempt.observe(max(0, answer.started_at - claimed.event_at) / 1000)
            if answer.accepted:
                lag = max(0, answer.started_at + answer.duration_ms - claimed.event_at) / 1000
                self._until_delivered.observe(lag)

    def written(self, batch: str) -> Callable[[int, float], None]:
        """What a batch of that name is to tell: how many it wrote at once, and how many seconds it took."""
        size, seconds = self._write_size.labels(batch), self._write_seconds.labels(batch)

        def note(count: int, took: float) -> None:
            size.observe(count)
            seconds.observe(took)

        return note

    def pruned(self, kind: str, count: int, took: float) -> None:
        """One step of retention kept others from writing for so many seconds."""
        self._pruned.labels(kind).inc(count)
        self._prune_seconds.observe(took)

    def loop_lagged(self, seconds: float) -> None:
        self._loop_lag.observe(seconds)

    def show_database(
        self, due: int, not_ended: int, oldest_due_at: int | None, sizes: Mapping[str, int], *, now: int
    ) -> None:
        """What was found in the database at `now`."""
        self.database_up.set(1)
        self.deliveries_open.labels("due").set(due)
        self.deliveries_open.labels("later").set(not_ended - due)
        late = max(0, now - oldest_due_at) / 1000 if oldest_due_at is not None else 0
        self.oldest_due.set(late)
        for part, size in sizes.items():
            self.database_bytes.labels(part).set(size)

    def forget_the_database(self) -> None:
        """It does not answer: figures of before would look like new ones."""
        self.database_up.set(0)
        self.oldest_due.set(math.nan)
        self.deliveries_open.clear()
        self.database_bytes.clear()

    def show_breakers(self, found: Mapping[State, int]) -> None:
        for state in State:
            self.breakers.labels(state.value).set(found.get(state, 0))

    def show_accounts(self, found: Iterable[tuple[str, str, Health, int, int | None, int, int]]) -> None:
        """Of each account: provider, name, status, requests available, left today, milliseconds to wait,
        failures in a row."""
        for one in (self.accounts, self.available, self.left_today, self.budget_wait, self.failures):
            one.clear()
        for provider, name, status, available, left, wait, failures in found:
            labels = (provider, self.account(name))
            for known in Health:
                self.accounts.labels(*labels, known.value).inc(known is status)
            self.available.labels(*labels).inc(available)
            if left is not None:
                self.left_today.labels(*labels).inc(left)
            waits = self.budget_wait.labels(*labels)
            waits.inc(wait / 1000)
            self.failures.labels(*labels).inc(failures)
