"""Whole training runs through the stage's own door, on a small world: resume, phases, freezing, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import CAPTIONS, World, make_world, mixed_recipe, sample_of, state_tensors

from stages.data.sample import Sample
from stages.errors import UsageError
from stages.model import build_model
from stages.options import RunOptions
from stages.recipe import Recipe
from stages.train_unified import train_unified
from stages.training.checkpoint import open_checkpoint, read_weights, save_checkpoint
from stages.training.validation import Validation


def train(world: World, out: Path, *sets: str, init: dict[str, str] | None = None, recipe: Recipe | None = None, **options: Any) -> Path:
    settings = RunOptions(**{"quiet": True, "dtype": "fp32", "seed": 4, **options})
    return train_unified(recipe or mixed_recipe(*sets), str(world.shards), out, settings, init)


def weights(out: Path) -> dict[str, Tensor]:
    return read_weights(out / "model.safetensors")


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text())


def last_metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


EMA = "phases.joint.ema_decay=0.8"


def test_ten_steps_equal_five_stop_resume_five(world: World, tmp_path: Path) -> None:
    """Bit by bit: weights, averages, batches, noise and counts."""
    straight = train(world, tmp_path / "straight", EMA)
    broken = tmp_path / "broken"
    train(world, broken, EMA, max_steps=5)
    assert status(broken)["state"] == "stopped"
    assert (status(broken)["step"], status(broken)["of"]) == (5, 10)
    train(world, broken, EMA)
    assert status(broken)["state"] == "done"
    assert (broken / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    newest = "state/step-00000010"
    for part in ("model", "optimizer", "ema"):
        expected, found = state_tensors(straight / newest, part), state_tensors(broken / newest, part)
        assert expected
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    same = ("step", "samples", "tokens", "lr")
    assert {key: last_metrics(broken)[key] for key in same} == {key: last_metrics(straight)[key] for key in same}


def test_a_run_repeated_from_scratch_is_the_same_bytes_and_another_seed_is_not(world: World, tmp_path: Path) -> None:
    first, again, other = (
        train(world, tmp_path / name, "phases.joint.steps=3", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_stopped_run_leaves_a_checkpoint_that_can_be_used(world: World, tmp_path: Path) -> None:
    out = train(world, tmp_path / "out", max_steps=2)
    checkpoint = open_checkpoint(out)
    assert checkpoint.config["steps"] == 2
    assert set(checkpoint.tokenizers) == {"tokenizers.bpe", "autoencoders.vq", "autoencoders.vae"}
    assert checkpoint.config["grids"] == {"codes": [2, 3], "latents": [2, 3]}


def test_a_complete_run_says_so_and_touches_nothing(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(world, tmp_path / "out", "phases.joint.steps=2")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    train(world, out, "phases.joint.steps=2", quiet=False)
    assert "already complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("changed", "key"), [(("phases.joint.lr=5e-3",), "lr"), ((), "seed")])
def test_another_recipe_or_seed_does_not_continue_a_run(world: World, tmp_path: Path, changed: tuple[str, ...], key: str) -> None:
    out = train(world, tmp_path / "out", max_steps=1)
    with pytest.raises(UsageError, match=key):
        train(world, out, *changed, seed=4 if changed else 5)


def test_the_last_launch_of_a_stopped_run_may_go_no_further_than_it_says(world: World, tmp_path: Path) -> None:
    out = train(world, tmp_path / "out", max_steps=4)
    before = (out / "model.safetensors").read_bytes()
    train(world, out, max_steps=4)
    assert status(out)["state"] == "stopped"
    assert (out / "model.safetensors").read_bytes() == before


# phases

SECOND = """phases=[
  {name="first", stage="train-unified", tasks={draw=1.0}, steps=3, batch_size=2, lr=1e-3, ema_decay=0.5},
  {name="second", stage="train-unified", tasks={answer=1.0, paint=1.0}, steps=4, batch_size=3, lr=1e-3, frozen=["backbones.lm.experts.words"]},
]""".replace("\n", "")


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_phases_follow_each_other_and_a_stop_anywhere_changes_nothing(world: World, tmp_path: Path, stop: int) -> None:
    """Inside the first phase, at the border, inside the second."""
    straight = train(world, tmp_path / "straight", SECOND)
    assert status(straight)["step"] == 7
    broken = train(world, tmp_path / "broken", SECOND, max_steps=stop)
    assert (status(broken)["state"], status(broken)["step"]) == ("stopped", stop)
    train(world, broken, SECOND)
    assert status(broken)["state"] == "done"
    assert (broken / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_frozen_expert_keeps_every_bit_in_spite_of_weight_decay(world: World, tmp_path: Path) -> None:
    """Text tokens pass through it and through attention, and the optimizer decays weights: still not one bit moves."""
    start = tmp_path / "start"
    recipe = world.recipe(mixed_recipe())
    save_checkpoint(start, recipe, build_model(recipe, 9).state_dict())
    frozen = 'phases.joint.frozen=["backbones.lm.experts.words", "ports.text"]'
    out = train(world, tmp_path / "out", frozen, "phases.joint.weight_decay=0.5", init={"backbones.lm": str(start)})
    before, after = weights(start), weights(out)
    held = [name for name in after if name.startswith(("backbones.lm.experts.words.", "ports.text."))]
    assert len(held) > 10
    assert all(torch.equal(after[name], before[name]) for name in held)
    moved = [name for name in after if name.startswith("backbones.lm.experts.pictures.")]
    assert all(not torch.equal(after[name], before[name]) for name in moved if after[name].dim() > 1)


def test_a_part_that_is_frozen_and_starts_from_nothing_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'backbones\.lm' is frozen in every phase and starts from nothing") as caught:
        train(world, tmp_path / "out", 'phases.joint.frozen=["backbones.lm"]')
    assert "--init backbones.lm=DIR" in caught.value.hint


def test_the_average_is_what_a_run_leaves_and_the_state_keeps_both(world: World, tmp_path: Path) -> None:
    out = train(world, tmp_path / "out", EMA)
    state = out / "state" / "step-00000010"
    averages, live = state_tensors(state, "ema"), state_tensors(state, "model")
    assert all(torch.equal(weights(out)[name], value) for name, value in averages.items())
    assert not torch.equal(averages["ports.text.head.weight"], live["ports.text.head.weight"])
    assert open_checkpoint(out).config["ema"] is True


# refusals


def test_codes_of_another_codebook_are_refused(world: World, tmp_path: Path) -> None:
    """Shards whose codes were written by one tokenizer, trained with another that looks the same."""
    other = mixed_recipe()
    second = make_world(tmp_path / "second", other, [sample_of(0)])
    folder = second.tokenizers["autoencoders.vq"]
    tensors = {name: value + 0.25 for name, value in read_weights(folder / "model.safetensors").items()}
    save_checkpoint(folder, open_checkpoint(folder).recipe, tensors)
    with pytest.raises(
        UsageError, match=r"the field 'image\.codes' was written by the tokenizer [0-9a-f]{8}, but autoencoders\.vq is [0-9a-f]{8}"
    ):
        train_unified(other, str(world.shards), tmp_path / "out", RunOptions(quiet=True), tokenizers=[folder])


def test_shards_without_tokenizers_say_which_one_is_needed(tmp_path: Path) -> None:
    from stages.data.shards import ShardWriter

    with ShardWriter(tmp_path / "bare") as writer:
        writer.write(Sample("a", {"caption": CAPTIONS[0], "image": np.zeros((8, 12, 3), np.uint8)}))
    with pytest.raises(
        UsageError, match=r"recipe 'test' needs a text tokenizer \(tokenizers\.bpe\), and none came with the shards"
    ) as caught:
        train_unified(mixed_recipe(), str(tmp_path / "bare"), tmp_path / "out", RunOptions(quiet=True))
    assert "mmgen tokenize" in caught.value.hint


def test_a_failing_validation_is_said_and_training_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Validation, model: Any, device: Any) -> dict[str, float]:
        raise RuntimeError("no room for the validation batch")

    straight = train_unified(
        mixed_recipe(), str(world.shards), tmp_path / "straight", RunOptions(quiet=True, seed=4), val=str(world.shards)
    )
    monkeypatch.setattr(Validation, "losses", fail)
    out = train_unified(mixed_recipe(), str(world.shards), tmp_path / "out", RunOptions(seed=4), val=str(world.shards))
    assert status(out)["state"] == "done"
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert "validation failed, training goes on (RuntimeError: no room for the validation batch)" in capsys.readouterr().err
