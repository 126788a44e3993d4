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
    leading: Sequence[str] = (),
    cursor: str | None,
) -> tuple[str, str, dict[str, Any]]:
    """Conditions (`AND …`), order and values for `filters`: those of `columns` by value, since and until.

    With a `narrow` filter few rows are left: sorting those beats reading all in order. A `leading` one has an
    index that goes on with the id: the list is a range of it, however rare or old what is looked for is.
    """
    values: dict[str, Any] = {name: filters[name] for name in columns if name in filters}
    sorts = any(name in filters for name in narrow)
    lead = None if sorts else next((name for name in leading if name in filters), None)
    # A truth has no index: a planner may not use that of a second one, and sort what it finds.
    truths = [name for name in leading if lead not in (None, name)]
    conditions = [
        f"AND ({columns[name]} = :{name}) IS TRUE" if name in truths else f"AND {columns[name]} = :{name}"
        for name in values
        if name != lead
    ]
    ranges = {
        "since": (">=", first_id(prefix, filters["since"]) if "since" in filters else None),
        "until": ("<", first_id(prefix, filters["until"]) if "until" in filters else None),
        "cursor": ("<", cursor),
    }
    bounds = {name: comparison for name, (comparison, bound) in ranges.items() if bound is not None}
    values |= {name: ranges[name][1] for name in bounds}
    if lead is None:
        conditions += [f"AND {id_column} {comparison} :{name}" for name, comparison in bounds.items()]
        # The expression keeps a planner from walking the primary key for the order's sake.
        return " ".join(conditions), f"{id_column} || '' DESC" if sorts else f"{id_column} DESC", values
    # Were the column equal to a value, the ids alone would be the order, and a planner would walk those.
    column = columns[lead]
    conditions += [f"AND ({column}, {id_column}) {bounds[name]} (:{lead}, :{name})" for name in bounds]
    conditions += [f"AND {column} >= :{lead}"] if "since" not in bounds else []
    conditions += [f"AND {column} <= :{lead}"] if bounds.keys() <= {"since"} else []
    return " ".join(conditions), f"{column} DESC, {id_column} DESC", values
