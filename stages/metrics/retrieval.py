"""Does a drawn picture look most like the real picture of its own prompt? R@1 and R@5 by nearest real picture in named features.

The gallery is every true picture of the evaluated set, once per prompt. For each drawn picture the gallery is ordered by cosine
similarity; R@k is the share whose own picture is among the first k. Chance is k / gallery. This is how pictures are scored whose
content no reader can parse (a drawn *umbrella* should be closer to the umbrella than to 1,900 other things).
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.metrics.features import feature_network
from stages.metrics.intervals import bootstrap_share
from stages.metrics.psnr import is_reconstruction
from stages.metrics.score import Fields, Score, Setting, prompt_key

RANKS = (1, 5)


def ranks(drawn: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """How many gallery pictures are at least as similar to drawn (n, d) as its own one, own (n,) into gallery (g, d); 0 is best.

    Ties count against the model: a constant picture must not score.
    """
    similarity = F.normalize(drawn.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T
    mine = similarity.gather(1, own[:, None])
    return (similarity >= mine).sum(1) - 1


class Retrieval:
    paired = True

    def __init__(self, setting: Setting) -> None:
        self.seed = setting.seed
        self.network = feature_network(setting.features)

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        """Pictures drawn from a prompt whose true picture is known, and which no scene reader can judge better."""
        return {"sample.image", "image"} <= sample.keys() and "scene" not in sample and not is_reconstruction(sample)

    def look(self, sample: Fields) -> Tensor:
        return self.network([sample["sample.image"]])[0]

    def expect(self, sample: Fields) -> tuple[str, Tensor]:
        return prompt_key(sample), self.network([sample["image"]])[0]

    def scores(self, seen: list[Tensor], expected: list[tuple[str, Tensor]]) -> list[Score]:
        gallery = dict(expected)
        place = {prompt: index for index, prompt in enumerate(gallery)}
        own = torch.tensor([place[prompt] for prompt, _ in expected])
        found = ranks(torch.stack(seen), torch.stack(list(gallery.values())), own).numpy()
        protocol = {"features": self.network.name, "resize": self.network.resize, "gallery": len(gallery), "similarity": "cosine"}
        scores = []
        for k in RANKS:
            if k < len(gallery):  # else everything is found
                hits, n = int((found < k).sum()), len(found)
                interval = bootstrap_share(found < k, np.ones(n), self.seed)
                scores.append(Score(f"R@{k}", hits / n, n, n, interval, chance=k / len(gallery), protocol=protocol))
        return scores
