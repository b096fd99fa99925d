"""From recipe to losses: shared vocabularies, what is frozen, what each port is judged by."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from worlds import MIXED, lively, mixed_recipe, planner_of, recipe_from, sample_of, text_tokenizer

from stages.errors import GuardError, RecipeError
from stages.model import Model, PortLoss, build_model, count_parameters, covers, meta_model, set_trainable
from stages.parts.layers import sincos_2d
from stages.sequence.pack import pack
from stages.sequence.segment import Batch, Role, Segment, Sequence
from stages.train_unified import combine

RECIPE = mixed_recipe()
VOCAB = text_tokenizer().vocab_size


def planned(*tasks: str, numbers: tuple[int, ...] = (1, 2), model: Model | None = None) -> Batch:
    planner = planner_of((model or lively(RECIPE)).recipe)
    return pack([planner.plan(sample_of(number), task, Random(0)) for task in tasks for number in numbers])


def losses(model: Model, batch: Batch, seed: int = 0) -> dict[str, PortLoss]:
    with torch.no_grad():
        return model.losses(batch, Generator().manual_seed(seed))


# vocabularies


def test_ports_that_share_a_vocabulary_stand_side_by_side_in_it() -> None:
    model = Model(RECIPE)
    text, codes = model.slices["text"], model.slices["codes"]
    assert (text.owner, text.start, text.stop) == ("text", 0, VOCAB)
    assert (codes.owner, codes.start, codes.stop) == ("text", VOCAB, VOCAB + 11)
    assert text.total == codes.total == VOCAB + 11
    assert codes.mask == VOCAB + 11  # one more input row, for what is hidden
    state = model.state_dict()
    assert state["ports.text.connector.weight"].shape == (VOCAB + 12, 48)
    assert state["ports.text.head.weight"].shape == (VOCAB + 11, 48)  # and none that predicts it
    assert not any(name.startswith("ports.codes.") for name in state)


def test_ids_of_each_port_reach_their_own_rows_of_the_shared_table() -> None:
    model = lively(RECIPE)
    table = model.state_dict()["ports.text.connector.weight"]
    with torch.no_grad():
        assert torch.equal(model.embed_ids("text", torch.tensor([0, 5])), table[[0, 5]])
        assert torch.equal(model.embed_ids("codes", torch.tensor([0, 10, 11])), table[[VOCAB, VOCAB + 10, VOCAB + 11]])


def test_a_port_predicts_its_own_ids_or_the_whole_vocabulary() -> None:
    model, hidden = lively(RECIPE), torch.randn(3, 48, generator=Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.predict("codes", hidden, whole=True)
        assert whole.shape == (3, VOCAB + 11)
        torch.testing.assert_close(model.predict("codes", hidden), whole[:, VOCAB:])
        torch.testing.assert_close(model.predict("text", hidden), whole[:, :VOCAB])


def test_two_ports_over_one_codebook_mean_the_same_ids() -> None:
    second = '[ports.read]\ncontent = "codes"\nautoencoder = "vq"\nvocabulary = "all"\nexpert = "words"\n[tasks.draw]'
    model = Model(recipe_from(MIXED.replace("[tasks.draw]", second, 1)))
    assert model.slices["read"].start == model.slices["codes"].start
    assert model.slices["read"].total == model.slices["codes"].total


def test_a_softmax_over_the_vocabulary_judges_codes_against_words_too() -> None:
    """Chameleon's one softmax costs more than a softmax over the codes alone, and both agree on which code is likeliest."""
    models = {
        kind: lively(mixed_recipe(f'ports.codes.objective={{kind="masked-token", softmax="{kind}"}}')) for kind in ("port", "vocabulary")
    }
    models["vocabulary"].load_state_dict(models["port"].state_dict())
    batch = planned("draw")
    own, whole = (losses(models[kind], batch)["codes"] for kind in ("port", "vocabulary"))
    assert own.count == whole.count
    assert float(whole.mean) > float(own.mean) + 1


# embedding


def test_every_token_is_embedded_at_its_place_and_padding_is_zero() -> None:
    model = lively(RECIPE)
    batch = pack([planner_of(RECIPE).plan(sample_of(1), "draw", Random(0))], row_length=40)
    with torch.no_grad():
        x = model.embed(batch)
        codes = batch.ports["codes"]
        torch.testing.assert_close(x.reshape(40, -1)[codes.rows], model.embed_rows("codes", codes))
        added = model.embed_rows("codes", codes) - model.embed_ids("codes", codes.values)
        torch.testing.assert_close(added, 0.1 * sincos_2d(codes.grids[0], x.shape[2]), atol=1e-6, rtol=1e-4)
    assert not x[batch.layout.sample_id < 0].any()
    assert x[batch.layout.sample_id >= 0].any(dim=1).all()


def test_the_noise_level_enters_the_tokens_it_belongs_to() -> None:
    model = lively(RECIPE)
    batch = planned("paint")
    noisy = model.corrupt(batch, Generator().manual_seed(0))
    with torch.no_grad():
        rows = noisy.ports["latents"]
        assert rows.timestep is not None
        port: Any = model.ports["latents"]
        plain = port.connector(rows.values, rows.grids)
        expected = plain + model.embed_places("latents", rows.grids) + port.timestep(rows.timestep)
        torch.testing.assert_close(model.embed_rows("latents", rows), expected, atol=1e-5, rtol=1e-4)


# losses


def test_every_port_with_targets_is_judged_once_a_token() -> None:
    model = lively(RECIPE)
    batch = planned("draw", "paint", "answer")
    found = losses(model, batch)
    assert set(found) == {"text", "codes", "latents"}
    text = batch.ports["text"]
    assert found["text"].count == int((text.target & (text.previous >= 0)).sum())
    assert found["latents"].count == int(batch.ports["latents"].target.sum()) == 12
    assert 2 <= found["codes"].count <= 12  # the hidden ones, of two pictures


def test_a_loss_is_the_cross_entropy_of_the_row_before() -> None:
    model = lively(RECIPE)
    batch = planned("answer", numbers=(2,))
    found = losses(model, batch)["text"]
    rows = batch.ports["text"]
    with torch.no_grad():
        logits = model.predict("text", model.hidden(batch)[0])
    nats = [float(-logits[int(rows.rows[i]) - 1].log_softmax(0)[rows.values[i]]) for i in rows.target.nonzero().flatten().tolist()]
    assert float(found.total) == pytest.approx(sum(nats), rel=1e-5)


def test_segment_weights_multiply_their_tokens_losses() -> None:
    model = lively(RECIPE)
    text = [Segment(port="text", payload=torch.arange(5, 10), grid=(5,), role="target", weight=weight) for weight in (1.0, 2.5)]  # type: ignore[arg-type]
    one, heavy = (losses(model, pack([Sequence(key="a", task="t", segments=(segment,))]))["text"] for segment in text)
    assert float(heavy.total) == pytest.approx(2.5 * float(one.total), rel=1e-6)
    assert heavy.count == one.count


def test_a_batch_without_one_modality_still_has_a_finite_loss_and_gradient() -> None:
    """Text only: the pictures' weights get no gradient, and nothing is not-a-number."""
    model = lively(RECIPE)
    batch = pack([Sequence(key="a", task="t", segments=(Segment(port="text", payload=torch.arange(9), grid=(9,), role="target"),))])  # type: ignore[arg-type]
    found = model.losses(batch, Generator().manual_seed(0))
    assert set(found) == {"text"}
    found["text"].mean.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not any(name.startswith("ports.latents") and gradient.any() for name, gradient in gradients.items())


def test_a_picture_that_is_given_costs_nothing_and_counts_nothing() -> None:
    found = losses(lively(RECIPE), planned("answer"))
    assert found["codes"].count == 0
    assert float(found["codes"].total) == 0.0


def test_the_same_generator_gives_the_same_losses() -> None:
    model, batch = lively(RECIPE), planned("draw", "paint")
    first, again, other = (losses(model, batch, seed) for seed in (1, 1, 2))
    assert [float(loss.total) for loss in first.values()] == [float(loss.total) for loss in again.values()]
    assert float(first["latents"].total) != float(other["latents"].total)


def test_ports_are_averaged_over_their_own_tokens_or_over_all() -> None:
    recipe = mixed_recipe("ports.latents.loss_weight=5.0")
    found = {"text": PortLoss(torch.tensor(12.0), 4), "latents": PortLoss(torch.tensor(2.0), 8)}
    assert float(combine(recipe, found, "own-tokens")) == pytest.approx(12 / 4 + 5 * 2 / 8)
    assert float(combine(recipe, found, "all-tokens")) == pytest.approx((12 + 5 * 2) / 12)


# building


def test_weights_are_a_function_of_recipe_and_seed() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(99)  # what else uses torch's generator does not matter
        return build_model(RECIPE, seed).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["ports.text.connector.weight"], other["ports.text.connector.weight"])
    assert all(torch.isfinite(value).all() for value in first.values())  # nothing was left as allocated


def test_building_leaves_torchs_own_generator_where_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(RECIPE, 0)
    assert torch.equal(torch.rand(3), expected)


def test_the_meta_model_has_the_same_parameters_and_no_memory() -> None:
    real, meta = build_model(RECIPE, 0), meta_model(RECIPE)
    assert {name: value.shape for name, value in real.named_parameters()} == {name: value.shape for name, value in meta.named_parameters()}
    assert all(value.is_meta for value in meta.parameters())
    assert count_parameters(meta) == count_parameters(real)


def test_experts_may_start_as_copies_of_the_first() -> None:
    state = build_model(mixed_recipe('backbones.lm.expert_init="copy"'), 0).state_dict()
    pairs = [(name, name.replace(".words.", ".pictures.")) for name in state if ".words." in name]
    assert len(pairs) > 10
    assert all(torch.equal(state[mine], state[theirs]) for mine, theirs in pairs)


def test_parts_that_do_not_fit_are_errors_that_name_the_port() -> None:
    with pytest.raises(RecipeError, match=r"ports\.codes: content is codes, but autoencoders\.vae has no quantizer"):
        Model(mixed_recipe('ports.codes.autoencoder="vae"'))
    with pytest.raises(RecipeError, match=r"ports\.text\.connector: ids need one"):
        Model(recipe_from(MIXED.replace('connector = { kind = "embedding" }\n', "", 1)))


# what parts of the network ask for

ROUTED = 'backbones.lm.mlp={kind="moe", experts=4, top_k=2, balance_weight=0.25}'


def test_learned_routing_adds_its_balance_to_the_losses() -> None:
    """By name, with its weight, counted in tokens of all layers; padding and the number of targets do not matter."""
    recipe = mixed_recipe(ROUTED)
    model = lively(recipe)
    planner = planner_of(recipe)
    sequences = [planner.plan(sample_of(number), task, Random(0)) for task in ("draw", "answer") for number in (1, 2)]
    batch = pack(sequences, row_length=max(map(len, sequences)) + 5)
    assert batch.padding > 0
    found = losses(model, batch)
    assert found["lm.balance"].count == pytest.approx(3 * batch.num_tokens)
    assert 1.5 < float(found["lm.balance"].mean) < 4
    others = {name: loss for name, loss in found.items() if name != "lm.balance"}
    for reduce in ("own-tokens", "all-tokens"):
        expected = combine(recipe, others, reduce) + 0.25 * found["lm.balance"].mean
        torch.testing.assert_close(combine(recipe, found, reduce), expected)
    assert "lm.balance" not in losses(lively(RECIPE), batch)


def test_a_batch_to_look_on_at_balances_nothing() -> None:
    model = lively(mixed_recipe(ROUTED)).train()
    (sequence,) = (planner_of(model.recipe).plan(sample_of(1), "draw", Random(0)),)
    watched = replace(sequence, segments=tuple(replace(segment, role=Role.CONTEXT) for segment in sequence.segments))
    found = model.losses(pack([watched]), Generator().manual_seed(0))["lm.balance"]
    assert found.count == 0 and float(found.total.detach()) == 0
    found.total.backward()  # and yet every router is reached: ranks average the gradients of the same weights
    routers = [parameter.grad for name, parameter in model.named_parameters() if ".router." in name]
    assert len(routers) == 6 and all(gradient is not None and not gradient.any() for gradient in routers)


def test_balance_is_learned() -> None:
    """A few steps on the balance loss alone move a lopsided router to even use."""
    model = lively(mixed_recipe(ROUTED)).train()
    batch = planned("draw", "answer", model=model)
    routers = [parameter for name, parameter in model.named_parameters() if ".router." in name]
    optimizer = torch.optim.Adam(routers, lr=0.02)
    history = []
    for _ in range(25):
        loss = model.losses(batch, Generator().manual_seed(0))["lm.balance"].mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 2.05 and history[-1] < 2.02  # two experts a token: 2 is even


# freezing


def test_an_address_covers_what_lies_below_it_and_nothing_else() -> None:
    assert covers("ports.text", "ports.text.head.weight")
    assert covers("ports.text", "ports.text")
    assert covers("*", "anything")
    assert not covers("ports.text", "ports.text2.head")
    assert not covers("ports.text.head", "ports.text")


def test_only_what_the_phase_names_learns() -> None:
    model = build_model(RECIPE, 0)
    learning = [name for name, _ in set_trainable(model, ["backbones.lm", "ports.latents"], ["backbones.lm.experts.words"])]
    assert learning == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.startswith("backbones.lm.experts.pictures.") for name in learning)
    assert any(name.startswith("ports.latents.") for name in learning)
    assert not any(name.startswith(("backbones.lm.experts.words", "ports.text")) for name in learning)


def test_a_frozen_tower_is_in_evaluation_mode() -> None:
    model = build_model(RECIPE, 0).train()
    set_trainable(model, ["ports.latents"], [])
    assert not model.backbones["lm"].experts["words"].training  # type: ignore[union-attr,index]
    assert model.ports["latents"].connector.training  # type: ignore[union-attr]


def test_an_address_without_weights_is_an_error_that_lists_the_parts() -> None:
    with pytest.raises(RecipeError, match=r"'ports\.texts' holds no weights .*backbones\.lm.*ports\.latents, ports\.text"):
        set_trainable(build_model(RECIPE, 0), ["ports.texts"], [])
    with pytest.raises(GuardError, match="nothing to train"):
        set_trainable(build_model(RECIPE, 0), ["*"], ["*"])


# questions that share a picture

APART = """tasks.answer.segments=[
  { port = "text", text = "<mmu>", mask = "full" }, { port = "codes", field = "image", merge = true },
  { each = "qa", segments = [
    { port = "text", text = "<sot>{question}", mask = "isolated-causal" },
    { port = "text", text = "{answer}<eot>", role = "target", mask = "isolated-causal", merge = true },
  ] },
]""".replace("\n", "")


def test_isolated_questions_cost_together_what_each_costs_alone() -> None:
    recipe = mixed_recipe(APART)
    model, planner = lively(recipe), planner_of(recipe)
    sample = sample_of(1)

    def loss(questions: list[dict[str, str]]) -> float:
        sequence = planner.plan(sample_of(1, qa=questions), "answer", None)
        return float(model.losses(pack([sequence]), Generator())["text"].total)

    questions = sample.fields["qa"]
    with torch.no_grad():
        assert loss(questions) == pytest.approx(sum(loss([question]) for question in questions), rel=1e-5)
        assert loss(questions) == pytest.approx(loss(questions[::-1]), rel=1e-5)


def test_a_prompt_with_an_isolated_question_ends_where_training_began_the_answer() -> None:
    recipe = mixed_recipe(APART)
    model, planner = lively(recipe), planner_of(recipe)
    sample = sample_of(1)
    with torch.no_grad():
        trained = pack([planner.plan(sample, "answer", None)])
        rows = trained.ports["text"]
        hidden = model.hidden(trained).reshape(-1, recipe.backbones["lm"].width)
        for record in (0, 1):
            segments, rest = planner.prompt(sample, "answer", record=record)
            asked = pack([Sequence(key="", task="", segments=tuple(segments))])
            first = [i for i in range(len(rows.rows)) if rows.target[i] and not rows.target[i - 1]][record]  # of the answer's tokens
            torch.testing.assert_close(model.hidden(asked)[0, -1], hidden[rows.previous[first]], atol=1e-4, rtol=1e-4)
            assert [spec.field or spec.text for spec in rest] == ["{answer}<eot>"]
