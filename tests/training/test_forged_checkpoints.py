"""Checkpoints from a stranger: what the recipe describes must be what the weights are, before it costs time or memory; weights are finite."""

import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import World, make_world, mixed_recipe, sample_of

from stages.errors import DataError, GuardError, MmgenError, RecipeError
from stages.model import build_model, check_memory, meta_model, on_meta
from stages.options import RunOptions
from stages.sample import sample
from stages.train_unified import train_unified
from stages.training.checkpoint import (
    describe_checkpoint,
    load_any_tokenizer,
    load_autoencoder,
    load_model,
    read_weights,
    save_weights,
)
from stages.training.released import fill, open_starts

PICTURE = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), mixed_recipe(), [sample_of(number, image=PICTURE) for number in range(3)])


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "run"
    return train_unified(mixed_recipe(), str(world.shards), out, RunOptions(quiet=True, dtype="fp32", max_steps=1))


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "model"))


def forge(folder: Path, old: str, new: str) -> None:
    text = (folder / "recipe.toml").read_text()
    assert old in text
    (folder / "recipe.toml").write_text(text.replace(old, new, 1))


def refused(act: Callable[[], Any], match: str) -> None:
    """One message, soon, and without the memory that was asked for."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(MmgenError, match=match) as caught:
            act()
        assert time.perf_counter() - begin < 2
        assert tracemalloc.get_traced_memory()[1] < 20e6
        assert caught.value.exit_code in (2, 3)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("depth = 3", "depth = 10000000", r"backbones\.lm\.depth: expected at most 1024"),
        ("depth = 3", "depth = 1000", r"holds \d+ tensors, and recipe\.toml beside it describes others"),
        ("depth = 3", "depth = 4", r"model\.safetensors: \d+ weights missing"),
        ("width = 48", "width = 60000\nhead_dim = 8", r"reshaped: "),
        ("vocab_size = ", "vocab_size = 4000", r"reshaped: "),
        (
            'experts = [\n    "words",',
            "experts = [\n" + "".join(f'    "e{n}",\n' for n in range(200)) + '    "words",',
            r"describes others",
        ),
    ],
)
def test_a_recipe_that_is_not_that_of_the_weights_costs_nothing(model: Path, old: str, new: str, said: str) -> None:
    forge(model, old, new)
    refused(lambda: load_model(model), said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("channels = 8", "channels = 65536", r"reshaped: "),
        ("channels = 8", "channels = 65532", "does not divide into 32 groups"),
        ("blocks_per_level = 1", "blocks_per_level = 1000", "describes others"),
        ("codebook_size = 11", "codebook_size = 1000000", r"reshaped: "),
        ("codebook_size = 11", "codebook_size = 1000000000000", r"codebook_size: expected at most"),
    ],
)
def test_a_tokenizer_that_travels_is_looked_at_in_the_same_way(world: World, tmp_path: Path, old: str, new: str, said: str) -> None:
    folder = Path(shutil.copytree(world.tokenizers["autoencoders.vq"], tmp_path / "vq"))
    text = (folder / "recipe.toml").read_text()
    if old not in text:
        (folder / "recipe.toml").write_text(text.replace("[autoencoders.vq]", f"[autoencoders.vq]\n{new}"))
    else:
        forge(folder, old, new)
    refused(lambda: load_any_tokenizer(folder), said)


def test_a_recipe_of_too_many_tensors_is_given_up_and_one_that_no_memory_holds_says_how_large_it_is() -> None:
    with pytest.raises(RecipeError, match="more than 20 tensors"):
        meta_model(mixed_recipe(), most=20)
    meta_model(mixed_recipe())  # the count ends with the module
    huge = mixed_recipe("backbones.lm.width=65536", "backbones.lm.depth=20", "backbones.lm.head_dim=8")
    refused(lambda: build_model(huge, 0), r"parameters take [\d,.]+ GiB, and this machine has")
    with pytest.raises(RecipeError, match="GiB"):
        check_memory(on_meta(lambda: torch.nn.Linear(2**24, 2**24)), "a layer")


# what config.json says


@pytest.mark.parametrize("grid", [[10**6, 10**6], [0, 3], [-1, -1], [2.5, 2], ["2", 3], "23", None, [True, 3], [2, 3, 1, 1], [], {"a": 1}])
def test_the_size_of_pictures_is_believed_within_bounds_only(model: Path, world: World, tmp_path: Path, grid: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    config["grids"]["codes"] = grid
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"grids\.codes"):
        sample(model, str(world.shards), tmp_path / "out", RunOptions(quiet=True), tasks=["draw"])


@pytest.mark.parametrize("size", [[10**9, 10**9], [16], "16", [16, "16"], [float("inf"), 16], [0, 0]])
def test_the_size_a_tokenizer_was_trained_on_is_believed_within_bounds_only(world: World, tmp_path: Path, size: Any) -> None:
    folder = Path(shutil.copytree(world.tokenizers["autoencoders.vq"], tmp_path / "vq"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"picture_size": size}))
    with pytest.raises(DataError, match="picture_size"):
        describe_checkpoint(folder)


# weights that are not finite


def spoil(folder: Path, part: str, value: float) -> str:
    """One number of one weight of a part becomes NaN or infinity; returns the weight's name."""
    tensors = read_weights(folder / "model.safetensors")
    name = next(name for name, tensor in sorted(tensors.items()) if name.startswith(part) and tensor.is_floating_point())
    tensors[name].view(-1)[-1] = value
    save_weights(folder / "model.safetensors", tensors)
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_with_weights_that_are_not_finite_is_not_sampled_from(model: Path, world: World, tmp_path: Path, value: float) -> None:
    name = spoil(model, "backbones.", value)
    with pytest.raises(DataError, match=f"1 of .* not finite: {name}"):
        sample(model, str(world.shards), tmp_path / "out", RunOptions(quiet=True))


def test_nor_does_an_autoencoder_with_them_encode_or_a_part_start_from_them(model: Path, world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.tokenizers["autoencoders.vq"], tmp_path / "vq"))
    name = spoil(folder, "autoencoders.", float("nan"))
    with pytest.raises(DataError, match=f"not finite: {name.removeprefix('autoencoders.vq.')}"):
        load_autoencoder(folder)
    name = spoil(model, "backbones.", float("inf"))
    with pytest.raises(DataError, match=f"not finite: {name}"):
        fill(build_model(load_recipe_of(model), 0), *open_starts({"backbones.lm": str(model)}))


def load_recipe_of(folder: Path) -> Any:
    return load_model(folder, untrained=True)[0].recipe


def test_large_weights_whose_sum_is_infinite_are_finite(model: Path) -> None:
    tensors = read_weights(model / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.numel() > 4 and tensor.is_floating_point())
    tensors[name].fill_(3e38)
    save_weights(model / "model.safetensors", tensors)
    load_model(model)


def test_numbers_that_overflow_in_the_model_are_not_finite(model: Path) -> None:
    tensors = read_weights(model / "model.safetensors")
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    tensors[name] = torch.full(tensors[name].shape, 1e300, dtype=torch.float64)
    save_weights(model / "model.safetensors", tensors)
    with pytest.raises(DataError, match=f"not finite: {name}"):
        load_model(model)


@pytest.mark.parametrize("task", ["draw", "paint", "answer"])
def test_predictions_that_are_not_finite_end_the_run(model: Path, world: World, tmp_path: Path, task: str) -> None:
    """Weights that are finite and overflow in the first layer."""
    tensors = read_weights(model / "model.safetensors")
    for name, tensor in tensors.items():
        if (name.startswith("ports.") and "head" in name) or "norm" in name:
            tensor.fill_(3e38)
    save_weights(model / "model.safetensors", tensors)
    with pytest.raises(GuardError, match="NaN or infinity"):
        sample(model, str(world.shards), tmp_path / "out", RunOptions(quiet=True, dtype="fp32"), tasks=[task])
