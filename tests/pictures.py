"""The README's pictures of the states, made from the tables that the program obeys.

`python -m tests.pictures` writes them into the README; a test compares.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from relay import delivery, generation

README = Path(__file__).parent.parent / "README.md"
TABLES: Mapping[str, tuple[Mapping[StrEnum, frozenset[StrEnum]], StrEnum]] = {
    "relay.generation.MOVES": (generation.MOVES, generation.Status.QUEUED),
    "relay.delivery.MOVES": (delivery.MOVES, delivery.Status.PENDING),
}


def picture(moves: Mapping[StrEnum, frozenset[StrEnum]], start: StrEnum) -> str:
    """A Mermaid state diagram with an arrow for each move."""
    lines = ["stateDiagram-v2", f"  [*] --> {start}"]
    for status, following in moves.items():
        lines += [f"  {status} --> {one}" for one in type(status) if one in following]
        lines += [] if following else [f"  {status} --> [*]"]
    return "\n".join(lines)


def with_pictures(text: str) -> str:
    """The README with each picture as its table has it now."""
    for table, (moves, start) in TABLES.items():
        block = rf"(generated from {re.escape(table)}[^\n]*\n```mermaid\n).*?(\n```)"
        text, count = re.subn(block, rf"\g<1>{picture(moves, start)}\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the README has {count} pictures of {table}")
    return text


if __name__ == "__main__":
    README.write_text(with_pictures(README.read_text("utf-8")), "utf-8")
