"""align: train what joins pretrained parts. Contrastive towers (an objective across samples, no backbone), connectors from a frozen
tower into a language model, and their later phases: the same story as train-unified, told over the phases whose stage is `align`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.options import RunOptions
from stages.recipe import Recipe
from stages.train_unified import train_phases


def align(
    recipe: Recipe,
    shards: str,
    out: Path,
    options: RunOptions,
    init: Mapping[str, str] | None = None,
    tokenizers: Sequence[Path] = (),
    val: str | None = None,
) -> Path:
    """Run the recipe's `align` phases. Returns the checkpoint folder."""
    return train_phases("align", recipe, shards, out, options, init or {}, tokenizers, val)
