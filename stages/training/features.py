"""A frozen encoder looks at each picture once: its features are computed before the phase and kept, as `tokenize` keeps codes."""

import torch

from stages.data.shards import Shards
from stages.model import Model
from stages.recipe import Phase
from stages.sequence.plan import Planner
from stages.sequence.segment import Content

LIMIT_BYTES = 2 * 1024**3  # beyond this the encoder runs in every step instead
BATCH = 64


@torch.no_grad()
def precompute_features(model: Model, planner: Planner, datasets: list[Shards | None], phase: Phase) -> None:
    """Fill `planner.features` for every port whose encoder does not learn in this phase; forget those of encoders that now do."""
    planner.features.clear()
    device = next(model.parameters()).device
    for name, port in model.recipe.ports.items():
        reads_pictures = port.content == Content.FEATURES and port.encoder and not port.tokenizer and port.enters == "sequence"
        if not reads_pictures or any(parameter.requires_grad for parameter in model.encoders[port.encoder].parameters()):
            continue
        encoder = model.encoders[port.encoder].eval()
        fields = {segment.field for task in phase.tasks for segment in model.recipe.tasks[task].flat() if segment.port == name}
        for field in sorted(fields):
            planned = 0
            for shards in datasets:
                if shards is None or field not in shards.fields:
                    continue
                for start in range(0, len(shards), BATCH):
                    samples = [shards.read(i, fields=[field]) for i in range(start, min(start + BATCH, len(shards)))]
                    pictures = torch.stack([planner.picture(name, sample.fields[field]) for sample in samples]).to(device)
                    features = encoder(pictures).tokens.cpu()
                    planned += features.nbytes
                    if planned > LIMIT_BYTES:
                        planner.features.clear()
                        return
                    for sample, own in zip(samples, features, strict=True):
                        planner.features[sample.key, name, field] = own.clone()
