"""Ids: a prefix that names the kind, an underscore, and a ULID: 26 characters that sort by time.

ep_ endpoint · gen_ generation · evt_ event · dlv_ delivery · att_ attempt · rpl_ replay
key_ API key · aud_ entry of the audit log
"""

from ulid import ULID

# Milliseconds from an id's making to its commit, at most: more than a transaction may take, and more than
# clocks may differ.
LATE = 30_000


def new_id(prefix: str, now: int) -> str:
    """A new id; `now` is unix milliseconds, the rest is random."""
    return f"{prefix}_{ULID.from_timestamp(now)}"


def first_id(prefix: str, at: int) -> str:
    """What every id of that kind made at or after `at` (unix milliseconds) is not less than."""
    return f"{prefix}_{ULID.from_bytes(at.to_bytes(6) + bytes(10))}"


def made_at(id_: str) -> int:
    """When an id was made, in unix milliseconds. Raises ValueError for what is none."""
    return ULID.from_str(id_.partition("_")[2]).milliseconds
