"""Whether the loops still beat: one that hangs or crashes falls silent."""

from collections.abc import Mapping

# A loop may miss a few of its beats, and a slow machine may be slow; seconds.
_BEATS, _PATIENCE = 3, 30.0


class Pulse:
    """The beats of the loops that are expected to. Times are seconds of a clock that is never set."""

    def __init__(self) -> None:
        self._every: dict[str, float] = {}
        self._beaten_at: dict[str, float] = {}

    def expect(self, loop: str, *, every: float, now: float) -> None:
        """From now on it beats about every so many seconds."""
        self._every[loop], self._beaten_at[loop] = every, now

    def beat(self, loop: str, now: float) -> None:
        self._beaten_at[loop] = now

    def silent(self, now: float) -> Mapping[str, float | None]:
        """For each loop how many seconds it has been silent for, None where that is not too long."""
        since = {loop: now - at for loop, at in self._beaten_at.items()}
        return {
            loop: since[loop] if since[loop] > _BEATS * every + _PATIENCE else None
            for loop, every in self._every.items()
        }
