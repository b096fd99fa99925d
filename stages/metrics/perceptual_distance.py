"""Perceptual distance of reconstructions, by every network whose weights are installed, each under its own name; lower is better.

The numbers of two networks are not on one scale, and a tokenizer that was trained against a distance does well in that distance.
Pictures are compared at their own size, one by one, then the mean.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import nn

from stages.errors import DataError
from stages.metrics.intervals import bootstrap_mean
from stages.metrics.psnr import is_reconstruction
from stages.metrics.score import Fields, Score, Setting
from stages.parts.config import parse_part
from stages.parts.losses import PERCEPTUAL, PerceptualConfig
from stages.parts.views.square import to_tensor


@lru_cache(maxsize=1)
def networks() -> dict[str, nn.Module]:
    """The distances that can be built here, the best known first."""
    return {kind: settings(kind).build() for kind in reversed(PERCEPTUAL) if settings(kind).missing() is None}


def settings(kind: str) -> PerceptualConfig:
    """A distance as it is when a recipe says nothing but its name."""
    return parse_part(PERCEPTUAL, {"kind": kind}, "perceptual distance")


class PerceptualDistance:
    paired = False

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        return is_reconstruction(sample)

    @torch.no_grad()
    def look(self, sample: Fields) -> dict[str, float]:
        picture, truth = sample["sample.image"], sample["image"]
        if picture.shape != truth.shape:
            raise DataError(
                f"perceptual distance: the reconstruction is {picture.shape}, its original {truth.shape}; expected the same shape"
            )
        made, true = to_tensor(picture)[None], to_tensor(truth)[None]
        small = min(truth.shape[:2])
        return {name: float(network(true, made)) for name, network in networks().items() if small >= settings(name).smallest}

    def expect(self, sample: Fields) -> None:
        return None

    def scores(self, seen: list[dict[str, float]], expected: list[None]) -> list[Score]:
        made = []
        for name in networks():
            found = [distances[name] for distances in seen if name in distances]
            if found:
                protocol = {"network": name, "settings": settings(name).model_dump(exclude={"kind"}), "size": "of the picture"}
                interval = bootstrap_mean(np.array(found), self.seed)
                made.append(Score(name, float(np.mean(found)), len(found), len(found), interval, protocol=protocol))
        return made
