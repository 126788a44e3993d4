"""The conditions and the order of a tenant's list, from the filters that were given.

Ids are ordered by time, so times and cursors are ranges of ids. The index of every list begins with the
tenant and ends with the id.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from relay.ids import first_id


def where(
    tenant: str,
    filters: Mapping[str, Any],
    *,
    prefix: str,
    columns: Mapping[str, str] | None = None,
    table: str = "",
    narrow: Sequence[str] = (),
    leading: Sequence[str] = (),
    cursor: str | None,
) -> tuple[str, str, dict[str, Any]]:
    """Conditions, order and values for what a tenant has: by `filters` those of `columns` by value, since and
    until. `table` is what tenant and id are columns of, with its full stop, where there are several.

    With a `narrow` filter few rows are left: sorting those beats reading all in order. A `leading` one has an
    index of tenant, itself and id: the list is a range of it, however rare or old what is looked for is.
    Without either it is a range of the index of tenant and id.
    """
    columns, id_column = {"tenant": f"{table}tenant", **(columns or {})}, f"{table}id"
    given = {**filters, "tenant": tenant}
    values = {name: given[name] for name in columns if name in given}
    sorts = any(name in filters for name in narrow)
    lead = None if sorts else next((name for name in leading if name in filters), "tenant")
    # A truth has no index: a planner may not use that of another one, and sort what it finds.
    truths = ("tenant",) if sorts else leading
    conditions = [
        f"({columns[name]} = :{name}) IS TRUE" if name in truths else f"{columns[name]} = :{name}"
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
        conditions += [f"{id_column} {comparison} :{name}" for name, comparison in bounds.items()]
        # The expression keeps a planner from walking the primary key for the order's sake.
        return " AND ".join(conditions), f"{id_column} || '' DESC", values
    # Were the column equal to a value, the ids alone would be the order, and a planner would walk those.
    column = columns[lead]
    conditions += [f"({column}, {id_column}) {bounds[name]} (:{lead}, :{name})" for name in bounds]
    conditions += [f"{column} >= :{lead}"] if "since" not in bounds else []
    conditions += [f"{column} <= :{lead}"] if bounds.keys() <= {"since"} else []
    return " AND ".join(conditions), f"{column} DESC, {id_column} DESC", values
