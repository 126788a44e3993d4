"""The roster: which accounts there are, those of the configuration and those that tenants have added.

The added ones are in the database. A relay that changes one tells the others by the bell; who did not hear it
finds out within a minute, or sooner when it is asked about an account that it does not know.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from relay import account
from relay.batch import Batch
from relay.errors import ConfigError, RelayError
from relay.providers import PROVIDERS, Account, load
from relay.store import Store
from relay.store.credentials import Credential

log = logging.getLogger(__name__)
# What was not heard of is found so often.
READ_EVERY = 60_000


class Roster(Mapping[str, Account]):
    """All accounts, by the names that Relay itself uses. `check` raises ConfigError for a base URL that must
    not be used."""

    def __init__(
        self,
        configured: Mapping[str, Account],
        store: Store,
        *,
        check: Callable[[str], None],
        now: Callable[[], int],
    ) -> None:
        self._configured, self._store, self._check, self._now = configured, store, check, now
        self._added: dict[str, Account] = {}
        self._versions: dict[str, int] = {}
        self._heard: set[str] = set()  # names whose accounts may be others by now
        self._reading = asyncio.Lock()
        self._looks: Batch[str, None] = Batch(self._look)
        self._read_at = 0

    def __getitem__(self, name: str) -> Account:
        return self._added.get(name) or self._configured[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._configured
        yield from self._added

    def __len__(self) -> int:
        return len(self._configured) + len(self._added)

    def of(self, tenant: str) -> Mapping[str, Account]:
        """The accounts that a tenant has, by the names it knows them by. One of its own hides one of the
        configuration that came to have the same name later."""
        given = {name: one for name, one in self._configured.items() if one.is_of(tenant)}
        return given | {one.shown: one for one in self._added.values() if one.owner == tenant}

    async def find(self, tenant: str, shown: str) -> Account | None:
        """The account that a tenant knows by this name; None for another one's as for none at all."""
        if not account.is_name(shown):
            return None
        own, given = account.inner(tenant, shown), self._configured.get(shown)
        if own not in self._added and given is not None and given.is_of(tenant):
            return given
        return await self.seek(own)

    async def seek(self, name: str) -> Account | None:
        """The account of this name; one that is not known here may have been added a moment ago."""
        if name not in self and account.is_inner(name):
            await self.look([name])
        return self.get(name)

    def hear(self, name: str) -> None:
        """Somebody has added, changed or deleted this account: `renew` reads it."""
        self._heard.add(name)

    async def renew(self) -> None:
        """Reads what others have changed, as far as that is known, and now and then all."""
        names, self._heard = self._heard, set()
        is_old = not 0 <= self._now() - self._read_at < READ_EVERY
        try:
            if is_old and not self._store.database.alone:
                await self.look_at_all()
            elif names:
                await self.look(names)
        except BaseException:
            self._heard |= names
            raise

    async def look_at_all(self) -> None:
        """Reads what has changed since it was read last."""
        async with self._reading:
            versions = await self._store.credentials.versions()
            gone = self._versions.keys() - versions.keys()
            changed = {name for name, version in versions.items() if self._versions.get(name) != version}
            await self._read(gone | changed)
            self._read_at = self._now()

    async def look(self, names: Collection[str]) -> None:
        """Reads these accounts as they are now. Whoever names accounts that are not there, be it a stranger
        at a callback URL, makes nobody wait for more than one read."""
        await asyncio.gather(*map(self._looks, names))

    async def _look(self, names: Sequence[str]) -> Sequence[None]:
        # One after the other: who reads later knows more.
        async with self._reading:
            await self._read(set(names))
        return [None] * len(names)

    async def _read(self, names: Collection[str]) -> None:
        found = {one.name: one for one in await self._store.credentials.get_many(names)}
        for name in names:
            if name in found:
                self._learn(found[name])
            else:
                self._added.pop(name, None)
                self._versions.pop(name, None)

    def _learn(self, credential: Credential) -> None:
        """The one place where this process gets to know an added account.

        Its secrets are blotted out of what its own provider says (`relay.asker`) and of nothing else: who
        chose them could choose as well what other tenants and the operator are shown."""
        name = credential.name
        if self._versions.get(name) == credential.updated_at:
            return
        self._versions[name] = credential.updated_at
        try:
            self._added[name] = self._account(credential)
        except RelayError as error:
            # The others are not to suffer for it; its generations are as those of an account that is gone.
            log.error("account.unusable", extra={"account": name, "error": str(error)})
            self._added.pop(name, None)

    def _account(self, credential: Credential) -> Account:
        if credential.provider not in PROVIDERS:
            raise ConfigError(f"there is no provider {credential.provider!r} in this release")
        if credential.base_url is not None:
            self._check(credential.base_url)
        return Account.at(
            load(credential.provider),
            credential.name,
            api_key=credential.api_key,
            base_url=credential.base_url,
            timeout=credential.timeout,
            poll_interval=credential.poll_interval,
            requests_per_minute=credential.requests_per_minute,
            requests_per_day=credential.requests_per_day,
            webhook_secrets=credential.webhook_secrets,
            tenants=(credential.tenant,),
        )
