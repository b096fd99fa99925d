"""Fréchet distance between two sets of pictures, in the features of a network that is always named.

d² = |m1 - m2|² + Tr C1 + Tr C2 - 2 Tr (C1 C2)^½ (Dowson & Landau 1982; as FID with Inception features: arXiv:1706.08500).
Covariances divide by N - 1. The last trace needs no matrix root: for any F with FᵀF = C, it is the sum of the singular values of
F1 F2ᵀ, that is, of the roots of the eigenvalues of a Gram matrix no larger than the smaller set. The distance is biased upward,
about d² / 2N for equal distributions, so only sets of equal size compare: n and the reference's n stand beside the number.

Reconstructions are held against their own originals where no other reference is given (with Inception features: rFID).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import DataError
from stages.metrics.features import feature_network
from stages.metrics.psnr import is_reconstruction
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
        return "sample.image" in sample and (setting.reference is not None or is_reconstruction(sample))

    def look(self, sample: Fields) -> Tensor:
        return self.network([sample["sample.image"]])[0]

    def expect(self, sample: Fields) -> Tensor | None:
        """The features of the original, where it is the reference."""
        return self.network([sample["image"]])[0] if self.reference is None else None

    def scores(self, seen: list[Tensor], expected: list[Tensor | None]) -> list[Score]:
        originals = [features for features in expected if features is not None]
        if self.reference is None and len(originals) < 2:
            return []  # nobody asked for a distance, and one picture has none
        real, drawn = self.reference.features if self.reference is not None else torch.stack(originals), torch.stack(seen)
        distance = frechet_distance(Gaussian.fit(drawn), Gaussian.fit(real))
        protocol = {"features": self.network.name, "dimensions": drawn.shape[1], "resize": self.network.resize}
        protocol |= {"reference": self.reference.fingerprint if self.reference is not None else "originals", "reference_n": len(real)}
        return [Score(self.network.name, distance, len(drawn), len(drawn), protocol=protocol)]
