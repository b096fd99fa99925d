"""Checkpoints: equal weights are equal bytes, loading is strict, a part can start from another model's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from worlds import MIXED, World, mixed_recipe, recipe_from

from stages.errors import DataError, UsageError
from stages.model import Model, build_model
from stages.parts.autoencoders import AutoencoderConfig, CNNConfig, KLCNNConfig
from stages.parts.quantizers import VQConfig
from stages.recipe import Recipe
from stages.training.checkpoint import (
    count_addresses,
    describe_autoencoder,
    describe_checkpoint,
    fingerprint,
    init_part,
    load_any_tokenizer,
    load_model,
    load_strict,
    open_checkpoint,
    read_weights,
    save_checkpoint,
    save_weights,
)

RECIPE = mixed_recipe()
DENSE = MIXED.replace('experts = ["words", "pictures"]\n', "").replace('expert = "words"\n', "").replace('expert = "pictures"\n', "")


def saved(folder: Path, recipe: Recipe = RECIPE, seed: int = 0) -> Path:
    save_checkpoint(folder, recipe, build_model(recipe, seed).state_dict())
    return folder


# bytes


def test_equal_weights_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4), "c.d": torch.zeros(())}
    save_weights(tmp_path / "one", tensors)
    save_weights(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_weights(tmp_path / "one")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    header = (tmp_path / "one").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


def test_views_and_transposes_are_saved_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_weights(tmp_path / "w", {"t": base.T, "row": base[1]})
    assert torch.equal(read_weights(tmp_path / "w")["t"], base.T)
    assert torch.equal(read_weights(tmp_path / "w")["row"], base[1])


def test_a_damaged_file_is_bad_data_and_says_which(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"a": torch.ones(100)})
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data[:-50])
    with pytest.raises(DataError, match=rf"{tmp_path / 'w'}: cannot be read as safetensors"):
        read_weights(tmp_path / "w")


def test_a_checkpoint_saved_twice_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "recipe.toml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


# loading


def test_loading_lists_every_missing_unexpected_and_reshaped_weight() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(DataError, match=r"here: 1 weights missing, 1 unexpected, 1 reshaped; missing: bias"):
        load_strict(module, {"weight": torch.zeros(2, 3), "other": torch.zeros(1)}, "here")
    with pytest.raises(DataError, match=r"unexpected: other"):
        load_strict(module, {**module.state_dict(), "other": torch.zeros(1)}, "here")
    with pytest.raises(DataError, match=r"reshaped: weight \(2, 3\), expected \(3, 2\)"):
        load_strict(module, {**module.state_dict(), "weight": torch.zeros(2, 3)}, "here")


def test_a_model_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    checkpoint, model = load_model(saved(tmp_path / "run", seed=3))
    expected = build_model(RECIPE, 3).state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert not model.training
    assert checkpoint.recipe == RECIPE
    assert checkpoint.config["parameters"] == sum(value.numel() for value in expected.values())


def test_the_untrained_control_keeps_its_fresh_weights(tmp_path: Path) -> None:
    _, model = load_model(saved(tmp_path / "run", seed=3), untrained=True, seed=5)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in build_model(RECIPE, 5).state_dict().items())


def test_a_folder_that_is_no_checkpoint_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"not a checkpoint, there is no config\.json"):
        open_checkpoint(tmp_path)
    status = tmp_path / "status.json"
    status.write_text('{"state": "done", "stage": "eval"}')
    with pytest.raises(UsageError, match="not a checkpoint"):
        open_checkpoint(tmp_path)
    status.write_text('{"state": "stopped", "stage": "align"}')
    with pytest.raises(UsageError, match="a training run that has not finished"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_in_a_folder_named_like_a_recipe_is_that_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "llava")
    monkeypatch.chdir(tmp_path)
    assert load_model(Path("llava"))[0].recipe.name == RECIPE.name
    assert fingerprint(Path("llava")) == fingerprint(tmp_path / "llava")


def test_the_model_card_says_how_to_use_it(tmp_path: Path) -> None:
    card = (saved(tmp_path / "run") / "README.md").read_text()
    assert "mmgen sample" in card
    assert "arxiv.org/abs/0000.00000" in card


# fingerprints


def test_a_fingerprint_depends_on_weights_and_parts_and_not_on_the_folder(tmp_path: Path) -> None:
    first = fingerprint(saved(tmp_path / "a"))
    assert fingerprint(saved(tmp_path / "b")) == first
    shutil.move(tmp_path / "b", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("another card")
    assert fingerprint(tmp_path / "moved") == first
    assert fingerprint(saved(tmp_path / "c", seed=1)) != first
    assert fingerprint(saved(tmp_path / "d", mixed_recipe("ports.latents.loss_weight=2.0"))) != first
    assert fingerprint(saved(tmp_path / "e", mixed_recipe("phases.joint.lr=5e-3"))) == first  # how it was trained is not what it computes


def test_one_changed_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    state = build_model(RECIPE, 0).state_dict()
    save_checkpoint(tmp_path / "a", RECIPE, state)
    state["ports.text.head.weight"] = state["ports.text.head.weight"].clone()
    state["ports.text.head.weight"][0, 0] = torch.nextafter(state["ports.text.head.weight"][0, 0], torch.tensor(9.0))
    save_checkpoint(tmp_path / "b", RECIPE, state)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_tokenizers_travel_inside_the_checkpoint(world: World, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", RECIPE, build_model(RECIPE, 0).state_dict(), tokenizers=world.tokenizers)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert set(checkpoint.tokenizers) == set(world.tokenizers)
    for address, folder in checkpoint.tokenizers.items():
        assert folder.parent == tmp_path / "run" / "tokenizers"
        assert fingerprint(folder) == fingerprint(world.tokenizers[address])
        load_any_tokenizer(folder)


# starting from another checkpoint


def state_of(model: Model, address: str) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(address + ".")}


def test_a_part_starts_from_the_same_part_of_a_checkpoint_and_the_rest_stays(tmp_path: Path) -> None:
    source, model = saved(tmp_path / "run", seed=1), build_model(RECIPE, 0)
    before = model.state_dict()["ports.text.head.weight"].clone()
    assert init_part(model, "ports.latents", source) == ["ports.latents"]
    expected = build_model(RECIPE, 1)
    assert all(torch.equal(value, state_of(expected, "ports.latents")[name]) for name, value in state_of(model, "ports.latents").items())
    assert torch.equal(model.state_dict()["ports.text.head.weight"], before)


def test_with_a_network_come_the_ports_that_fit_it(tmp_path: Path) -> None:
    source, model = saved(tmp_path / "run", seed=1), build_model(RECIPE, 0)
    assert init_part(model, "backbones.lm", source) == ["backbones.lm", "ports.latents", "ports.text"]
    expected = build_model(RECIPE, 1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_dense_network_fills_the_first_of_several_experts(tmp_path: Path) -> None:
    dense = recipe_from(DENSE, sets=[f"tokenizers.bpe.vocab_size={RECIPE.tokenizers['bpe'].vocab_size}"])
    source, model = saved(tmp_path / "run", dense, seed=1), build_model(RECIPE, 0)
    second = state_of(model, "backbones.lm.experts.pictures")
    init_part(model, "backbones.lm", source)
    expected = build_model(dense, 1).state_dict()
    for name, value in state_of(model, "backbones.lm.experts.words").items():
        assert torch.equal(value, expected[name.replace(".words.", ".main.")]), name
    assert all(torch.equal(value, second[name]) for name, value in state_of(model, "backbones.lm.experts.pictures").items())


def test_an_expert_can_be_named_as_source_and_as_target(tmp_path: Path) -> None:
    source, model = saved(tmp_path / "run", seed=1), build_model(RECIPE, 0)
    init_part(model, "backbones.lm.experts.pictures", Path(f"{source}#backbones.lm.experts.words"))
    expected = build_model(RECIPE, 1).state_dict()
    for name, value in state_of(model, "backbones.lm.experts.pictures").items():
        assert torch.equal(value, expected[name.replace(".pictures.", ".words.")]), name


def test_what_does_not_fit_is_an_error_that_says_why(tmp_path: Path) -> None:
    model = build_model(RECIPE, 0)
    source = saved(tmp_path / "wide", mixed_recipe("backbones.lm.width=72", "backbones.lm.head_dim=8"))
    with pytest.raises(
        UsageError,
        match=r"--init backbones\.lm=.*backbones\.lm does not fit: \d+ weights differ in name or shape, first backbones\.lm\.\S+: \[72.*\] there, \[\d+.*\] here",
    ):
        init_part(model, "backbones.lm", source)
    with pytest.raises(UsageError, match=r"--init encoders\.eye: the recipe has no such part") as caught:
        init_part(model, "encoders.eye", source)
    assert "backbones.lm" in caught.value.hint
    with pytest.raises(UsageError, match=r"the checkpoint has no ports; it holds: autoencoders\.vq"):
        init_part(model, "ports.latents", tokenizer_only(tmp_path / "vq"))


def tokenizer_only(folder: Path) -> Path:
    recipe = recipe_from('size = "tiny"\n[paper]\narxiv = "0"\n').with_parts({"autoencoders.vq": RECIPE.source["autoencoders"]["vq"]})
    tensors = {f"autoencoders.vq.{name}": value for name, value in recipe.autoencoders["vq"].build().state_dict().items()}
    save_checkpoint(folder, recipe, tensors)
    return folder


def test_a_failed_start_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build_model(RECIPE, 0)
    with pytest.raises(UsageError):
        init_part(model, "backbones.lm", saved(tmp_path / "wide", mixed_recipe("backbones.lm.width=72", "backbones.lm.head_dim=8")))
    assert all(torch.equal(value, build_model(RECIPE, 0).state_dict()[name]) for name, value in model.state_dict().items())


# what is inside


def test_a_description_counts_every_parameter_once(tmp_path: Path) -> None:
    told = describe_checkpoint(saved(tmp_path / "run"))
    model = build_model(RECIPE, 0)
    assert told["parameters"] == sum(told["parts"].values()) == sum(value.numel() for value in model.state_dict().values())
    assert told["parts"] == {address: count for address, count in count_addresses(model).items()}
    assert told["recipe"] == "test"
    assert describe_checkpoint(tokenizer_only(tmp_path / "vq"))["tokenizer"] == {"downsample": 4, "latent_channels": 4, "codebook_size": 11}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            CNNConfig(channels=8, multipliers=(1, 1), downsample=2, latent_channels=4, quantizer=VQConfig(codebook_size=64)),
            {"grid": [8, 12], "code_shape": [8, 12], "codes": 96, "bits_per_pixel": 1.5},  # 96 codes of 6 bits for 16 x 24 pixels
        ),
        (KLCNNConfig(channels=8, multipliers=(1, 1), downsample=2, latent_channels=4), {"grid": [8, 12], "floats_per_pixel": 1.0}),
    ],
)
def test_an_image_tokenizer_tells_what_a_picture_costs(config: AutoencoderConfig, told: dict[str, Any]) -> None:
    found = describe_autoencoder(config, [16, 24])
    sizes = {"downsample": 2, "latent_channels": 4, "codebook_size": config.codebook_size}
    assert found == {**sizes, "picture_size": [16, 24], **told}
    assert describe_autoencoder(config, None) == sizes
