"""What a training step computes, against the mask entry by entry and against torch's own counter over the step that really runs."""

import json
from collections.abc import Sequence as Listing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from worlds import make_world, mixed_recipe, planner_of, recipe_from, sample_of, segment_lists

from stages.flops import FlopCounter, allowed_pairs
from stages.model import Model, build_model, meta_model, set_trainable
from stages.options import RunOptions
from stages.plan_run import plan_run, plan_text
from stages.recipe import Phase, Recipe, load_recipe
from stages.sequence.masks import may_attend
from stages.sequence.pack import pack
from stages.sequence.segment import Batch, Segment, Sequence
from stages.train_unified import train_unified


@given(st.lists(segment_lists(), min_size=1, max_size=4))
def test_pairs_are_those_of_the_mask(samples: list[list[Segment]]) -> None:
    layout = pack([Sequence(key=str(n), task="", segments=tuple(own)) for n, own in enumerate(samples)]).layout
    rows = layout.sample_id >= 0
    assert allowed_pairs(layout) == int(may_attend(layout, layout)[rows].sum())


def counted_by_torch(model: Model, batch: Batch, *, backward: bool) -> int:
    """Operations of a step as torch counts them; attention as the plain products it is."""
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        losses = model.losses(batch, Generator().manual_seed(0))
        if backward:
            torch.stack([loss.total for loss in losses.values()]).sum().backward()
    return counted.get_total_flops()


def counted_here(model: Model, phase: Phase, batch: Batch) -> dict[str, float]:
    """The same step with every pair of its one row counted, which is what torch computes, and with what was really hidden."""
    batch = model.corrupt(batch, Generator().manual_seed(0))
    counts = FlopCounter(model, phase).of(batch)
    every = batch.layout.sample_id.numel() ** 2
    return counts | {"backbones.lm.attention": counts["backbones.lm.attention"] * every / allowed_pairs(batch.layout)}


DENSE: list[str] = []
LEARNED = ['backbones.lm.mlp={kind="moe",experts=5,top_k=2,shared=1}']
SHARED = ['backbones.lm.duplicate=["mlp"]']
WHOLE = ["ports.text.objective.softmax=vocabulary"]
TIED = ["ports.text.head.tied=true"]


@pytest.mark.parametrize("task", ["draw", "answer", "paint"])
@pytest.mark.parametrize("sets", [DENSE, LEARNED, SHARED, WHOLE, TIED], ids=["dense", "learned", "shared", "whole", "tied"])
def test_a_forward_pass_is_what_torch_counts(sets: Listing[str], task: str) -> None:
    recipe = mixed_recipe(*sets)
    model = build_model(recipe, 0)
    batch = pack([planner_of(recipe).plan(sample_of(3, comment="so be it"), task, None)])
    assert sum(counted_here(model, recipe.phases[0], batch).values()) / 3 == pytest.approx(counted_by_torch(model, batch, backward=False))


@pytest.mark.parametrize("frozen", [(), ("backbones.lm",), ("ports.text.head",)])
def test_a_training_step_is_what_torch_counts(frozen: tuple[str, ...]) -> None:
    """What is frozen passes gradients on and has none of its own."""
    recipe = mixed_recipe()
    phase = recipe.phases[0].model_copy(update={"frozen": frozen})
    model = build_model(recipe, 0)
    set_trainable(model, phase.trainable, phase.frozen)
    batch = pack([planner_of(recipe).plan(sample_of(3), "answer", None)])
    assert sum(counted_here(model, phase, batch).values()) == pytest.approx(counted_by_torch(model, batch, backward=True))


def test_an_encoder_is_counted_for_every_picture_it_sees() -> None:
    recipe = load_recipe("janus", size="tiny")
    model = build_model(recipe, 0)
    counter, frozen = (
        FlopCounter(model, phase.model_copy(update={"frozen": own})) for phase in recipe.phases[1:2] for own in ((), ("encoders",))
    )
    pictures = torch.zeros(3, 3, 32, 32)
    see = Segment(port="see", payload=pictures[0], grid=(16,))
    batch = pack([Sequence(key=str(n), task="", segments=(see,)) for n in range(3)])
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model.encoders["siglip"](pictures)
    assert counter.of(batch)["encoders.siglip"] == 3 * counted.get_total_flops()
    assert frozen.of(batch)["encoders.siglip"] == counted.get_total_flops()


def test_the_plan_says_what_the_run_spends(tmp_path: Path) -> None:
    """Counted on the meta device before, and step by step in the log, the checkpoint and across an interruption."""
    recipe: Recipe = mixed_recipe("phases.joint.steps=40")
    world = make_world(tmp_path, recipe, [sample_of(number) for number in range(7)])
    plan = plan_run(recipe, "train-unified", str(world.shards))
    train_unified(recipe, str(world.shards), tmp_path / "run", RunOptions(quiet=True, max_steps=15))
    train_unified(recipe, str(world.shards), tmp_path / "run", RunOptions(quiet=True))
    train_unified(recipe, str(world.shards), tmp_path / "at-once", RunOptions(quiet=True))
    spent, at_once = (json.loads((tmp_path / run / "config.json").read_text())["flops"] for run in ("run", "at-once"))
    assert spent == at_once
    assert spent == pytest.approx(plan["phases"][0]["flops"], rel=0.1)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["flops"] == spent
    assert " a step, " in plan_text(plan) and "MFLOP" in plan_text(plan)


def test_hard_routed_tokens_cost_what_their_expert_does() -> None:
    """A frozen expert is cheaper by its gradients, for its own tokens only."""
    recipe = recipe_from(mixed_recipe().to_toml())
    model = meta_model(recipe)
    batch = pack([planner_of(recipe).plan(sample_of(3), "answer", None)])
    every, half = (
        FlopCounter(model, recipe.phases[0].model_copy(update={"frozen": own})).of(batch)["backbones.lm"]
        for own in ((), ("backbones.lm.experts.words",))
    )
    words = int((batch.layout.expert_id == 0).sum())
    assert half / every == pytest.approx(1 - words / batch.num_tokens / 3)
