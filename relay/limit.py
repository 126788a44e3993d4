"""How often something may be done: so many a second for each key, and some at once."""

import heapq
import math
from collections.abc import Hashable

# A second, of whatever somebody may set: once in a quarter of an hour.
LOWEST_RATE = 0.001
# Nanoseconds, whole ones: nothing is lost to rounding, however large the time is.
_SECOND, _MILLISECOND = 1_000_000_000, 1_000_000


class Limit:
    """`per_second` for each key, `burst` of them at once; in any t seconds at most `burst + per_second * t`.

    It remembers `most_keys` at most: when there are more, those that nothing is left to be known of go first,
    then those that are nearest to it, and these begin anew.
    """

    def __init__(self, per_second: float, burst: int, *, most_keys: int = 10_000) -> None:
        if per_second <= 0 or burst < 1 or most_keys < 1:
            raise ValueError("a limit lets something in")
        self._pause = math.ceil(_SECOND / per_second)
        self._burst = burst * self._pause
        self._most_keys = most_keys
        # When each key may have its whole burst again.
        self._whole: dict[Hashable, int] = {}

    def take(self, key: Hashable, now: int) -> int:
        """0 when it is let in, else the milliseconds after which it may be tried again; that one is not
        counted. `now` is unix milliseconds; a clock that is set back costs no more than an empty burst."""
        at = now * _MILLISECOND
        if key not in self._whole and len(self._whole) >= self._most_keys:
            self._forget(at)
        # What lies further ahead than can be is from before the clock was set back.
        whole = min(max(self._whole.get(key, at), at), at + self._burst)
        early = whole + self._pause - self._burst - at
        self._whole[key] = whole if early > 0 else whole + self._pause
        return -(-early // _MILLISECOND) if early > 0 else 0

    def _forget(self, at: int) -> None:
        """Makes room for many: so it is seldom done, however many keys come."""
        kept = {key: min(whole, at + self._burst) for key, whole in self._whole.items() if whole > at}
        room = self._most_keys - max(1, self._most_keys // 10)
        for key in heapq.nsmallest(len(kept) - room, kept, key=kept.__getitem__):
            del kept[key]
        self._whole = kept
