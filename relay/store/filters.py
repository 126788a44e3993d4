"""The conditions and the order of a list, from the filters that were given.

Ids are ordered by time, so times and cursors are ranges of ids, which every list has an index for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from relay.ids import first_id


def where(
    filters: Mapping[str, Any],
    *,
    prefix: str,
    columns: Mapping[str, str],
    id_column: str = "id",
    narrow: Sequence[str] = (),
    cursor: str | None,
) -> tuple[str, str, dict[str, Any]]:
    """Conditions (`AND …`), order and values for `filters`: those of `columns` by value, since and until.

    With a `narrow` filter few rows are left: sorting those beats reading all in order.
    """
    values: dict[str, Any] = {name: filters[name] for name in columns if name in filters}
    conditions = [f"AND {columns[name]} = :{name}" for name in values]
    ranges = {
        "since": (">=", first_id(prefix, filters["since"]) if "since" in filters else None),
        "until": ("<", first_id(prefix, filters["until"]) if "until" in filters else None),
        "cursor": ("<", cursor),
    }
    for name, (comparison, bound) in ranges.items():
        if bound is not None:
            conditions.append(f"AND {id_column} {comparison} :{name}")
            values[name] = bound
    sorts = any(name in filters for name in narrow)
    # The expression keeps a planner from walking the primary key for the order's sake.
    order = f"{id_column} || '' DESC" if sorts else f"{id_column} DESC"
    return " ".join(conditions), order, values
