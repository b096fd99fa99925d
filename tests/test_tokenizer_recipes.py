"""Every recipe of an image tokenizer can be planned and trained, and codes of every shape go through a unified model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import CAPTIONS, make_world

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.footprint import autoencoder_bytes, kept_by_autograd
from stages.options import RunOptions
from stages.plan_run import plan_run
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import RECIPES, load_recipe
from stages.sample import sample
from stages.train_unified import train_unified
from stages.training.checkpoint import load_autoencoder

TOKENIZERS = sorted(path.stem for path in (RECIPES / "tokenizers").glob("*.toml"))
OF_PICTURES = [name for name in TOKENIZERS if load_recipe(name, size="tiny").autoencoders]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of 32 x 32 pixels, each of its own noise."""
    folder = tmp_path_factory.mktemp("pictures") / "train"
    with ShardWriter(folder, split="train", provenance={"stage": "import"}) as writer:
        for number in range(9):
            noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3)).astype(np.uint8)
            writer.write(Sample(f"{number}", {"image": noise}))
    return folder.parent


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("name", OF_PICTURES)
def test_every_tokenizer_is_planned(name: str, size: str, pictures: Path) -> None:
    """What `--dry-run` prints: the grid, and the memory of a step, measured on the autoencoder as it is."""
    recipe = load_recipe(name, size=size)
    ((address, config),) = recipe.autoencoders.items()
    (phase,) = plan_run(recipe, "pretrain-tokenizer", str(pictures))["phases"]
    assert phase["grid"] == list(config.grid(32, 32))
    autoencoder: Any = config.build()
    latents = torch.zeros(1, config.latent_channels, *config.grid(32, 32))
    kept = kept_by_autograd(autoencoder, lambda: (autoencoder.encoder(torch.zeros(1, 3, 32, 32)), autoencoder.decode(latents)))
    assert autoencoder_bytes(recipe, address, 32, 32) == pytest.approx(kept, rel=0.01)
    assert phase["memory"]["activations"] == recipe.phases[0].batch_size * autoencoder_bytes(recipe, address, 32, 32)  # type: ignore[operator]


@pytest.mark.parametrize("name", OF_PICTURES)
def test_every_tokenizer_trains_and_its_checkpoint_gives_pictures_back(name: str, pictures: Path, tmp_path: Path) -> None:
    recipe = load_recipe(name, size="tiny", sets=["phases.train.steps=2", "phases.train.batch_size=4"])
    folder = pretrain_tokenizer(recipe, str(pictures), tmp_path / "run", RunOptions(quiet=True, dtype="fp32", seed=1))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and np.isfinite(losses).all()
    autoencoder = load_autoencoder(folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(images)
        assert autoencoder.decode(latents).shape == images.shape
        if autoencoder.codebook_size is not None:
            codes = autoencoder.encode_codes(images)
            assert codes.shape[1:] == autoencoder.config.code_shape(32, 32)
            assert torch.equal(autoencoder.decode_codes(codes), autoencoder.decode(latents))


VQ = 'quantizer = { kind = "vq", codebook_size = 16, codebook_dim = 4, project = false }, latent_channels = 4'
CNN = 'kind = "cnn", downsample = 4, multipliers = [1, 1, 1], channels = 8, latent_channels = 4'
SHAPES = {
    "row": ((7,), f'{{ kind = "vit-1d", image_size = 16, num_latents = 7, downsample = 4, width = 12, depth = 1, heads = 2, {VQ} }}'),
    "scales": (
        (5,),
        f'{{ {CNN}, quantizer = {{ kind = "multi-scale", codebook_size = 16, codebook_dim = 4, sides = [1, 2], phis = 1 }} }}',
    ),
    "depth": ((2, 2, 3), f'{{ {CNN}, quantizer = {{ kind = "residual", codebook_size = 16, codebook_dim = 4, depth = 2 }} }}'),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["show-o", "chameleon"])
def test_codes_of_every_shape_are_learned_and_drawn(name: str, shape: str, tmp_path: Path) -> None:
    """A unified model on fabricated codes: two steps, then what it draws are pictures of such codes, of the autoencoder's size."""
    code_shape, autoencoder = SHAPES[shape]
    sets = [f"autoencoders.image={autoencoder}", "phases.joint.steps=2", "phases.joint.batch_tokens=256"]
    recipe = load_recipe(name, size="tiny", sets=[entry.replace("joint", load_recipe(name, size="tiny").phases[0].name) for entry in sets])
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            f"{number:04d}",
            {
                "caption": caption,
                "qa": [{"question": "how many?", "answer": str(number)}],
                "image": np.zeros((8, 12, 3), np.uint8),
                "image.codes": rng.integers(0, 16, code_shape).astype(np.int32),
            },
        )
        for number, caption in enumerate(CAPTIONS[:3])
    ]
    world = make_world(tmp_path / "world", recipe, samples)
    options = RunOptions(quiet=True, dtype="fp32", seed=1)
    run = train_unified(recipe, str(world.shards), tmp_path / "run", options)
    written = list(open_shards(str(sample(run, str(world.shards), tmp_path / "samples", options))))
    expected = {"row": (16, 16, 3), "scales": (8, 8, 3), "depth": (8, 12, 3)}[shape]
    assert [entry.fields["sample.image"].shape for entry in written] == [expected] * 3
