"""What accounts are called.

An account of the configuration has one name. One that a tenant has added is called `<tenant>.<name>` by Relay
(in the database, in shards, in callback URLs) and `<name>` by its tenant (in the API, in events): two tenants
may use the same name. No name of a tenant or an account contains a full stop.
"""

import re
from collections.abc import Sequence

from relay.tenant import NAME as NAME_OF_TENANT

NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"


def inner(tenant: str, shown: str) -> str:
    """What Relay calls the account that a tenant has added under this name."""
    return f"{tenant}.{shown}"


def shown(name: str) -> str:
    """What tenants call an account."""
    return name.rpartition(".")[2]


def owner(name: str) -> str | None:
    """The tenant that has added an account; None for one of the configuration."""
    return name.rpartition(".")[0] or None


def is_inner(name: str) -> bool:
    """Whether an account that a tenant has added may have this name."""
    tenant, _, own = name.partition(".")
    return is_name(own) and re.fullmatch(NAME_OF_TENANT, tenant) is not None


def is_name(text: str) -> bool:
    """Whether a tenant may call an account so."""
    return re.fullmatch(NAME, text) is not None


def meant(tenant: str, shown: str) -> Sequence[str]:
    """Which accounts a tenant may mean by a name, whether they are there or not: one of its own, and one of
    the configuration."""
    return [inner(tenant, shown), shown] if is_name(shown) else []
