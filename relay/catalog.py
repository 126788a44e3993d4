"""The catalog: which types of events tenants have declared, as it was read last.

A relay that changes one tells the others by the bell; who did not hear it finds out within ten seconds.
"""

from collections.abc import Callable, Mapping

from relay.store import Store

READ_EVERY = 10_000
_MOST_TENANTS = 1_000


class Catalog:
    """The schemas of declared types, by tenant."""

    def __init__(self, store: Store, *, ring: Callable[[str, str], None], now: Callable[[], int]) -> None:
        self._store, self._ring, self._now = store, ring, now
        self._known: dict[str, tuple[int, Mapping[str, str]]] = {}
        self._changes = 0

    async def schemas(self, tenant: str) -> Mapping[str, str]:
        """Those of a tenant's types that have one."""
        now, before = self._now(), self._changes
        known = self._known.get(tenant)
        if known is not None and 0 <= now - known[0] < READ_EVERY:
            return known[1]
        schemas = await self._store.types.schemas(tenant)
        # What has changed meanwhile may not be among it.
        if before == self._changes:
            if len(self._known) >= _MOST_TENANTS:
                self._known.clear()
            self._known[tenant] = now, schemas
        return schemas

    def changed(self, tenant: str) -> None:
        """A type of this tenant has been changed by this relay."""
        self.forget(tenant)
        self._ring("types", tenant)

    def forget(self, tenant: str) -> None:
        self._changes += 1
        self._known.pop(tenant, None)
