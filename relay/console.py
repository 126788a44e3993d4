"""What the commands print to."""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.markup import escape

# Ids must come out whole where a program or a pipe reads them.
out, err = Console(width=None if sys.stdout.isatty() else 240), Console(stderr=True)
# For what is read as text, not as a table: as it is, however long.
PLAIN: Mapping[str, Any] = MappingProxyType({"highlight": False, "soft_wrap": True})


def complain(message: str) -> None:
    """Says what was wrong, a line for each of it."""
    for line in message.splitlines():
        err.print(f"[red]relay:[/] {escape(line)}", **PLAIN)
