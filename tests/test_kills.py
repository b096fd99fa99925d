"""kill -9 at any step of any stage, then the same command again: the result is byte for byte that of a run nobody killed."""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import completes, contents, dies_at, durable_steps, stopped_at
from worlds import CAPTIONS, make_world, mixed_recipe, sample_of

from stages.align import align
from stages.evaluate import evaluate
from stages.import_data import import_data
from stages.options import RunOptions
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import load_recipe
from stages.sample import sample
from stages.tokenize_shards import tokenize_shards
from stages.train_unified import train_unified
from stages.training import loop

QUIET = RunOptions(quiet=True, dtype="fp32", device="cpu", seed=5)
ENDS = {signal.SIGTERM: (75, "preempted"), signal.SIGINT: (130, "stopped"), signal.SIGHUP: (75, "preempted")}
STAGES = ["import", "text tokenizer", "autoencoder", "tokenize", "align", "train", "sample", "eval"]


@dataclass
class Laid:
    """What the stages under test work on, made once."""

    folder: Path
    stages: dict[str, Callable[[Path], object]]


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laid]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kills")
    pixels = load_recipe(
        "vqgan", size="tiny", sets=["phases.train.steps=3", "phases.train.batch_size=4", "autoencoders.vq.quantizer.codebook_size=8"]
    )
    words = load_recipe("text-bpe", size="tiny")
    towers = load_recipe("clip", size="tiny", sets=["phases.contrast.steps=3", "phases.contrast.batch_size=4"])
    import_data("scenes", None, folder / "data", RunOptions(quiet=True, seed=1, limit=24), level=0, count=24)
    pretrain_tokenizer(pixels, str(folder / "data"), folder / "pixels", QUIET)
    pretrain_tokenizer(words, str(folder / "data"), folder / "words", QUIET)
    world = make_world(folder / "world", mixed_recipe(), [sample_of(number) for number in range(len(CAPTIONS))])
    short = mixed_recipe("phases.joint.steps=3", "phases.joint.ema_decay=0.5")
    train_unified(short, str(world.shards), folder / "model", QUIET)
    many = make_world(folder / "many", mixed_recipe(), [sample_of(number, qa=[_asked(number)]) for number in range(66)])
    yield Laid(
        folder,
        {
            "import": lambda out: import_data("scenes", None, out, RunOptions(quiet=True, seed=1, limit=8), level=0, count=8),
            "text tokenizer": lambda out: pretrain_tokenizer(words, str(folder / "data"), out, QUIET),
            "autoencoder": lambda out: pretrain_tokenizer(pixels, str(folder / "data"), out, QUIET),
            "tokenize": lambda out: tokenize_shards(str(folder / "data"), [folder / "pixels"], out, QUIET),
            "align": lambda out: align(towers, str(folder / "data"), out, QUIET, tokenizers=[folder / "words"]),
            "train, 2 workers": lambda out: train_unified(short, str(world.shards), out, replace(QUIET, workers=2)),
            "train": lambda out: train_unified(short, str(world.shards), out, QUIET),
            "sample": lambda out: sample(folder / "model", str(many.shards), out, QUIET),
            "eval": lambda out: evaluate(str(folder / "model"), str(many.shards), out, RunOptions(quiet=True, seed=5, limit=3)),
        },
    )
    torch.set_num_threads(threads)


def _asked(number: int) -> dict[str, str]:
    return {"question": "how many?", "answer": str(number), "type": "count"}


def kill_everywhere(laid: Laid, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """Kill at `places` steps on the disk (drawn from all; the last kill comes in the run that follows the first), and compare."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", (-1.0, -1.0))  # a training state after every step: more places to die at
    monkeypatch.setattr(loop, "MAX_SAVE_SHARE", 1.0)
    work = laid.stages[stage]
    straight = tmp_path / "straight" / "out"
    steps = durable_steps(partial(work, straight))
    expected = contents(straight)
    assert steps > 10
    rng = random.Random(stage)
    for number, step in enumerate(sorted(rng.sample(range(steps), min(places, steps)))):
        out = tmp_path / f"killed-{number}" / "out"  # the last part is the same: cards name it
        dies_at(partial(work, out), step, after=rng.random() < 0.5)
        if number % 2:
            dies_at(partial(work, out), rng.randrange(steps), after=rng.random() < 0.5)
        completes(partial(work, out))
        found = contents(out)
        assert found.keys() == expected.keys(), f"killed at step {step} of {steps}"
        assert [name for name in found if found[name] != expected[name]] == [], f"killed at step {step} of {steps}"
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_run_again_gives_the_same_bytes(laid: Laid, stage: str, tmp_path: Path, monkeypatch: Any) -> None:
    kill_everywhere(laid, stage, tmp_path, monkeypatch, places=4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_any_step_run_again_gives_the_same_bytes(laid: Laid, stage: str, tmp_path: Path, monkeypatch: Any) -> None:
    kill_everywhere(laid, stage, tmp_path, monkeypatch, places=10_000)


def signal_everywhere(laid: Laid, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """A signal to the whole group (data workers, too) at `places` steps on the disk; then the same command."""
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", (-1.0, -1.0))
    monkeypatch.setattr(loop, "MAX_SAVE_SHARE", 1.0)
    work = laid.stages[stage]
    straight = tmp_path / "straight" / "out"
    steps = durable_steps(partial(work, straight))
    expected = contents(straight)
    rng = random.Random(stage)
    for step in sorted(rng.sample(range(steps), min(places, steps))):
        number = rng.choice(list(ENDS))
        out = tmp_path / f"signalled-{step}" / "out"
        code, told = stopped_at(partial(work, out), step, number)
        where = f"{number.name} at step {step} of {steps}: {told}"
        assert code == ENDS[number][0], where
        assert told.count("error: stopped by ") == len([line for line in told.splitlines() if not line.startswith("hint: ")]) == 1, where
        statuses = [json.loads(path.read_text()) for path in (out / "status.json", out / ".mmgen" / "status.json") if path.exists()]
        if statuses and statuses[0]["state"] != "done":  # all was done already, and then it is
            assert (statuses[0]["exit_code"], statuses[0]["state"]) == ENDS[number], where
            assert number.name in statuses[0]["message"]
        completes(partial(work, out))
        found = contents(out)
        assert found.keys() == expected.keys(), where
        assert [name for name in found if found[name] != expected[name]] == [], where
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("stage", [*STAGES, "train, 2 workers"])
def test_a_signalled_stage_says_so_and_goes_on_to_the_same_bytes(laid: Laid, stage: str, tmp_path: Path, monkeypatch: Any) -> None:
    signal_everywhere(laid, stage, tmp_path, monkeypatch, places=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, "train, 2 workers"])
def test_a_stage_signalled_at_any_step_goes_on_to_the_same_bytes(laid: Laid, stage: str, tmp_path: Path, monkeypatch: Any) -> None:
    signal_everywhere(laid, stage, tmp_path, monkeypatch, places=10_000)
