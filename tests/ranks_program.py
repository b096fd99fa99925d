"""What torchrun starts for test_ranks.py: every rank does all jobs of a file, one after the other, through the stages' own doors.

Beside each result it leaves `batches-RANK.jsonl`: where each batch of this rank began in the stream, the keys of its samples,
and the ports it holds.
"""

import json
import sys
from pathlib import Path
from typing import Any

from stages import ranks
from stages.evaluate import evaluate
from stages.options import RunOptions
from stages.pretrain_tokenizer import Pictures, pretrain_tokenizer
from stages.recipe import load_recipe
from stages.sample import sample
from stages.tokenize_shards import tokenize_shards
from stages.train_unified import train_phases
from stages.training.stream import Stream

REPORT: Path


def record_batches(source: Any) -> None:
    """Let a source of batches write down what it gives to training."""
    take = source.next_batch

    def next_batch(self: Any) -> Any:
        before = self.position
        batch = take(self)
        if self.ranks > 1 or self.recorded:
            with (REPORT / f"batches-{ranks.rank()}.jsonl").open("a") as file:
                file.write(json.dumps([before, list(batch.keys), sorted(getattr(batch, "ports", ()))]) + "\n")
        return batch

    source.next_batch = next_batch


def do(job: dict[str, Any]) -> None:
    global REPORT
    REPORT = Path(job["out"]).parent
    options = RunOptions(**{"quiet": True, "dtype": "fp32", "seed": 4, **job.get("options", {})})
    shards, out = job["shards"], Path(job["out"])
    match job["stage"]:
        case "tokenize":
            tokenize_shards(shards, [Path(job["target"])], out, options)
        case "sample":
            sample(Path(job["target"]), shards, out, options)
        case "eval":
            evaluate(job["target"], shards, out, options)
        case "pretrain-tokenizer":
            pretrain_tokenizer(load_recipe(Path(job["recipe"])), shards, out, options)
        case stage:
            train_phases(stage, load_recipe(Path(job["recipe"])), shards, out, options, {}, (), None)


def main() -> None:
    Stream.recorded = Pictures.recorded = True  # type: ignore[attr-defined]
    record_batches(Stream)
    record_batches(Pictures)
    with ranks.joined():
        for job in json.loads(Path(sys.argv[1]).read_text()):
            do(job)


if __name__ == "__main__":
    main()
