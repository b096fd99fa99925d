"""Fréchet distance between two sets of pictures, in the features of a network that is always named.

d² = |m1 - m2|² + Tr C1 + Tr C2 - 2 Tr (C1 C2)^½ (Dowson & Landau 1982; as FID with Inception features: arXiv:1706.08500).
Covariances divide by N - 1. The last trace needs no matrix root: for any F with FᵀF = C, it is the sum of the singular values of
F1 F2ᵀ, that is, of the roots of the eigenvalues of a Gram matrix no larger than the smaller set. The distance is biased upward,
about d² / 2N for equal distributions, so only sets of equal size compare: n and the reference's n stand beside the number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import DataError
from stages.metrics.features import feature_network
from stages.metrics.score import Fields, Score, Setting


@dataclass(frozen=True)
class Gaussian:
    """A mean (d,) and a factor (r, d) of the covariance: factorᵀ factor = C. Both float64."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> "Gaussian":
        """The Gaussian with the mean and the (N - 1) covariance of features (n, d), n at least 2."""
        n, d = features.shape
        if n < 2:
            raise DataError(f"a Fréchet distance needs at least 2 pictures on each side, found {n}")
        mean = features.double().mean(0)
        centred = (features.double() - mean) / (n - 1) ** 0.5
        return cls.from_moments(mean, centred.T @ centred) if n > d else cls(mean, centred)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> "Gaussian":
        eigenvalues, vectors = torch.linalg.eigh(covariance.double())
        return cls(mean.double(), eigenvalues.clamp_min(0).sqrt()[:, None] * vectors.T)


def frechet_distance(one: Gaussian, two: Gaussian) -> float:
    """The squared distance, as it is usually printed. Symmetric, and 0 (to rounding) for equal Gaussians."""
    cross = one.factor @ two.factor.T
    gram = cross @ cross.T if len(cross) <= cross.shape[1] else cross.T @ cross
    root_trace = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
    squared = (one.mean - two.mean).square().sum() + one.factor.square().sum() + two.factor.square().sum() - 2 * root_trace
    return float(squared.clamp_min(0))


class FrechetDistance:
    paired = False

    def __init__(self, setting: Setting) -> None:
        self.reference = setting.reference
        self.network = feature_network(setting.features)

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return "sample.image" in sample and setting.reference is not None

    def look(self, sample: Fields) -> Tensor:
        return self.network([sample["sample.image"]])[0]

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[Tensor], expected: list[None]) -> list[Score]:
        assert self.reference is not None  # applies() asked for it
        real, drawn = self.reference.features, torch.stack(seen)
        distance = frechet_distance(Gaussian.fit(drawn), Gaussian.fit(real))
        protocol = {"features": self.network.name, "dimensions": drawn.shape[1], "resize": self.network.resize}
        protocol |= {"reference": self.reference.fingerprint, "reference_n": len(real)}
        return [Score(self.network.name, distance, len(drawn), len(drawn), protocol=protocol)]
