"""`python deal.py FIELD SHARDS OUT`: the same samples, but a field of each is that of another; a model can learn nothing from it but what
it looks like. With `caption` or `qa` these are the placebo arms: both abilities are trained, and one of them on noise."""

import sys
from pathlib import Path

import numpy as np

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards


def main(field: str, source: str, out: str) -> None:
    shards = open_shards(source)
    order = np.random.default_rng(0).permutation(len(shards))  # in a ring: everybody's neighbour, nobody's own
    giver = {int(place): int(order[(number + 1) % len(order)]) for number, place in enumerate(order)}
    with ShardWriter(Path(out), name="data", split="train", provenance={"dealt": field, "of": shards.fingerprint}) as writer:
        for place in range(len(shards)):
            sample = shards[place]
            writer.write(Sample(sample.key, {**sample.fields, field: shards[giver[place]].fields[field]}, sample.source))


if __name__ == "__main__":
    main(*sys.argv[1:])
