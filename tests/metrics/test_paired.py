"""Student's t in closed form against scipy's, and Holm's correction against a case worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from stages.metrics.paired import holm, paired, t_quantile, tails


@pytest.mark.parametrize("freedom", range(1, 13))
def test_tails_and_quantiles_are_students(freedom: int) -> None:
    for t in (0.0, 0.3, 1.0, -2.1, 4.0, 30.0):
        assert tails(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-6, abs=1e-12)
    for level in (0.5, 0.95, 0.99):
        assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, freedom), rel=1e-6)


def test_a_paired_difference_is_the_t_test_of_scipy() -> None:
    rng = np.random.default_rng(0)
    ones, others = rng.normal(0.6, 0.1, 5), rng.normal(0.5, 0.1, 5)
    found, expected = paired(ones.tolist(), others.tolist()), stats.ttest_rel(ones, others)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_seeds_that_agree_to_the_bit() -> None:
    assert paired([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.0, 0.0)
    assert paired([0.5, 0.5], [0.5, 0.5]) == (0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="two seeds"):
        paired([0.5], [0.25])


def test_nominal_coverage() -> None:
    """Between two arms that are the same, 95 % of the intervals hold zero, and 5 % of the families reject anything."""
    rng = np.random.default_rng(1)
    runs = rng.normal(0.5, 0.05, (600, 4, 5))
    found = [[paired(arm.tolist(), arms[0].tolist()) for arm in arms[1:]] for arms in runs]
    assert np.mean([abs(d.mean) <= d.half for family in found for d in family]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([min(holm([d.p for d in family])) < 0.05 for family in found]) < 0.07


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
