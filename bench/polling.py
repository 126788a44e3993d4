"""How soon an end is known, for how many requests: `python -m bench.polling [--quick] [--json F] [--plot F]`.

The relay's own scheduling code against jobs on a virtual clock, beside what official clients do, capped
exponential backoff, and the best that anybody could do who knew the distribution of durations.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pygal
from rich.console import Console
from rich.table import Table

from relay.budget import Budget
from relay.generation import Generation, Status, Update
from relay.schedule import Ask, Pace, first_ask, next_ask
from relay.standing import Standing

SECOND, FIXED = 1000.0, (0.5, 2, 3, 5, 6)
PACE = Pace(interval=100, timeout=3_600_000, typical=(20_000, 1.0))
TAUGHT = 200
console = Console(width=120)
Draw = Callable[[random.Random], float]
NextLook = Callable[[float], float]


@dataclass(frozen=True)
class Result:
    """What a way of asking cost and brought; lags in seconds."""

    requests: float
    mean: float
    p95: float


def log_normal(median: float, sigma: float) -> Draw:
    return lambda dice: median * SECOND * math.exp(dice.gauss(0, sigma))


def bimodal(dice: random.Random) -> float:
    return (8 if dice.random() < 0.6 else 60) * SECOND * math.exp(dice.gauss(0, 0.2))


DISTRIBUTIONS: Mapping[str, Draw] = {
    **{
        f"median {median} s, σ {sigma}": log_normal(median, sigma)
        for median in (12, 90)
        for sigma in (0.3, 0.4, 0.6, 1.0)
    },
    "8 s or 60 s": bimodal,
}


def outcome(lags: Sequence[float], requests: int) -> Result:
    ordered = sorted(lags)
    return Result(
        requests / len(lags),
        statistics.fmean(lags) / SECOND,
        ordered[int(len(ordered) * 0.95)] / SECOND,
    )


def measured(next_look: NextLook, durations: Sequence[float]) -> Result:
    """Asks each job at the ages that `next_look` gives, until it has ended."""
    lags, requests = [], 0
    for duration in durations:
        age = 0.0
        while True:
            age = next_look(age)
            requests += 1
            if age >= duration:
                break
        lags.append(age - duration)
    return outcome(lags, requests)


def fixed(seconds: float) -> NextLook:
    return lambda age: age + seconds * SECOND


def exponential(age: float) -> float:
    """0.5 s, doubling up to 10 s, as one official sample does."""
    pause, at = 0.5 * SECOND, 0.0
    while (at := at + pause) <= age:
        pause = min(pause * 2, 10 * SECOND)
    return at


def job(created_at: float, *, model: str | None = None) -> Generation:
    at = round(created_at)
    update = Update(Status.PROCESSING, model=model) if model else None
    return Generation(
        f"gen_{at}",
        "bench",
        "bench",
        "bench",
        "job",
        Status.PROCESSING,
        at,
        at + PACE.timeout,
        at,
        update=update,
    )


def relays(standing: Standing, dice: random.Random, scarcity: float) -> NextLook:
    """The relay's own way; `scarcity` makes asks dearer, or cheaper, than by default."""
    watched = job(0)

    def next_look(age: float) -> float:
        ask = next_ask(
            watched, PACE, standing.plan(), now=round(age), spread=dice.random(), scarcity=scarcity
        )
        assert ask.due_at is not None  # noqa: S101 # it has not ended
        return float(ask.due_at)

    return next_look


def taught(draw: Draw, dice: random.Random, *, exact: bool) -> Standing:
    """A standing that has watched TAUGHT jobs with its own schedule; `exact`: the provider says how long each
    took, else only the asks before and after its end are known."""
    standing = Standing(PACE, Budget())
    for _ in range(TAUGHT):
        duration = draw(dice)
        next_look, before, age = relays(standing, dice, 1.0), 0.0, 0.0
        while age < duration:
            before, age = age, next_look(age)
        told = Update(Status.COMPLETED, duration_ms=round(duration) if exact else None)
        standing.learn(
            replace(job(0), status=Status.COMPLETED, update=told, known_at=round(age), open_at=round(before))
        )
    return standing


def oracles(draw: Draw, dice: random.Random, price: float, points: int = 500) -> NextLook:
    """The best ages to ask at for somebody who knows the distribution: dynamic programming over its
    quantiles, where each ask costs `price` milliseconds of lag."""
    sample = sorted(draw(dice) for _ in range(points * 40))
    ages = [0.0, *(sample[40 * k - 1] for k in range(1, points + 1)), sample[-1] * 2]
    shares = [0.0, *(1 / points for _ in range(points)), 0.0]
    below, moment = [0.0], [0.0]
    for (before, after), share in zip(pairwise(ages), shares[1:], strict=True):
        below.append(below[-1] + share)
        moment.append(moment[-1] + share * (before + after) / 2)
    cost, step = [0.0] * len(ages), [len(ages) - 1] * len(ages)
    for k in range(len(ages) - 2, -1, -1):
        alive = price * (1 - below[k])
        best = math.inf
        for after in range(k + 1, len(ages)):
            lag = ages[after] * (below[after] - below[k]) - (moment[after] - moment[k])
            if alive + lag >= best:
                if lag >= best:
                    break
                continue
            if (total := alive + lag + cost[after]) < best:
                best, step[k] = total, after
        cost[k] = best
    asks, k = [0.0], 0
    while k < len(ages) - 1:
        k = step[k]
        asks.append(ages[k])
    return lambda age: asks[min(bisect_right(asks, age), len(asks) - 1)] if age < asks[-1] else age * 1.1


def at_requests(curve: Sequence[Result], requests: float) -> float:
    """The mean lag of a way of asking at so many requests, between those that were measured."""
    ordered = sorted(curve, key=lambda one: one.requests)
    for before, after in pairwise(ordered):
        if before.requests <= requests <= after.requests:
            share = math.log(requests / before.requests) / math.log(after.requests / before.requests or 1)
            return math.exp((1 - share) * math.log(before.mean) + share * math.log(after.mean))
    return math.nan


@dataclass(frozen=True)
class Watching:
    """What one way of asking did under scarcity."""

    lags: Sequence[float]
    requests: int
    longest: float  # that any job was not asked about, in milliseconds


def crowd(
    draws: Sequence[Draw], dice: random.Random, *, jobs: int, per_second: float | None
) -> list[tuple[float, float, int]]:
    """(beginning, duration, kind) of each job: all at once, or so many a second."""
    at, made = 0.0, []
    for _ in range(jobs):
        kind = dice.randrange(len(draws))
        made.append((at, draws[kind](dice), kind))
        at += dice.expovariate(per_second) * SECOND if per_second else 0
    return made


def round_robin(jobs: Sequence[tuple[float, float, int]], per_minute: int) -> Watching:
    """Asks about one job after the other, as often as the budget allows."""
    budget, now, requests = Budget(per_minute), 0.0, 0
    waiting = [(begin, number, begin) for number, (begin, _, _) in enumerate(jobs)]
    heapq.heapify(waiting)
    lags, longest = [], 0.0
    while waiting:
        turn, number, asked = heapq.heappop(waiting)
        now = max(now, turn)
        now += budget.wait(round(now))
        budget.take(round(now))
        requests += 1
        longest = max(longest, now - asked)
        begin, duration, _ = jobs[number]
        if now >= begin + duration:
            lags.append(now - begin - duration)
        else:
            heapq.heappush(waiting, (now, number, now))
    return Watching(lags, requests, longest)


def by_relay(
    jobs: Sequence[tuple[float, float, int]],
    per_minute: int,
    standings: Sequence[Standing],
    dice: random.Random,
) -> Watching:
    """As the poller does it: every quarter of a second, what is due, the likeliest to have ended first."""
    budget, now = Budget(per_minute), 0.0
    coming = sorted(range(len(jobs)), key=lambda number: jobs[number][0], reverse=True)
    due: dict[int, tuple[Ask, float]] = {}  # and when it was last asked about
    lags: list[float] = []
    requests, longest = 0, 0.0
    while coming or due:
        while coming and jobs[coming[-1]][0] <= now:
            number = coming.pop()
            begin, _, kind = jobs[number]
            ask = first_ask(
                PACE,
                standings[kind].plan(),
                now=round(begin),
                deadline_at=round(begin) + PACE.timeout,
                job_known=True,
                awaits_callback=False,
            )
            due[number] = (ask, begin)
        room = budget.available(round(now))
        waiting = [number for number, (ask, _) in due.items() if (ask.due_at or 0) <= now]
        waiting.sort(key=lambda number: likely(due[number][0], now), reverse=True)
        for number in waiting[:room]:
            budget.take(round(now))
            requests += 1
            begin, duration, kind = jobs[number]
            longest = max(longest, now - due[number][1])
            if now >= begin + duration:
                lags.append(now - begin - duration)
                del due[number]
                continue
            ask = next_ask(
                job(begin),
                PACE,
                standings[kind].plan(),
                now=round(now),
                spread=dice.random(),
            )
            due[number] = (ask, now)
        now += 250
    return Watching(lags, requests, longest)


def likely(ask: Ask, now: float) -> float:
    return ask.chance + ask.rate * (now - (ask.due_at or 0))


def plenty(seed: int, many: int) -> dict[str, dict[str, Result]]:
    """Each distribution: each way of asking; `relay`, `learned` and `oracle` at several prices."""
    results: dict[str, dict[str, Result]] = {}
    prices = [2.0**power for power in range(-2, 4)]
    for name, draw in DISTRIBUTIONS.items():
        dice = random.Random(seed)  # noqa: S311 # a simulation
        durations = [draw(dice) for _ in range(many)]
        ways: dict[str, NextLook] = {f"fixed {one} s": fixed(one) for one in FIXED}
        ways["exponential"] = exponential
        for exact, kind in ((True, "relay"), (False, "relay, from its asks only")):
            standing = taught(draw, dice, exact=exact)
            ways |= {f"{kind} × {one:g}": relays(standing, dice, one) for one in prices}
        median = statistics.median(durations)
        ways |= {f"oracle × {one:g}": oracles(draw, dice, 0.01 * median * one**2) for one in prices}
        results[name] = {way: measured(next_look, durations) for way, next_look in ways.items()}
        console.print(f"  {name}: done", highlight=False)
    return results


def curve(ways: Mapping[str, Result], kind: str) -> list[Result]:
    return [result for way, result in ways.items() if way.rpartition(" × ")[0] == kind]


def show_plenty(results: Mapping[str, Mapping[str, Result]]) -> None:
    for name, ways in results.items():
        table = Table(
            "way",
            "requests",
            "mean lag s",
            "p95 lag s",
            "relay's lag at as many requests",
            "oracle's",
            title=name,
        )
        for way in (
            *(f"fixed {one} s" for one in FIXED),
            "exponential",
            "relay × 1",
            "relay, from its asks only × 1",
        ):
            one = ways[way]
            ratios = [at_requests(curve(ways, kind), one.requests) / one.mean for kind in ("relay", "oracle")]
            table.add_row(
                way,
                f"{one.requests:.1f}",
                f"{one.mean:.2f}",
                f"{one.p95:.2f}",
                *(f"{ratio:.2f} ×" if math.isfinite(ratio) else "–" for ratio in ratios),
            )
        console.print(table)


def lag_against_requests(ways: Mapping[str, Result]) -> bytes:
    """A picture of what each way costs and brings, as SVG."""
    chart = pygal.XY(
        title="Median 12 s, σ 0.3: how late an end is known, for how many requests",
        x_title="requests for each job",
        y_title="mean lag in seconds",
        xrange=(0, 15),
        range=(0, 5),
        js=[],
        style=pygal.style.CleanStyle,
        disable_xml_declaration=True,
    )
    for name in ("relay", "oracle"):
        chart.add(
            name, sorted((one.requests, one.mean) for one in curve(ways, name) if 1 < one.requests < 15)
        )
    points = [ways[f"fixed {one} s"] for one in FIXED]
    chart.add("fixed interval", [(one.requests, one.mean) for one in points if one.requests < 15])
    chart.add("exponential", [(ways["exponential"].requests, ways["exponential"].mean)], stroke=False)
    return str(chart.render()).encode()


def scarce(seed: int, rounds: int) -> dict[str, dict[str, Watching]]:
    """100 jobs (or ten times as many, coming one by one) on 60 requests a minute."""
    image, video = log_normal(12, 0.3), log_normal(90, 0.3)
    crowds: Mapping[str, tuple[Sequence[Draw], int, float | None]] = {
        "100 at once, median 90 s, σ 0.3": ([video], 100, None),
        "100 at once, 12 s and 90 s": ([image, video], 100, None),
        "0.4 a second, median 90 s, σ 0.3": ([video], 1000, 0.4),
        "0.4 a second, 12 s and 90 s": ([image, video], 1000, 0.4),
        "0.6 a second, 12 s and 90 s": ([image, video], 1000, 0.6),
    }
    results: dict[str, dict[str, Watching]] = {}
    for name, (draws, jobs, per_second) in crowds.items():
        dice = random.Random(seed)  # noqa: S311 # a simulation
        standings = [taught(draw, dice, exact=True) for draw in draws]
        ways: dict[str, list[Watching]] = {"relay": [], "round-robin": []}
        for _ in range(rounds):
            made = crowd(draws, dice, jobs=jobs, per_second=per_second)
            ways["relay"].append(by_relay(made, 60, standings, dice))
            ways["round-robin"].append(round_robin(made, 60))
        results[name] = {
            way: Watching(
                [lag for one in found for lag in one.lags],
                sum(one.requests for one in found),
                max(one.longest for one in found),
            )
            for way, found in ways.items()
        }
    return results


def show_scarce(results: Mapping[str, Mapping[str, Watching]]) -> None:
    table = Table(
        "60 requests a minute",
        "way",
        "requests",
        "mean lag s",
        "p95 lag s",
        "longest unasked s",
        "of round-robin's",
    )
    for name, ways in results.items():
        theirs = statistics.fmean(ways["round-robin"].lags)
        for way, one in ways.items():
            result = outcome(one.lags, one.requests)
            table.add_row(
                name,
                way,
                f"{result.requests:.2f}",
                f"{result.mean:.1f}",
                f"{result.p95:.1f}",
                f"{one.longest / SECOND:.0f}",
                f"{statistics.fmean(one.lags) / theirs:.2f}",
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer jobs, to see that it works")
    parser.add_argument("--json", type=Path, help="write all values there")
    parser.add_argument("--plot", type=Path, help="draw lag against requests there (SVG)")
    arguments = parser.parse_args()
    many, rounds = (400, 1) if arguments.quick else (1500, 5)
    free, short = plenty(1, many), scarce(1, rounds)
    show_plenty(free)
    show_scarce(short)
    if arguments.plot:
        arguments.plot.write_bytes(lag_against_requests(free["median 12 s, σ 0.3"]))
    if arguments.json:
        values = {
            name: {way: vars(result) for way, result in ways.items()} for name, ways in free.items()
        } | {
            name: {way: vars(outcome(one.lags, one.requests)) for way, one in ways.items()}
            for name, ways in short.items()
        }
        arguments.json.write_text(json.dumps(values, indent=1, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    main()
