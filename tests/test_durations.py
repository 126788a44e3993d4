"""How long jobs take: when to look for the end, and what is learned of it."""

import math
import random
from bisect import bisect_left
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.durations import EDGES, MODELS, Durations, Experience, Plan, Seen, Shares, log_normal

SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
LAST = EDGES[-1]

# Laws of durations: one peak, two peaks, or hardly anything is known.
BELLS = st.builds(log_normal, st.floats(500, HOUR), st.floats(0.05, 2.0))
TWO = st.builds(
    lambda a, b, share: [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)],
    BELLS,
    BELLS,
    st.floats(0, 1),
)
PLANS = (BELLS | TWO).map(Plan)
AGES = st.floats(0, LAST * 0.999)
PRICES = st.floats(1, MINUTE)


def sample(median: float, sigma: float, number: int, *, seed: int = 1) -> list[float]:
    chance = random.Random(seed)  # noqa: S311 # a test
    return [median * math.exp(chance.gauss(0, sigma)) for _ in range(number)]


def exact(durations: list[float]) -> list[Seen]:
    return [Seen(one, one) for one in durations]


def between_looks(durations: list[float], pause: float) -> list[Seen]:
    """As they are known to somebody who looks each time the pause has passed, from some moment on."""
    chance = random.Random(2)  # noqa: S311 # a test
    seen = []
    for one in durations:
        first = chance.uniform(0, pause)
        looks = math.ceil((one - first) / pause)
        high = first + looks * pause if looks > 0 else first
        seen.append(Seen(max(0.0, high - pause), high))
    return seen


ANYTHING = log_normal(30 * SECOND, 2.0)


def learned(seen: list[Seen], prior: Shares = ANYTHING) -> Plan:
    durations = Durations(prior)
    for one in seen:
        durations.observe(one)
    return durations.plan


# A plan.


@given(PLANS, AGES, PRICES)
def test_the_next_look_is_later(plan, age, price):
    assert plan.next_look(age, price) > age


@given(PLANS, st.lists(AGES, min_size=2, max_size=20), PRICES)
def test_who_has_looked_later_looks_again_later(plan, ages, price):
    looks = [plan.next_look(age, price) for age in sorted(ages)]
    assert looks == sorted(looks)


@given(PLANS, AGES, st.lists(PRICES, min_size=2, max_size=10))
def test_the_dearer_a_look_the_later_it_is(plan, age, prices):
    looks = [plan.next_look(age, price) for price in sorted(prices)]
    assert looks == sorted(looks)


def looks_until(plan: Plan, end: float, price: float) -> list[float]:
    looks = [plan.next_look(0, price)]
    while looks[-1] < end:
        looks.append(plan.next_look(looks[-1], price))
    return looks


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_looks_are_half_as_many_when_each_is_four_times_as_dear(sigma):
    plan = Plan(log_normal(MINUTE, sigma))
    many, few = (len(looks_until(plan, 3 * MINUTE, price)) for price in (100, 400))
    assert many > 20
    assert few == pytest.approx(many / 2, abs=1)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6])
def test_the_first_look_is_at_the_early_edge_of_the_known_durations(sigma):
    plan = Plan(log_normal(MINUTE, sigma))
    first = plan.next_look(0, 0.01 * MINUTE)
    assert 0.00001 < plan.ended_since(0, first) < 0.2
    assert first > MINUTE * math.exp(-3.5 * sigma)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_looks_are_dense_where_ends_are_likely_and_thin_out_before(sigma):
    looks = looks_until(Plan(log_normal(MINUTE, sigma)), MINUTE, 0.001 * MINUTE)
    gaps = [b - a for a, b in pairwise([0.0, *looks])]
    assert gaps[0] == max(gaps)
    assert gaps[-1] < gaps[0] / 5


@pytest.mark.parametrize("sigma", [0.8, 1.5])
def test_looks_thin_out_in_the_tail(sigma):
    plan = Plan(log_normal(MINUTE, sigma))
    near, far = (plan.next_look(age, 0.01 * MINUTE) - age for age in (MINUTE, 30 * MINUTE))
    assert far > 2 * near


def test_between_two_kinds_of_jobs_there_are_fewer_looks():
    short, long = log_normal(10 * SECOND, 0.1), log_normal(10 * MINUTE, 0.1)
    plan = Plan([(a + b) / 2 for a, b in zip(short, long, strict=True)])
    looks = looks_until(plan, 10 * MINUTE, 30)

    def number(begin: float, end: float) -> int:
        return bisect_left(looks, end) - bisect_left(looks, begin)

    assert number(20 * SECOND, 5 * MINUTE) <= 2
    assert number(5 * SECOND, 20 * SECOND) > 5
    assert number(5 * MINUTE, 10 * MINUTE) > 5


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6])
def test_ends_are_seen_sooner_than_by_as_many_looks_at_even_pauses(sigma):
    plan, ends = Plan(log_normal(MINUTE, sigma)), sample(MINUTE, sigma, 2000)
    looks = looks_until(plan, max(ends), 0.01 * MINUTE)
    places = [bisect_left(looks, end) for end in ends]
    lag = sum(looks[k] - end for k, end in zip(places, ends, strict=True))
    pause = sum(ends) / (sum(places) + 0.5 * len(ends))  # on the average half a look comes too late
    assert lag < 0.85 * pause / 2 * len(ends)


@given(PLANS, AGES, st.lists(AGES, max_size=10))
def test_the_probability_of_an_end_grows_from_nothing_towards_one(plan, looked, ages):
    later = sorted(age for age in ages if age >= looked)
    chances = [plan.ended_since(looked, age) for age in later]
    assert plan.ended_since(looked, looked) == 0
    assert chances == sorted(chances)
    assert all(0 <= chance <= 1 for chance in chances)


@given(st.floats(500, HOUR), st.floats(0.5, 2.0))
def test_half_of_the_jobs_have_ended_at_the_median(median, sigma):
    plan = Plan(log_normal(median, sigma))
    assert plan.ended_since(0, plan.median) == pytest.approx(0.5, abs=0.04)


@given(st.floats(500, HOUR), st.floats(0.01, 2.0))
def test_the_median_of_what_is_expected_is_the_one_that_was_given(median, sigma):
    assert Plan(log_normal(median, sigma)).median == pytest.approx(median, rel=0.05)


@given(PLANS, st.floats(LAST, 100 * DAY), PRICES)
def test_a_job_older_than_anything_known_is_looked_at_again_too(plan, age, price):
    assert plan.next_look(age, price) > age
    assert 0 <= plan.ended_since(age, age + HOUR) <= 1


# Learning.


@pytest.mark.parametrize("median", [2 * SECOND, 20 * SECOND, 5 * MINUTE])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8])
def test_of_two_hundred_ends_the_median_is_known_within_a_tenth(median, sigma):
    durations = sample(median, sigma, 200)
    truth = sorted(durations)[100]
    assert learned(exact(durations)).median == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("median", [2 * SECOND, 20 * SECOND, 5 * MINUTE])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_so_it_is_when_they_are_only_known_to_lie_between_two_looks(median, sigma, share):
    durations = sample(median, sigma, 200)
    truth = sorted(durations)[100]
    assert learned(between_looks(durations, share * median)).median == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_provider_that_becomes_faster_or_slower_is_learned_anew(factor):
    before, after = sample(MINUTE, 0.2, 500), sample(factor * MINUTE, 0.2, 500, seed=3)
    assert learned(exact(before)).median == pytest.approx(MINUTE, rel=0.1)
    assert learned(exact(before + after[:250])).median == pytest.approx(factor * MINUTE, rel=0.2)
    assert learned(exact(before + after)).median == pytest.approx(factor * MINUTE, rel=0.1)


def test_no_old_experience_makes_a_new_duration_impossible():
    plan = learned(exact([MINUTE] * 500), prior=log_normal(MINUTE, 1.0))
    assert plan.ended_since(0, 30 * SECOND) > 0
    assert plan.ended_since(2 * MINUTE, HOUR) > 0.5


def test_a_few_ends_are_enough_to_move_an_expectation_that_was_wrong():
    prior = log_normal(MINUTE, 0.6)
    assert learned(exact(sample(10 * SECOND, 0.2, 10)), prior).median < 15 * SECOND
    assert learned(exact(sample(10 * MINUTE, 0.2, 10)), prior).median > 7 * MINUTE


def test_nothing_learned_is_what_was_expected():
    plan = learned([], prior=log_normal(MINUTE, 0.6))
    assert plan.median == Plan(log_normal(MINUTE, 0.6)).median


@given(st.lists(st.tuples(st.floats(0, 10 * DAY), st.floats(0, 10 * DAY)).map(sorted), max_size=30), BELLS)
def test_whatever_was_seen_it_remains_a_law_of_durations(pairs, prior):
    durations = Durations(prior)
    for low, high in pairs:
        durations.observe(Seen(low, high))
    plan = durations.plan
    assert all(share >= 0 for share in plan.shares)
    assert sum(plan.shares) == pytest.approx(1)
    assert plan.next_look(0, 100) > 0
    assert 0 <= plan.ended_since(0, LAST) <= 1


def test_news_that_matters_make_a_new_plan():
    durations = Durations(log_normal(MINUTE, 0.6))
    medians = []
    for one in exact(sample(10 * SECOND, 0.2, 100)):
        durations.observe(one)
        medians.append(durations.plan.median)
    assert medians[20] < 12 * SECOND
    assert durations.plan is durations.plan


# Experience.


def test_each_model_is_known_by_itself_and_a_stranger_by_all_of_them():
    experience = Experience(log_normal(30 * SECOND, 1.0))
    for fast, slow in zip(sample(5 * SECOND, 0.2, 50), sample(5 * MINUTE, 0.2, 50), strict=True):
        experience.learn("fast", Seen(fast, fast))
        experience.learn("slow", Seen(slow, slow))
    assert experience.plan("fast").median == pytest.approx(5 * SECOND, rel=0.2)
    assert experience.plan("slow").median == pytest.approx(5 * MINUTE, rel=0.2)
    for stranger in ("new", None):
        assert 5 * SECOND < experience.plan(stranger).median < 5 * MINUTE
        assert experience.plan(stranger).ended_since(0, 10 * SECOND) == pytest.approx(0.5, abs=0.1)


def test_jobs_without_a_model_teach_too():
    experience = Experience(log_normal(30 * SECOND, 1.0))
    for one in exact(sample(5 * MINUTE, 0.2, 50)):
        experience.learn(None, one)
    assert experience.count == 50
    assert experience.plan(None).median == pytest.approx(5 * MINUTE, rel=0.2)


def test_a_new_model_is_expected_to_be_like_the_others():
    experience = Experience(log_normal(SECOND, 0.3))
    for one in exact(sample(5 * MINUTE, 0.2, 100)):
        experience.learn("known", one)
    experience.learn("new", Seen(4 * MINUTE, 4 * MINUTE))
    assert experience.plan("new").median == pytest.approx(4.5 * MINUTE, rel=0.2)
    assert experience.plan("new").ended_since(0, 10 * SECOND) < 0.05


def test_of_too_many_models_the_rest_is_known_by_all_of_them():
    experience = Experience(log_normal(30 * SECOND, 1.0))
    for k in range(2 * MODELS):
        for _ in range(5):
            experience.learn(f"model-{k}", Seen(MINUTE, MINUTE))
    known = {id(experience.plan(f"model-{k}")) for k in range(2 * MODELS)}
    assert len(known) == MODELS + 1
    assert experience.plan(f"model-{2 * MODELS - 1}") is experience.plan(None)
    assert experience.count == 10 * MODELS
