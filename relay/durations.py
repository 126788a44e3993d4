"""How long the jobs of one kind take, learned from those that ended; and when to look for the end.

Looking for an end at the right moments is the inspection problem: with a price for each look and a loss that
grows with the time an end goes unseen, the best density of looks is the square root of the hazard rate over
twice the price (Keller 1974, Management Science 21, 256; after Barlow, Hunter and Proschan 1963).
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

# The grid of durations: so many bins for each doubling, from 50 ms to 4 days.
BINS_PER_DOUBLING = 16
SHORTEST, DOUBLINGS = 50.0, 23
EDGES = tuple(SHORTEST * 2 ** (k / BINS_PER_DOUBLING) for k in range(DOUBLINGS * BINS_PER_DOUBLING + 1))
_WIDTHS = tuple(after - before for before, after in pairwise(EDGES))
# An observation counts half as much once so many newer ones are there.
HALF_LIFE, REMEMBERED = 200, 500
# What was expected before weighs as much as so many observations.
PRIOR_WEIGHT = 1.0
_PASSES = 3
_LEAST = 1e-9
# Of so many models of an account each has a memory of its own.
MODELS = 100

Shares = Sequence[float]


@dataclass(frozen=True, slots=True)
class Seen:
    """A job ended after more than `low` and at most `high` milliseconds; equal when it is known exactly."""

    low: float
    high: float


class Plan:
    """When to look for the end of one job of this kind, and how likely it has ended."""

    def __init__(self, shares: Shares) -> None:
        left = 1.0
        looks, survival = [0.0], [1.0]
        for share, width in zip(shares, _WIDTHS, strict=True):
            after = max(left - share, _LEAST)
            looks.append(looks[-1] + math.sqrt(math.log(left / after) * width))
            survival.append(after)
            left = after
        # How many looks are due up to each edge, but for the price.
        self._looks, self._survival = looks, survival
        self.shares = shares
        self.median = EDGES[next((k for k, one in enumerate(survival) if one <= 0.5), -1)]

    def next_look(self, age: float, price: float) -> float:
        """The age at which to look next after a look at `age`; `price` is what a look may cost in
        milliseconds of lag."""
        if age >= EDGES[-1]:
            return 2 * age
        at = _interpolate(age, EDGES, self._looks) + math.sqrt(2 * price)
        return _interpolate(at, self._looks, EDGES)

    def ended_since(self, looked: float, age: float) -> float:
        """The probability that a job that had not ended at the age `looked` has ended by `age`."""
        before, after = (_interpolate(one, EDGES, self._survival) for one in (looked, age))
        return 1 - after / before


class Durations:
    """What was seen of one kind of jobs; forgotten slowly."""

    def __init__(self, prior: Shares) -> None:
        self._prior = prior
        self._seen: deque[Seen] = deque(maxlen=REMEMBERED)
        self._news = 0
        self._plan: Plan | None = None
        self.count = 0

    def observe(self, one: Seen) -> None:
        self._seen.append(one)
        self.count += 1
        self._news += 1

    @property
    def plan(self) -> Plan:
        """What follows from it all; made anew when there is enough news to matter."""
        if self._plan is None or self._news * 20 > len(self._seen):
            self._plan, self._news = Plan(self._learned()), 0
        return self._plan

    def _learned(self) -> Shares:
        """The probability of each bin: the prior and the smoothed observations. An end that is only known to
        lie between two looks is spread as all ends are (a few passes of self-consistency)."""
        weights = [0.5 ** (age / HALF_LIFE) for age in range(len(self._seen) - 1, -1, -1)]
        total = sum(weights)
        if not total:
            return self._prior
        trust = PRIOR_WEIGHT / (PRIOR_WEIGHT + total)
        shares = self._prior
        places = [(_bin(one.low), _bin(one.high)) for one in self._seen]
        for _ in range(_PASSES):
            sums = [0.0, *accumulate(shares)]
            counts = [0.0] * len(_WIDTHS)
            for (first, last), weight in zip(places, weights, strict=True):
                mass = sums[last + 1] - sums[first]
                for k in range(first, last + 1):
                    counts[k] += weight * (shares[k] / mass if mass > 0 else 1 / (last - first + 1))
            smooth = _smoothed(counts, total)
            shares = [trust * p + (1 - trust) * c / total for p, c in zip(self._prior, smooth, strict=True)]
        return shares


class Experience:
    """What is known of the jobs of one account: of all of them, and of each model."""

    def __init__(self, prior: Shares) -> None:
        self._all = Durations(prior)
        self._models: dict[str, Durations] = {}

    @property
    def count(self) -> int:
        return self._all.count

    def learn(self, model: str | None, seen: Seen) -> None:
        self._all.observe(seen)
        if model is not None:
            if model not in self._models and len(self._models) < MODELS:
                self._models[model] = Durations(self._all.plan.shares)
            if model in self._models:
                self._models[model].observe(seen)

    def plan(self, model: str | None) -> Plan:
        """For a job of this model; of all models as long as its own (None) is not known."""
        return self._models.get(model or "", self._all).plan


def log_normal(median: float, sigma: float) -> Shares:
    """What to expect of durations with this median (milliseconds) and spread, before anything was seen."""

    def below(edge: float) -> float:
        return 0.5 * (1 + math.erf(math.log(edge / median) / (sigma * math.sqrt(2))))

    values = [0.0, *(below(edge) for edge in EDGES[1:-1]), 1.0]
    return [after - before for before, after in pairwise(values)]


def _bin(duration: float) -> int:
    return min(max(bisect_left(EDGES, duration) - 1, 0), len(_WIDTHS) - 1)


def _smoothed(counts: Sequence[float], total: float) -> list[float]:
    """Spread by a Gaussian over neighbouring bins, wider the fewer observations there are (after Silverman,
    but by the spread of the highest peak: jobs of several kinds have several)."""
    width = max(0.7, 0.6 * _spread(counts, total) * total**-0.2)
    reach = math.ceil(3 * width)
    kernel = [math.exp(-0.5 * (k / width) ** 2) for k in range(-reach, reach + 1)]
    norm = sum(kernel)
    smooth = [0.0] * len(counts)
    for k, count in enumerate(counts):
        if count:
            for place, share in enumerate(kernel, k - reach):
                smooth[min(max(place, 0), len(counts) - 1)] += count * share / norm
    return smooth


def _spread(counts: Sequence[float], total: float) -> float:
    """The standard deviation, in bins, of a normal distribution whose densest quarter is as narrow."""
    sums, first, narrowest = [0.0, *accumulate(counts)], 0, len(counts)
    for last in range(1, len(sums)):
        while sums[last] - sums[first + 1] >= total / 4:
            first += 1
        if sums[last] - sums[first] >= total / 4:
            narrowest = min(narrowest, last - first)
    return narrowest / 0.637


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The value at x of the line through the points; before and after them that of the nearest."""
    k = bisect_right(xs, x)
    if k == 0:
        return ys[0]
    if k == len(xs):
        return ys[-1]
    return ys[k - 1] + (ys[k] - ys[k - 1]) * (x - xs[k - 1]) / (xs[k] - xs[k - 1])
