"""How several relays divide the work: accounts and destinations fall into shards by their names, and a shard
is held by one relay at a time. Whoever holds it alone asks its accounts and sends to its destinations, so
that a budget, a breaker or a limit that one relay keeps in memory holds for all relays together.
"""

import zlib
from collections.abc import Collection, Iterable

SHARDS = 64
FOREVER = 2**62


def shard_of(name: str) -> int:
    """The number of the shard of an account or a destination: the same in every relay and release."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % SHARDS


def share(relays: int) -> int:
    """How many shards each of so many relays holds at most."""
    return -(-SHARDS // max(1, relays))


class Held:
    """The shards that this relay holds, and until when. Times are unix milliseconds.

    One that it is about to give away is held still, but covers nothing any more. `relays` is how many relays
    there are, this one included.
    """

    def __init__(self) -> None:
        self.relays = 1
        self._until: dict[int, int] = {}
        self._since: dict[int, int] = {}
        self._leaving: set[int] = set()

    @property
    def numbers(self) -> Collection[int]:
        return self._until.keys()

    @property
    def staying(self) -> Collection[int]:
        """Those that are not about to be given away."""
        return self._until.keys() - self._leaving

    def covers(self, name: str, until: int) -> bool:
        """Whether an account or a destination is this relay's alone until then."""
        number = shard_of(name)
        return number not in self._leaving and self._until.get(number, -1) >= until

    def has(self, name: str) -> bool:
        """Whether an account or a destination is this relay's, though it may be about to be given away."""
        return shard_of(name) in self._until

    def since(self, name: str) -> int:
        """Since when it has been; another relay may have used it until then."""
        return self._since.get(shard_of(name), 0)

    def take(self, numbers: Iterable[int], *, since: int, until: int) -> None:
        for number in numbers:
            self._since[number], self._until[number] = since, until

    def renew(self, *, until: int) -> None:
        for number in self._until:
            self._until[number] = until

    def leave(self, numbers: Iterable[int]) -> None:
        """They are about to be given away."""
        self._leaving.update(numbers)

    def stay(self, numbers: Iterable[int]) -> None:
        """They are not given away after all."""
        self._leaving.difference_update(numbers)

    def lose(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._until.pop(number, None)
            self._since.pop(number, None)
            self._leaving.discard(number)
