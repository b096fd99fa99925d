"""Loss per port on held-out samples, with the same noise every time, so that two readings differ by the weights alone."""

import torch

from stages.data.shards import Shards
from stages.model import Model
from stages.recipe import Phase
from stages.sequence.plan import Planner
from stages.training.seeds import stream_seed
from stages.training.stream import Stream

NUM_SAMPLES = 256


class Validation:
    """A few fixed batches of the phase's tasks, conditions never dropped by another chance than training's."""

    def __init__(self, shards: Shards, planner: Planner, phase: Phase, seed: int) -> None:
        count = min(NUM_SAMPLES, len(shards))
        stream = Stream(shards, planner, replace_batch(phase, min(64, count)), seed=stream_seed(seed, "validation"))
        self.batches = [stream.next_batch() for _ in range(max(1, count // 64))]
        self.seed = seed

    @torch.no_grad()
    def losses(self, model: Model, device: torch.device) -> dict[str, float]:
        """`val/PORT` → mean loss over the supervised tokens of all batches."""
        training = [module for module in model.modules() if module.training]
        model.eval()
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for number, batch in enumerate(self.batches):
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "validation noise", number))
            for name, loss in model.losses(batch.to(device), generator).items():
                totals[name] = totals.get(name, 0.0) + float(loss.total)
                counts[name] = counts.get(name, 0) + loss.count
        for module in training:
            module.training = True
        return {f"val/{name}": totals[name] / counts[name] for name in totals if counts[name]}


def replace_batch(phase: Phase, batch_size: int) -> Phase:
    return phase.model_copy(update={"batch_size": batch_size, "batch_tokens": None})
