"""pretrain-tokenizer, through its real door: what it leaves behind, that it learns, resumes, and says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import state_tensors

from stages.data.sample import Sample
from stages.data.shards import ShardWriter
from stages.errors import DataError, GuardError, RecipeError
from stages.options import RunOptions
from stages.parts.autoencoders.kl_cnn import KLAutoencoder
from stages.parts.tokenizers import load_tokenizer
from stages.parts.views.square import to_tensor
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import Recipe, load_recipe, recipe_names
from stages.training.checkpoint import fingerprint, load_autoencoder, read_weights

QUIET = RunOptions(quiet=True)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The state of torch these runs change: threads, and deterministic algorithms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def picture(number: int, height: int = 16, width: int = 24) -> np.ndarray:
    """A coloured block on grey; which colour and where depends on the number."""
    colours = [(220, 30, 30), (30, 160, 60), (40, 80, 220), (250, 200, 20)]
    image = np.full((height, width, 3), 200, np.uint8)
    top, left = number % 2 * height // 2, number // 2 % 3 * width // 3
    image[top : top + height // 2, left : left + width // 3] = colours[number // 6 % 4]
    return image


def write_shards(folder: Path, count: int = 48, make: Callable[[int], np.ndarray] = picture) -> Path:
    for split, numbers in (("train", range(count)), ("val", range(count, count + 12))):
        with ShardWriter(folder / split, split=split, samples_per_shard=20) as writer:
            for n in numbers:
                record = {"question": f"where is block {n % 6}?", "answer": "here", "type": "place"}
                writer.write(Sample(f"{split}-{n:03d}", {"image": make(n), "caption": f"block {n % 24} on grey", "qa": [record]}))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("pictures"))


def recipe(name: str, **sets: Any) -> Recipe:
    small = {"phases.train.steps": 6, "phases.train.batch_size": 8} if name != "text-bpe" else {}
    table = {**small, **{key.replace("__", "."): value for key, value in sets.items()}}
    return load_recipe(name, size="tiny", sets=[f"{key}={toml(value)}" for key, value in table.items()])


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_weights(out / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_an_autoencoder_learns_to_give_pictures_back(shards: Path, tmp_path: Path) -> None:
    """200 steps on 24 different pictures; mean grey would be at 10 dB."""
    out = pretrain_tokenizer(recipe("vqgan", phases__train__steps=200, phases__train__batch_size=16), str(shards), tmp_path / "out", QUIET)
    last = metrics(out)[-1]
    assert last["val/pictures"] == 12
    assert last["val/codes"] == 12 * 2 * 3
    assert last["val/psnr"] > 17
    assert last["val/perplexity"] > 4
    autoencoder = load_autoencoder(out)
    image = to_tensor(picture(50)).unsqueeze(0)
    with torch.no_grad():
        rebuilt = autoencoder.decode_codes(autoencoder.encode_codes(image))
    assert float((rebuilt - image).square().mean()) < 0.08  # 17 dB
    config = json.loads((out / "config.json").read_text())
    assert config["psnr"] == last["val/psnr"]
    assert config["steps"] == 200
    assert json.loads((out / "status.json").read_text())["state"] == "done"


def test_latents_of_a_kl_checkpoint_have_unit_variance(shards: Path, tmp_path: Path) -> None:
    out = pretrain_tokenizer(recipe("kl-autoencoder"), str(shards), tmp_path / "out", QUIET)
    autoencoder = load_autoencoder(out)
    assert isinstance(autoencoder, KLAutoencoder)
    with torch.no_grad():
        latents = autoencoder.encode(torch.stack([to_tensor(picture(n)) for n in range(48)]))
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(8), atol=1e-3, rtol=0)
    assert metrics(out)[-1]["val/latent_std"] == pytest.approx(1.0, abs=0.2)


ADVERSARIAL = {
    "objectives__reconstruct__terms": {"adversarial": 0.5, "l1": 1.0, "l2": 0.0, "perceptual": 1.0},
    "objectives__reconstruct__discriminator": {"channels": 8, "layers": 2, "start_step": 2},
}


def test_stopping_and_resuming_gives_the_same_bytes_as_not_stopping(shards: Path, tmp_path: Path) -> None:
    """With a discriminator, a moving average, and a codebook that draws at random; the stop is before the discriminator starts."""
    told = recipe("vqgan", **ADVERSARIAL, phases__train__ema_decay=0.9)
    whole = pretrain_tokenizer(told, str(shards), tmp_path / "whole", QUIET)
    parts = pretrain_tokenizer(told, str(shards), tmp_path / "parts", RunOptions(quiet=True, max_steps=1))
    assert json.loads((parts / "status.json").read_text())["state"] == "stopped"
    for stop in (3, None):
        pretrain_tokenizer(told, str(shards), parts, RunOptions(quiet=True, max_steps=stop))
    assert_same_weights(whole, parts)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert [line["step"] for line in metrics(parts) if "val/psnr" in line][-1] == 6


def test_the_checkpoint_holds_the_autoencoder_and_the_state_the_discriminator_too(shards: Path, tmp_path: Path) -> None:
    out = pretrain_tokenizer(recipe("vqgan", **ADVERSARIAL), str(shards), tmp_path / "out", QUIET)
    assert {name.split(".")[0] for name in weights(out)} == {"autoencoders"}
    (state,) = (out / "state").iterdir()
    learning = state_tensors(state, "model")
    moved = [name for name in learning if name.startswith("objectives.reconstruct.discriminator.")]
    assert moved
    assert any(name.startswith("discriminator.") for name in state_tensors(state, "optimizer"))
    losses = {name for line in metrics(out) for name in line if name.startswith("loss")}
    assert {"loss", "loss/l1", "loss/perceptual", "loss/discriminator", "loss/adversarial", "loss/commitment"} <= losses


def test_a_run_that_is_complete_is_left_alone(shards: Path, tmp_path: Path) -> None:
    out = pretrain_tokenizer(recipe("vqgan"), str(shards), tmp_path / "out", QUIET)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    pretrain_tokenizer(recipe("vqgan"), str(shards), out, QUIET)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_pictures_that_do_not_fit_memory_train_the_same(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = pretrain_tokenizer(recipe("vqgan"), str(shards), tmp_path / "memory", QUIET)
    monkeypatch.setattr("stages.pretrain_tokenizer.IN_MEMORY", 0)
    assert_same_weights(in_memory, pretrain_tokenizer(recipe("vqgan"), str(shards), tmp_path / "disk", QUIET))


def test_the_seed_decides(shards: Path, tmp_path: Path) -> None:
    outs = [pretrain_tokenizer(recipe("vqgan"), str(shards), tmp_path / str(seed), RunOptions(quiet=True, seed=seed)) for seed in (1, 2)]
    assert fingerprint(outs[0]) != fingerprint(outs[1])


def test_pictures_of_several_sizes_need_a_view(tmp_path: Path) -> None:
    mixed = write_shards(tmp_path / "mixed", make=lambda n: picture(n, 16 + 8 * (n % 2), 24))
    with pytest.raises(DataError, match="24 x 24, others are 16 x 24") as caught:
        pretrain_tokenizer(recipe("vqgan"), str(mixed), tmp_path / "out", QUIET)
    assert "view" in caught.value.hint
    viewed = recipe("vqgan", ports__image__view={"kind": "square", "size": 16})
    out = pretrain_tokenizer(viewed, str(mixed), tmp_path / "viewed", QUIET)
    assert metrics(out)[-1]["val/codes"] == 12 * 2 * 2


def test_pictures_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    odd = write_shards(tmp_path / "odd", make=lambda n: picture(n, 18, 24))
    with pytest.raises(DataError, match="multiples of 8"):
        pretrain_tokenizer(recipe("vqgan"), str(odd), tmp_path / "out", QUIET)


def test_a_dead_codebook_ends_the_run(tmp_path: Path) -> None:
    grey = write_shards(tmp_path / "grey", make=lambda n: np.full((8, 8, 3), 128, np.uint8))
    with pytest.raises(GuardError, match="codebook died"):
        pretrain_tokenizer(recipe("vqgan"), str(grey), tmp_path / "out", QUIET)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["exit_code"] == 4


def test_bad_samples_are_left_out_and_counted(shards: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    tar = broken / "train" / "data-000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.find(b"IDAT") + 12] ^= 0xFF
    tar.write_bytes(content)
    for path in (broken / "train" / ".mmgen").glob("shardindex.json"):
        path.unlink()
    out = pretrain_tokenizer(recipe("vqgan"), str(broken), tmp_path / "out", RunOptions(quiet=True, max_bad_fraction=0.1))
    (bad,) = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert bad["key"] == "train-000"


def test_a_text_tokenizer_learns_from_captions_and_questions(shards: Path, tmp_path: Path) -> None:
    out = pretrain_tokenizer(recipe("text-bpe"), str(shards), tmp_path / "out", QUIET)
    tokenizer = load_tokenizer(out)
    (line,) = metrics(out)
    assert line["vocab_size"] == tokenizer.vocab_size < 512
    assert line["bytes_per_token"] > 2
    assert len(tokenizer.encode(" block")) == 1  # in captions and in questions
    assert len(tokenizer.encode("here")) == 1  # in answers only
    again = pretrain_tokenizer(recipe("text-bpe"), str(shards), tmp_path / "again", QUIET)
    assert fingerprint(again) == fingerprint(out)
    limited = pretrain_tokenizer(recipe("text-bpe"), str(shards), tmp_path / "limited", RunOptions(quiet=True, limit=3))
    assert load_tokenizer(limited).vocab_size < tokenizer.vocab_size


def test_shards_without_the_wanted_fields_are_refused_by_name(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of them") as caught:
        pretrain_tokenizer(recipe("text-bpe", tokenizers__bpe__fields=["story"]), str(shards), tmp_path / "text", QUIET)
    assert "caption" in caught.value.hint
    other = recipe("vqgan", tasks__reconstruct__segments=[{"port": "image", "field": "frame"}])
    with pytest.raises(DataError, match="learns from frame"):
        pretrain_tokenizer(other, str(shards), tmp_path / "pictures", QUIET)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"objectives__reconstruct__port": "picture"}, "no port 'picture'"),
        ({"tasks__reconstruct__objectives": []}, "no task"),
    ],
)
def test_recipes_that_cannot_be_trained_say_why(sets: dict[str, Any], said: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        pretrain_tokenizer(recipe("vqgan", **sets), str(shards), tmp_path / "out", QUIET)


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
def test_one_text_tokenizer_serves_every_shipped_recipe(size: str) -> None:
    (bpe,) = load_recipe("text-bpe", size=size).tokenizers.values()
    for name in recipe_names():
        for config in load_recipe(name, size=size).tokenizers.values():
            assert set(config.special) <= set(bpe.special), name


def test_every_line_of_the_log_says_how_the_codebook_is(shards: Path, tmp_path: Path) -> None:
    out = pretrain_tokenizer(recipe("vqgan"), str(shards), tmp_path / "out", QUIET)
    lines = [line for line in metrics(out) if "loss" in line]
    assert lines
    assert all(1 <= line["codebook/perplexity"] <= 64 and 0 <= line["codebook/dead"] <= 64 for line in lines)


def test_a_codebook_below_what_the_recipe_asks_stops_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"perplexity of .*min_perplexity is 65") as raised:
        pretrain_tokenizer(recipe("vqgan", **{"autoencoders.vq.quantizer.min_perplexity": 65}), str(shards), tmp_path / "out", QUIET)
    assert raised.value.exit_code == 4
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"
