"""Statistics against known truths: coverage, false claims, corrections. Tolerances are four standard errors of the
simulation, or what is written beside them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from kvbench.errors import UsageError
from kvbench.report.statistics import (
    Clusters,
    benjamini_hochberg,
    errors,
    holm,
    interval,
    intervals,
    mcnemar,
    noninferior,
    p_values,
    resamples_needed,
    smallest_difference,
    win_tie_loss,
)

REPEATS = 1500  # columns, each a study of its own; four standard errors of a share of 5 % are then 2.3 points
WITHIN = 4 * math.sqrt(0.05 * 0.95 / REPEATS)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def studies(
    clusters: int, per: int, strata: int = 1, skewed: bool = False, seed: int = 0
) -> tuple[Clusters, np.ndarray]:
    """Examples x studies, of mean 0: half of the variance lies between clusters, and strata differ."""
    draw = rng(seed)
    of = np.repeat(np.arange(clusters), per)
    between = draw.exponential(size=(clusters, REPEATS)) - 1 if skewed else draw.normal(size=(clusters, REPEATS))
    values = between[of] + draw.normal(size=(len(of), REPEATS))
    level = of % strata - (of % strata).mean()
    return Clusters(of.astype(str), (of % strata).astype(str)), values + level[:, None]


DESIGNS = [(8, 1, 1), (12, 5, 1), (30, 4, 1), (39, 1, 13), (60, 3, 3), (200, 1, 1)]


@pytest.mark.parametrize(("clusters", "per", "strata"), DESIGNS)
@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_and_tests_err_as_often_as_they_say(clusters: int, per: int, strata: int, skewed: bool) -> None:
    shape, values = studies(clusters, per, strata, skewed)
    slack = WITHIN + (0.03 if skewed and clusters < 60 else 0.01)  # what skewness costs; and the bootstrap, a point
    for level in (0.95, 0.9):
        found = intervals(values, shape, rng(1), level)
        covered = np.mean([one.low <= 0 <= one.high for one in found])
        assert abs(covered - level) < slack * (1 if level == 0.95 else 1.4)
    assert {one.made for one in found} == {"t" if clusters < 30 else "bootstrap"}
    for side in ("both", "less", "greater"):
        claimed = np.mean(p_values(values, shape, rng(2), side, resamples=999).p <= 0.05)
        assert abs(claimed - 0.05) < slack + (0.02 if skewed and side != "both" else 0)


def test_clusters_taken_for_independent_would_not_cover() -> None:
    """Why all this: the naive interval of the same data covers far too seldom."""
    shape, values = studies(30, 4)
    naive = intervals(values, Clusters(np.arange(shape.n).astype(str)), rng())
    assert np.mean([one.low <= 0 <= one.high for one in naive]) < 0.85


def test_binary_scores_are_not_claimed_too_often() -> None:
    draw = rng()
    ours, theirs = draw.random((2, 40, REPEATS)) < 0.3
    differences = ours.astype(float) - theirs
    found = p_values(differences, Clusters(np.arange(40).astype(str)), rng(1))
    assert set(found.test) == {"mcnemar"}
    assert np.mean(found.p <= 0.05) < 0.05 + WITHIN
    four = Clusters((np.arange(160) // 4).astype(str))
    alike = np.repeat(differences, 4, axis=0)  # the four examples of a cluster are one
    found = p_values(alike, four, rng(1), resamples=999)
    assert set(found.test) == {"flips"}
    assert np.mean(found.p <= 0.05) < 0.05 + WITHIN


def test_two_sided_power_is_what_the_smallest_difference_says() -> None:
    shape, values = studies(60, 2)
    truth = float(np.std(values.mean(0)))  # the real standard error, over the studies
    shift = smallest_difference(truth, shape.freedom)
    power = np.mean(p_values(values + shift, shape, rng(1), resamples=999).p <= 0.05)
    assert abs(power - 0.8) < 4 * math.sqrt(0.16 / REPEATS) + 0.02
    assert math.isnan(smallest_difference(0.0, 10))
    assert math.isnan(smallest_difference(math.nan, 0))


def test_non_inferiority_is_claimed_at_the_margin_in_one_of_twenty() -> None:
    shape, values = studies(40, 2)
    claimed = np.mean([one.high < 0.5 for one in intervals(values + 0.5, shape, rng(1), level=0.9)])
    assert abs(claimed - 0.05) < WITHIN + 0.01
    one = noninferior(values[:, 0] + 0.5, shape, rng(1), 0.5)
    assert one.bound == pytest.approx(interval(values[:, 0] + 0.5, shape, rng(1), level=0.9).high)
    assert one.holds == (one.bound < 0.5)
    clear = noninferior(np.full(80, -1.0), shape, rng(1), 0.01)
    assert clear.holds
    assert clear.bound == -1


def test_a_margin_of_each_example_has_noise_of_its_own() -> None:
    """It varies as much as the differences do, and is 0.5 on average: 5 % of claims are false still."""
    shape, values = studies(20, 2)
    margins = 0.5 + studies(20, 2, seed=1)[1]
    found = [noninferior(one + 0.5, shape, rng(1), margin) for one, margin in zip(values.T, margins.T, strict=True)]
    assert abs(np.mean([one.holds for one in found]) - 0.05) < WITHIN
    # Held against the mean of the margins, the bound is passed more often.
    assert np.mean([one.bound < margins[:, i].mean() for i, one in enumerate(found)]) > 0.05 + WITHIN


def test_holm_controls_and_benjamini_hochberg_keeps_its_rate() -> None:
    """10 tests in each of 1,500 studies, all null; then half of them true with a clear effect."""
    p = stats.norm.sf(rng().normal(size=(REPEATS, 10)))
    assert np.mean([holm(row).min() <= 0.05 for row in p]) < 0.05 + WITHIN
    assert np.mean([benjamini_hochberg(row).min() <= 0.05 for row in p]) < 0.05 + WITHIN
    p[:, 5:] = stats.norm.sf(rng(1).normal(size=(REPEATS, 5)) + 3)
    claimed = np.array([benjamini_hochberg(row) <= 0.05 for row in p])
    false = claimed[:, :5].sum(1) / np.maximum(1, claimed.sum(1))
    assert abs(false.mean() - 0.025) < 0.015  # 5 % of the share of nulls
    holms = np.array([holm(row) <= 0.05 for row in p])
    assert holms[:, :5].any(1).mean() < 0.05 + WITHIN
    assert (holms <= claimed).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p: list[float]) -> None:
    """A hypothesis is rejected if every intersection that it is part of is, by Bonferroni."""
    expected = [
        max(
            min(1, len(part) * min(p[j] for j in part))
            for size in range(1, len(p) + 1)
            for part in itertools.combinations(range(len(p)), size)
            if i in part
        )
        for i in range(len(p))
    ]
    np.testing.assert_allclose(holm(np.array(p)), expected, rtol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_its_definition(p: list[float]) -> None:
    values = np.array(p)
    for alpha in (0.01, 0.05, 0.2):
        ordered = np.sort(values)
        passed = np.flatnonzero(ordered <= alpha * np.arange(1, len(p) + 1) / len(p) + 1e-12)
        most = ordered[passed[-1]] if len(passed) else -1.0
        adjusted = benjamini_hochberg(values)
        sure = np.abs(adjusted - alpha) > 1e-9
        np.testing.assert_array_equal((adjusted <= alpha)[sure], (values <= most)[sure])


def test_corrections_pass_over_what_was_not_tested() -> None:
    p = np.array([0.01, math.nan, 0.04])
    np.testing.assert_allclose(holm(p), [0.02, math.nan, 0.04])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.02, math.nan, 0.04])
    assert np.isnan(benjamini_hochberg(np.array([math.nan]))).all()


def test_too_few_resamples_for_the_correction_are_refused() -> None:
    shape, values = studies(30, 1)
    with pytest.raises(
        UsageError, match=r"^999 resamples give no p-value below 0.001, and 100 tests ask for 0.0005: u.* 1999 "
    ):
        p_values(values, shape, rng(), tests=100, resamples=999)
    assert resamples_needed(100) == 1999
    smallest = p_values(values[:, :1] + 100, shape, rng(), tests=100, resamples=1999).p
    assert smallest[0] == pytest.approx(1 / 2000)
    assert holm(np.append(smallest, np.ones(99)))[0] <= 0.05
    assert p_values(values[:, :1] + 100, shape, rng(), tests=1000).p[0] == pytest.approx(1 / 20_000)
    few, small = studies(12, 1)
    assert set(p_values(small, few, rng(), tests=100, resamples=9).test) == {"t"}  # t has no such floor


def test_mcnemar_is_the_binomial_test() -> None:
    ours, theirs = np.array([0, 5, 1, 12, 0]), np.array([0, 0, 9, 7, 1])
    for side, name in (("both", "two-sided"), ("less", "less"), ("greater", "greater")):
        expected = [
            stats.binomtest(a, a + b, 0.5, name).pvalue if a + b else 1.0 for a, b in zip(ours, theirs, strict=True)
        ]
        np.testing.assert_allclose(mcnemar(ours, theirs, side), expected)


def test_flips_of_binary_scores_are_mcnemar() -> None:
    """With an example per cluster the two are one test; flips see it through 20,000 draws."""
    draw = rng()
    differences = (draw.random((60, 20)) < 0.4).astype(float) - (draw.random((60, 20)) < 0.25)
    shape = Clusters(np.arange(60).astype(str))
    exact = p_values(differences, shape, rng()).p
    flipped = p_values(0.5 * differences, shape, rng(), resamples=20_000)
    assert set(flipped.test) == {"flips"}
    np.testing.assert_allclose(flipped.p, exact, atol=0.02)


def test_errors_of_equal_clusters_are_the_textbook_ones() -> None:
    values = rng().normal(size=(40, 3))
    alone = Clusters(np.arange(40).astype(str))
    np.testing.assert_allclose(errors(values, alone), stats.sem(values, axis=0))
    fours = Clusters(np.repeat(np.arange(10), 4).astype(str))
    np.testing.assert_allclose(errors(values, fours), stats.sem(values.reshape(10, 4, 3).mean(1), axis=0))
    t = stats.ttest_1samp(values.reshape(10, 4, 3).mean(1), 0)
    np.testing.assert_allclose(p_values(values, fours, rng()).p, t.pvalue)
    low, high = t.confidence_interval()
    found = intervals(values, fours, rng())
    np.testing.assert_allclose([[one.low, one.high] for one in found], np.stack([low, high], axis=1))
    assert all(one.few and one.freedom == 9 and one.n == 40 for one in found)


def test_the_bootstrap_agrees_with_t_where_both_hold() -> None:
    values = rng().normal(size=(600, 4))
    of = np.repeat(np.arange(200), 3).astype(str)
    shape = Clusters(of, np.repeat(np.arange(4), 150).astype(str))
    t = stats.t.isf(0.025, shape.freedom)
    for one in intervals(values, shape, rng()):
        assert one.made == "bootstrap"
        assert (one.high - one.low) == pytest.approx(2 * t * one.error, rel=0.06)


def test_what_never_varies_has_no_width_of_zero() -> None:
    shape = Clusters(np.arange(16).astype(str))
    right = interval(np.ones(16), shape, rng(), bounds=(0.0, 1.0))
    assert (right.mean, right.high, right.made) == (1, 1, "exact")
    assert right.low == pytest.approx(0.025 ** (1 / 16))  # Clopper-Pearson at 16 of 16
    level = stats.binomtest(16, 16).proportion_ci(method="exact")
    assert right.low == pytest.approx(level.low)
    tied = noninferior(np.zeros(16), shape, rng(), margin=0.05, bounds=(-1.0, 1.0))
    assert tied.bound == pytest.approx(1 - 0.05 ** (1 / 16))
    assert not tied.holds  # 16 ties don't show that losses are below 5 %
    assert p_values(np.full((16, 1), 0.25), shape, rng()).p[0] == 2 * 0.5**16
    assert p_values(np.zeros((16, 1)), shape, rng()).p[0] == 1
    apart = Clusters(np.arange(16).astype(str), (np.arange(16) % 2).astype(str))
    assert interval((np.arange(16) % 2).astype(float), apart, rng(), bounds=(0.0, 1.0)).made == "exact"


def test_one_cluster_has_no_interval() -> None:
    shape = Clusters(["book"] * 5)
    found = interval(np.arange(5.0), shape, rng())
    assert (found.mean, found.made, found.clusters) == (2, "none", 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert np.isnan(p_values(np.arange(5.0)[:, None], shape, rng()).p).all()


def test_strata_that_share_a_cluster_or_have_one_are_joined() -> None:
    assert Clusters(list("abcd"), list("xxyy")).strata == 2
    assert Clusters(list("abbcd"), list("xxyyy")).strata == 1
    assert Clusters(list("abcde"), list("vwxyz")).strata == 1
    lone = Clusters(list("abcdefg"), list("xxxxyyz"))
    assert lone.strata == 2
    assert list(np.bincount(lone.stratum)) == [4, 3]
    assert Clusters(list("abcd")).strata == 1


def test_resamples_are_the_generators() -> None:
    shape, values = studies(40, 2)
    first, again, other = (intervals(values[:, :5], shape, rng(seed)) for seed in (3, 3, 4))
    assert first == again != other


@settings(max_examples=60, deadline=None)
@given(
    arrays(float, (40, 2), elements=st.floats(-100, 100)),
    st.integers(2, 40),
    st.integers(1, 4),
    st.floats(0.1, 10),
    st.floats(-50, 50),
)
def test_intervals_move_and_stretch_with_the_values(
    values: np.ndarray, clusters: int, strata: int, stretch: float, shift: float
) -> None:
    shape = Clusters((np.arange(40) % clusters).astype(str), (np.arange(40) % clusters % strata).astype(str))
    if shape.freedom < 1:
        return
    before = intervals(values, shape, rng(), resamples=200)
    after = intervals(values * stretch + shift, shape, rng(), resamples=200)
    for one, other in zip(before, after, strict=True):
        moved = [getattr(one, name) * stretch + shift for name in ("mean", "low", "high")]
        np.testing.assert_allclose([other.mean, other.low, other.high], moved, rtol=1e-7, atol=1e-7)
    swapped = [interval(sign * (values[:, 0] - values[:, 1]), shape, rng()) for sign in (1, -1)]
    np.testing.assert_allclose(swapped[0].mean, -swapped[1].mean, atol=1e-12)
    np.testing.assert_allclose(swapped[0].low, -swapped[1].high, rtol=1e-7, atol=1e-9)
    both = [p_values(sign * values, shape, rng(), resamples=99).p for sign in (1, -1)]
    np.testing.assert_allclose(*both)


def test_wins_are_counted_in_the_direction_of_the_metric() -> None:
    differences = np.array([[1.0, -1], [0, -2], [-1, -3], [2, 0]])
    assert win_tie_loss(differences).tolist() == [[2, 0], [1, 1], [1, 3]]
    assert win_tie_loss(differences, "lower").tolist() == [[1, 3], [1, 1], [2, 0]]


def test_statistics_need_no_torch() -> None:
    code = "import kvbench.report.statistics, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
