"""A dry run tells what the run will do: compared with the stream, the packer and the model that really do it."""

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from worlds import World, make_world, mixed_recipe, planner_of, sample_of

from stages.anatomy import weights_of
from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.errors import RecipeError, UsageError
from stages.footprint import autoencoder_bytes, encoder_bytes, footprint, kept_by_autograd, transformer_bytes
from stages.model import build_model, count_parameters
from stages.parts.backbones import TransformerConfig
from stages.plan_run import plan_run, plan_text
from stages.recipe import Recipe, load_recipe
from stages.sequence.pack import pack
from stages.sequence.segment import MaskKind, Segment, Sequence
from stages.training.checkpoint import save_checkpoint
from stages.training.stream import Stream


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Seven samples of codes and latents on a grid of 2 x 3, in two tars."""
    return make_world(tmp_path, mixed_recipe(), [sample_of(number) for number in range(7)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_plan_is_what_the_stream_gives(world: World) -> None:
    """Lengths, the share of a step and the epochs, against every sample planned by the trainer's own stream."""
    recipe = world.recipe(mixed_recipe())
    plan = plan_run(mixed_recipe(), "train-unified", str(world.shards))
    (phase,) = plan["phases"]
    planner = planner_of(recipe)
    never = Always(1.0)
    for task, told in phase["tokens_per_sample"].items():
        lengths = [len(planner.plan(sample, task, never)) for sample in world.samples]
        assert told["samples"] == 7
        assert told["max"] == max(lengths)
        assert told["mean"] == pytest.approx(np.mean(lengths), rel=0.25)  # one in ten conditions is dropped
    assert phase["samples_per_step"] == 3 and phase["samples_seen"] == 30
    assert phase["epochs"] == pytest.approx(30 / 7)
    stream = Stream(open_shards(str(world.shards)), planner, recipe.phases[0], seed=0)
    per_step = np.mean([stream.next_batch().num_tokens for _ in range(60)])
    assert phase["tokens_per_step"] == pytest.approx(per_step, rel=0.1)


class Always(random.Random):
    """Chance that always gives one number, and leaves lists as they are."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value

    def shuffle(self, x: object) -> None:
        pass


def test_the_first_sequence_is_a_table_of_its_segments(world: World) -> None:
    plan = plan_run(mixed_recipe(), "train-unified", str(world.shards))
    first = plan["first_sequences"]["paint"]
    assert first["key"] == "0000"
    rows = {(row["port"], row["content"]): row for row in first["segments"]}
    latents = rows["latents", "image"]
    expected = {
        "tokens": 6,
        "grid": [2, 3],
        "mask": "full",
        "expert": "pictures",
        "objective": "denoise",
        "supervised": 6,
        "role": "target",
    }
    assert {key: latents[key] for key in expected} == expected
    assert int(latents["positions"]) == int(rows["text", "<soi>"]["positions"]) + 1, "shared: all at the tick after the marker"
    assert first["tokens"] == sum(row["tokens"] for row in first["segments"])
    assert rows["text", "<bos>"]["supervised"] == 0 < rows["text", "{caption}"]["supervised"]


def test_masked_codes_are_counted_as_far_as_they_were_hidden(world: World) -> None:
    rows = plan_run(mixed_recipe(), "train-unified", str(world.shards))["first_sequences"]["draw"]["segments"]
    (codes,) = [row for row in rows if row["port"] == "codes"]
    assert codes["objective"] == "masked-token" and 1 <= codes["supervised"] <= 6


def test_the_vocabulary_is_that_of_the_tokenizer_which_came_with_the_shards(world: World) -> None:
    """A text tokenizer may have found fewer merges than the recipe allows; the network will have as many rows as there are ids."""
    plan = plan_run(mixed_recipe("tokenizers.bpe.vocab_size=5000"), "train-unified", str(world.shards))
    model = build_model(world.recipe(mixed_recipe()), 0)
    assert plan["parameters"]["model"] == count_parameters(model)
    assert "vocab_size = 5000" not in plan["resolved_recipe"]


def test_a_plan_says_how_many_weights_one_token_meets(world: World) -> None:
    """Of two hard-routed experts one, of four learned ones two: exact numbers, as the papers count "active" parameters."""
    dense = plan_run(mixed_recipe('backbones.lm.experts=["all"]', 'ports.text.expert="all"', 'ports.codes.expert="all"', 'ports.latents.expert="all"'), "train-unified")  # fmt: skip
    assert dense["parameters"]["active"] == dense["parameters"]["model"] and "for one token" not in plan_text(dense)
    hard = plan_run(mixed_recipe(), "train-unified")
    assert hard["parameters"]["active"] == dense["parameters"]["model"] < hard["parameters"]["model"]
    learned = plan_run(mixed_recipe('backbones.lm.mlp={kind="moe", experts=4, top_k=2, shared=1}'), "train-unified")
    mlp, router = 3 * 48 * 72, 4 * 48
    assert learned["parameters"]["active"] == dense["parameters"]["model"] + 3 * (2 * mlp + router)
    told = plan_text(learned)
    assert f"{learned['parameters']['active']:,} of them for one token" in told
    assert "2 of 4 MLPs a token, 1 shared" in told


def test_memory_counts_every_weight_once(world: World) -> None:
    """Weights of the model, gradients and two moments of what learns; the autoencoders that wrote the shards are not there."""
    frozen = mixed_recipe('phases.joint.frozen=["backbones.lm.experts.words"]', "phases.joint.ema_decay=0.9")
    (phase,) = plan_run(frozen, "train-unified", str(world.shards))["phases"]
    model = build_model(world.recipe(frozen), 0)
    total = count_parameters(model)
    trained = total - count_parameters(model.backbones["lm"].experts["words"])  # type: ignore[index,union-attr,arg-type]
    memory = phase["memory"]
    assert memory["weights"] == 4 * total
    assert (memory["gradients"], memory["adam_moments"], memory["moving_average"]) == (4 * trained, 8 * trained, 4 * trained)
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")


def test_dry_runs_write_nothing(world: World, tmp_path: Path) -> None:
    before = files(tmp_path)
    plan_text(plan_run(mixed_recipe(), "train-unified", str(world.shards)))
    assert files(tmp_path) == before


def test_seven_billion_parameters_are_planned_without_their_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_run(load_recipe("llava", size="paper"), "align", None)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**29
    size = plan["parameters"]
    assert size["model"] > 7e9 and abs(size["deviation"]) < 0.02
    assert size["deviation"] == pytest.approx(size["model"] / size["published"] - 1)
    connector, instruct = plan["phases"]
    assert connector["memory"]["gradients"] < instruct["memory"]["gradients"]


def test_what_is_not_known_is_said(world: World, tmp_path: Path) -> None:
    assert any("no shards" in note for note in plan_run(mixed_recipe(), "train-unified", None)["notes"])
    assert any("stdin" in note for note in plan_run(mixed_recipe(), "train-unified", "-")["notes"])
    with ShardWriter(tmp_path / "raw", provenance={"stage": "import"}) as writer:
        writer.write(Sample("a", {"caption": "no tokenizer came along"}))
    raw = plan_run(mixed_recipe(), "train-unified", str(tmp_path / "raw"))
    assert any("pretrain-tokenizer" in note for note in raw["notes"])
    assert raw["first_sequences"] == {} and raw["phases"][0]["memory"]["activations"] is None
    assert "activations not known" in plan_text(raw)


def test_tasks_without_their_fields_are_noted(tmp_path: Path) -> None:
    samples = [Sample(f"{i}", {"caption": f"a {i}", "image.codes": sample_of(i).fields["image.codes"]}) for i in range(3)]
    world = make_world(tmp_path, mixed_recipe(), samples)
    plan = plan_run(mixed_recipe(), "train-unified", str(world.shards))
    assert set(plan["phases"][0]["tokens_per_sample"]) == {"draw"}
    assert [note for note in plan["notes"] if "'answer'" in note] and [note for note in plan["notes"] if "'paint'" in note]


def test_another_stage_is_refused_as_by_the_run(world: World) -> None:
    with pytest.raises(RecipeError, match="no phase for the stage align"):
        plan_run(mixed_recipe(), "align", str(world.shards))


def test_the_plan_is_json_and_reads_well(world: World) -> None:
    plan = plan_run(mixed_recipe(), "train-unified", str(world.shards))
    assert json.loads(json.dumps(plan)) == plan
    lines = plan_text(plan).splitlines()
    assert lines[0].startswith("train-unified test, size tiny: ")
    assert f"{world.shards}: 7 samples in 2 tars" in lines[1]
    head = next(line for line in lines if line.startswith("part "))
    row = next(line for line in lines if line.startswith("backbones.lm.experts.words"))
    assert row[head.index("in joint") :].startswith("learns")
    assert "phase joint: 10 steps of 3 samples (tasks draw 1, answer 1, paint 1)" in lines
    assert "--out runs/x: new" in plan_text({**plan, "out": "runs/x", "folder": "new"}).splitlines()
    assert lines[-1] == mixed_recipe().to_toml().rstrip().splitlines()[-1]


def test_a_tokenizer_counts_pictures_and_their_grid(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data" / "train", split="train", provenance={"stage": "import"}) as writer:
        for i in range(5):
            writer.write(Sample(f"{i}", {"image": np.full((16, 24, 3), i, np.uint8)}))
    recipe = load_recipe("vqgan", size="tiny")
    (phase,) = plan_run(recipe, "pretrain-tokenizer", str(tmp_path / "data"))["phases"]
    assert (phase["picture"], phase["grid"]) == ([16, 24], [2, 3])
    train = recipe.phases[0]
    assert train.batch_size and phase["epochs"] == pytest.approx(train.steps * train.batch_size / 5)
    assert phase["memory"]["activations"] == train.batch_size * autoencoder_bytes(recipe, "vq", 16, 24)


def test_a_text_tokenizer_names_its_fields(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", provenance={"stage": "import"}) as writer:
        writer.write(Sample("a", {"caption": "a red circle", "meta": {"number": 1}}))
    plan = plan_run(load_recipe("text-bpe", size="tiny"), "pretrain-tokenizer", str(tmp_path / "data"))
    assert plan["notes"] == ["the text tokenizer learns from the fields caption"] and plan["phases"] == []


# --- the estimate, against what autograd keeps --------------------------------------------------------------------------------------

VARIANTS = [
    {"mlp": {"kind": "swiglu"}},
    {"mlp": {"kind": "gelu"}, "norm": {"kind": "layer"}, "bias": "all"},
    {"kv_heads": 2, "mlp_ratio": 2.5},
    {"qk_norm": True, "head_dim": 24},
    {"experts": ("words", "pictures")},
    {"mlp": {"kind": "moe", "experts": 4, "top_k": 2, "shared": 1}, "mlp_ratio": 1.5},
    {"mlp": {"kind": "moe", "experts": 6, "top_k": 3}, "mlp_ratio": 1.0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("mask", [MaskKind.CAUSAL, MaskKind.FULL])
def test_the_estimate_of_a_transformer_is_near_what_autograd_keeps(variant: dict[str, object], mask: MaskKind) -> None:
    config = TransformerConfig.model_validate({"width": 96, "depth": 5, "heads": 4, **variant})
    network = config.build()
    network.init_weights(torch.Generator().manual_seed(0))
    halves = [Segment(port="x", payload=torch.zeros(12), grid=(12,), mask=mask, expert=expert % len(config.experts)) for expert in range(2)]
    batch = pack([Sequence(key=str(i), task="t", segments=tuple(halves)) for i in range(3)], row_length=24)
    x = torch.randn(3, 24, 96, requires_grad=True)
    kept = kept_by_autograd(network, lambda: network(x, batch.layout))
    assert 3 * 24 * transformer_bytes(config, 24) == pytest.approx(kept, rel=0.2)


def test_what_autograd_keeps_is_counted_once() -> None:
    """The input of each linear layer and the output of the sigmoid; the ReLU's output is the second layer's input."""
    layers = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Sigmoid())
    x = torch.zeros(11, 5, requires_grad=True)
    assert kept_by_autograd(layers, lambda: layers(x)) == 4 * 11 * (5 + 7 + 3)


def test_an_autoencoder_is_measured_as_it_is() -> None:
    recipe = load_recipe("kl-autoencoder", size="tiny")
    autoencoder: Any = recipe.autoencoders["vae"].build()
    picture, latents = torch.zeros(1, 3, 16, 24), torch.zeros(1, autoencoder.latent_channels, 2, 3)
    kept = kept_by_autograd(autoencoder, lambda: (autoencoder.encoder(picture), autoencoder.decode(latents)))
    assert autoencoder_bytes(recipe, "vae", 16, 24) == kept


ENCODERS: list[tuple[str, Callable[[nn.Module], object]]] = [
    ("image", lambda encoder: encoder(torch.zeros(1, 3, 32, 32))),
    ("text", lambda encoder: encoder(torch.zeros(1, 77, dtype=torch.int64), torch.ones(1, dtype=torch.int64))),
]


@pytest.mark.parametrize(("name", "run"), ENCODERS, ids=["image", "text"])
def test_encoders_are_measured_as_they_are(name: str, run: Callable[[nn.Module], object]) -> None:
    recipe = load_recipe("clip", size="tiny")
    encoder = build_model(recipe, 0).encoders[name]
    assert encoder_bytes(recipe, name) == pytest.approx(kept_by_autograd(encoder, lambda: run(encoder)), rel=0.01)


def test_a_frozen_encoder_keeps_nothing() -> None:
    text = recipe_from_clip(frozen=["encoders.image"])

    def activations(frozen: list[str]) -> int:
        recipe = recipe_from_clip(frozen)
        return footprint(recipe, recipe.phases[0], weights_of(recipe), samples=3, tokens=0, row_length=0, supervised={})["activations"]

    assert text.phases[0].frozen == ("encoders.image",)
    assert activations([]) - activations(["encoders.image"]) == 3 * encoder_bytes(text, "image")


def recipe_from_clip(frozen: list[str]) -> Recipe:
    return load_recipe("clip", size="tiny", sets=[f"phases.contrast.frozen={json.dumps(frozen)}"])


def test_starts_are_looked_at(world: World, tmp_path: Path) -> None:
    """A checkpoint that fits, one of another network, one that is not there, and one that would have to be fetched."""
    recipe = world.recipe(mixed_recipe())
    other = world.recipe(mixed_recipe("backbones.lm.width=36", "backbones.lm.head_dim=8"))
    for name, held in (("fits", recipe), ("narrow", other)):
        save_checkpoint(tmp_path / name, held, build_model(held, 0).state_dict(), tokenizers=world.tokenizers)
    before = files(tmp_path)

    def notes(source: str) -> list[str]:
        found: list[str] = plan_run(mixed_recipe(), "train-unified", str(world.shards), init={"backbones.lm": source})["notes"]
        return [note for note in found if "backbones.lm" in note]

    assert notes(str(tmp_path / "fits"))[0].startswith("would start backbones.lm")
    assert notes("hf://org/name") == ["--init backbones.lm=hf://org/name is not looked at in a dry run"]
    for source, told in (("narrow", "backbones.lm"), ("absent", "no such file or folder")):
        with pytest.raises(UsageError, match=told):
            notes(str(tmp_path / source))
    assert files(tmp_path) == before
