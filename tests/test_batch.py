"""Group commit, and insisting."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from relay.batch import Batch, insist
from relay.errors import StoreError


class Ledger:
    """A write that waits until it is let go, keeps its groups, and refuses negative items."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.begun = asyncio.Semaphore(0)
        self.gate = asyncio.Event()

    async def write(self, items: Sequence[int]) -> Sequence[str]:
        self.begun.release()
        await self.gate.wait()
        self.groups.append(list(items))
        if any(item < 0 for item in items):
            raise ValueError(f"cannot write {items}")
        return [f"wrote {item}" for item in items]


def calls(batch: Batch[int, str], *items: int) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(batch(item)) for item in items]


async def while_writing(ledger: Ledger, batch: Batch[int, str], *items: int) -> list[asyncio.Task[str]]:
    """A call with 0 whose write has begun, and calls with `items` that wait behind it."""
    first = calls(batch, 0)
    await ledger.begun.acquire()
    later = calls(batch, *items)
    await asyncio.sleep(0)  # lets them take their places
    return first + later


async def test_what_arrives_during_a_write_is_the_next_write_in_its_order():
    ledger = Ledger()
    waiting = await while_writing(ledger, Batch(ledger.write), 3, 1, 2)
    ledger.gate.set()
    assert await asyncio.gather(*waiting) == ["wrote 0", "wrote 3", "wrote 1", "wrote 2"]
    assert ledger.groups == [[0], [3, 1, 2]]


async def test_a_write_takes_at_most_its_limit():
    ledger = Ledger()
    waiting = await while_writing(ledger, Batch(ledger.write, limit=2), 1, 2, 3, 4, 5)
    ledger.gate.set()
    await asyncio.gather(*waiting)
    assert ledger.groups == [[0], [1, 2], [3, 4], [5]]


async def test_nobody_is_answered_before_the_write_has_returned():
    ledger = Ledger()
    waiting = await while_writing(ledger, Batch(ledger.write), 1)
    assert not any(call.done() for call in waiting)
    ledger.gate.set()
    await asyncio.gather(*waiting)


async def test_one_bad_item_fails_alone():
    ledger = Ledger()
    waiting = await while_writing(ledger, Batch(ledger.write), 1, -2, 3)
    ledger.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [results[0], results[1], results[3]] == ["wrote 0", "wrote 1", "wrote 3"]
    assert isinstance(results[2], ValueError)


async def test_a_failed_write_does_not_stop_the_next_one():
    ledger = Ledger()
    ledger.gate.set()
    batch = Batch(ledger.write)
    with pytest.raises(ValueError, match="cannot write"):
        await batch(-1)
    assert await batch(1) == "wrote 1"


@pytest.mark.parametrize("place", [0, 2], ids=["being written", "waiting"])
async def test_a_caller_that_goes_away_takes_nothing_with_it(place: int):
    ledger = Ledger()
    batch = Batch(ledger.write)
    waiting = await while_writing(ledger, batch, 1, 2, 3)
    waiting[place].cancel()
    ledger.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results.pop(place), asyncio.CancelledError)
    assert results == [f"wrote {item}" for item in range(4) if item != place]
    assert ledger.groups == [[0], [1, 2, 3]]


async def test_a_caller_that_goes_away_is_no_failure_of_a_write_that_fails():
    ledger = Ledger()
    waiting = await while_writing(ledger, Batch(ledger.write), -1, 2)
    waiting[1].cancel()
    ledger.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert (results[0], results[2]) == ("wrote 0", "wrote 2")


async def test_flush_returns_when_everything_that_waits_is_written():
    ledger = Ledger()
    batch = Batch(ledger.write)
    waiting = await while_writing(ledger, batch, 1, -2)
    flushing = asyncio.create_task(batch.flush())
    await asyncio.sleep(0)
    assert not flushing.done()
    ledger.gate.set()
    await flushing
    assert ledger.groups[:2] == [[0], [1, -2]]
    assert isinstance((await asyncio.gather(*waiting, return_exceptions=True))[2], ValueError)


async def test_flush_of_nothing_returns_at_once():
    await Batch(Ledger().write).flush()


@dataclass
class Moody:
    """A write that fails so often, and then says how many tries it took."""

    failures: int
    general: bool = True
    tries: int = 0

    async def write(self) -> int:
        self.tries += 1
        if self.tries <= self.failures:
            raise StoreError("not now", general=self.general)
        return self.tries


async def test_who_insists_is_answered_once_the_store_takes_it():
    assert await insist(Moody(failures=3).write, again=lambda: True) == 4


async def test_nobody_insists_on_what_the_store_will_never_take():
    moody = Moody(failures=1, general=False)
    with pytest.raises(StoreError):
        await insist(moody.write, again=lambda: True)
    assert moody.tries == 1


async def test_who_insists_gives_up_when_it_is_no_use_any_more():
    moody, patience = Moody(failures=9), iter([True, True, False])
    with pytest.raises(StoreError):
        await insist(moody.write, again=lambda: next(patience))
    assert moody.tries == 3
