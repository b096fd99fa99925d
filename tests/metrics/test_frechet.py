"""The Fréchet distance: Gaussian closed forms, invariances, its bias, and other people's implementations."""

import numpy as np
import pytest
import torch

from stages.errors import DataError
from stages.metrics.frechet import FrechetDistance, Gaussian, frechet_distance
from stages.metrics.score import Reference, Setting


def draws(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + seed


def test_two_isotropic_gaussians_follow_the_closed_form():
    one = Gaussian.from_moments(torch.zeros(16), torch.eye(16))
    two = Gaussian.from_moments(torch.full((16,), 0.3), 1.7**2 * torch.eye(16))
    assert frechet_distance(one, two) == pytest.approx(16 * 0.3**2 + 16 * 0.7**2, abs=1e-5)


def test_commuting_covariances_follow_the_closed_form():
    a, b = torch.tensor([1.0, 4.0, 0.0, 9.0]), torch.tensor([4.0, 1.0, 5.0, 0.25])
    distance = frechet_distance(Gaussian.from_moments(torch.zeros(4), a.diag()), Gaussian.from_moments(torch.zeros(4), b.diag()))
    assert distance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), abs=1e-6)


@pytest.mark.parametrize("n", [7, 200])  # fewer and more pictures than features
def test_a_set_has_no_distance_to_itself_and_a_shift_adds_its_square(n):
    features = draws(n, 12, 1)
    here = Gaussian.fit(features)
    assert frechet_distance(here, here) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(here, Gaussian.fit(features + 0.5)) == pytest.approx(12 * 0.25, abs=1e-5)


@pytest.mark.parametrize(("n1", "n2"), [(9, 300), (300, 9), (9, 8), (300, 200)])
def test_few_or_many_pictures_agree_with_the_matrix_root(n1, n2):
    linalg = pytest.importorskip("scipy.linalg")
    one, two = draws(n1, 12, 1), draws(n2, 12, 2)
    c1, c2 = np.cov(one.numpy(), rowvar=False), np.cov(two.numpy(), rowvar=False)
    root = linalg.sqrtm(c1 @ c2 + 0j).real
    expected = float((one.mean(0) - two.mean(0)).square().sum()) + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(Gaussian.fit(one), Gaussian.fit(two)) == pytest.approx(expected, rel=1e-5)


def test_it_agrees_with_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    one, two = draws(90, 12, 3), draws(70, 12, 4)
    statistics = [fid.fid_features_to_statistics(features) for features in (one, two)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Gaussian.fit(one), Gaussian.fit(two)) == pytest.approx(theirs, rel=1e-6)


def test_equal_distributions_look_apart_by_d_squared_over_2n():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 1000, 64, generator=generator).double()
    assert frechet_distance(Gaussian.fit(one), Gaussian.fit(two)) == pytest.approx(64**2 / 2000, rel=0.15)


def test_one_picture_is_not_a_distribution():
    with pytest.raises(DataError, match="at least 2"):
        Gaussian.fit(torch.zeros(1, 3))


def test_the_score_names_network_reference_and_both_sizes():
    pictures = np.random.default_rng(0).integers(0, 256, (6, 9, 11, 3), dtype=np.uint8)
    setting = Setting(features="pixels-8x8", reference=Reference("abc", torch.rand(5, 192)))
    assert not FrechetDistance.applies({"sample.image": pictures[0]}, Setting())
    metric = FrechetDistance(setting)
    [score] = metric.scores([metric.look({"sample.image": picture}) for picture in pictures], [None] * 6)
    assert score.category == "pixels-8x8"
    assert (score.n, score.protocol["reference_n"], score.protocol["reference"]) == (6, 5, "abc")
    assert "fid" not in str(score).lower()
