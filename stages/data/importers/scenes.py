"""The built-in world as a data set: seeded scenes of coloured shapes (see `stages.data.scenes`)."""

from collections.abc import Iterator

from stages.data.importers.raw import RawData
from stages.data.sample import Sample
from stages.data.scenes.plans import check_plans
from stages.data.scenes.samples import scene_sample
from stages.data.scenes.world import LEVELS, SPLITS
from stages.errors import UsageError

MAX_COUNT = 10**8  # training samples: more than a disk holds


def samples(*, level: int = 1, count: int = 1000, seed: int = 0, edits: bool = True, plans: int = 0) -> RawData:
    """The built-in world: pictures of coloured shapes with captions, questions, scene graphs and edits, all exactly true.

    `val` holds unseen scenes, `heldout` unseen combinations of shape and colour; each has max(64, count / 10) samples.

    level: 0 (25 states a cell, 32 px) to 4 (9 textured objects that overlap, 96 px)
    count: number of training samples
    edits: also an instruction and the pictures before and after it, in each sample
    plans: also a request in each sample and its plan of at most so many tool calls, 1 or 2

    Example:
      mmgen import scenes --level 0 --count 5000 --out data
    """
    if not 0 <= level < len(LEVELS):
        raise UsageError(f"--level {level}: the levels are 0 to {len(LEVELS) - 1}")
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"--count {count}: expected 1 to {MAX_COUNT:,}")
    check_plans(plans)
    sizes = {split: count if split == "train" else max(64, count // 10) for split in SPLITS}

    def generate(split: str) -> Iterator[Sample]:
        return (scene_sample(level, seed, split, index, edits=edits, plans=plans) for index in range(sizes[split]))

    pairs = " and ".join(f"{colour} {shape}s" for shape, colour in LEVELS[level].held_out)
    return RawData(
        splits={split: generate(split) for split in SPLITS},
        fingerprint=f"scenes level {level}",
        licence="apache-2.0",
        notes=f"Generated pictures. `val` shows scenes that `train` never shows; `heldout` shows {pairs}, which the others never do.",
    )
