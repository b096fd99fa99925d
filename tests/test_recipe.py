"""Recipes: every shipped one loads at every size; every mistake is one message with file, line, key and the nearest valid choice."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from worlds import MIXED, mixed_recipe, recipe_from

from stages.errors import RecipeError
from stages.model import count_parameters, meta_model
from stages.recipe import RECIPES, SIZES, Recipe, load_recipe, recipe_names

SHIPPED = sorted(recipe_names())
SIZED = (
    MIXED.replace('size = "tiny"\n', "")
    + "[sizes.tiny]\nbackbones.lm = { width = 24, heads = 3, kv_heads = 1 }\n[sizes.small]\nphases.joint = { steps = 77 }\n[sizes.paper]\n"
)


def line_of(text: str, start: str) -> int:
    return 1 + next(number for number, line in enumerate(text.splitlines()) if line.startswith(start))


# what is shipped


def test_recipes_are_found_by_name_and_their_folder_is_their_family() -> None:
    assert {"show-o", "chameleon", "transfusion"} <= set(SHIPPED)
    assert all(load_recipe(name, size="tiny").family == recipe_names()[name].parent.name for name in SHIPPED)


@pytest.mark.rung("described")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_comes_back_from_its_resolved_form(name: str, size: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, size=size)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()
    assert (again.name, again.size) == (name, size)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_says_what_it_is_and_how_to_try_it(name: str) -> None:
    text = recipe_names()[name].read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert header[0].startswith("# ")
    assert any("mmgen " in line and ("smoke" in line or f"--recipe {name}" in line) for line in header)
    recipe = load_recipe(name)
    assert recipe.paper.arxiv
    tasks = {task for phase in recipe.phases for task in phase.tasks}
    assert tasks <= set(recipe.tasks)


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name, size="tiny").backbones])
def test_sizes_grow(name: str) -> None:
    counts = [count_parameters(meta_model(load_recipe(name, size=size))) for size in SIZES]
    assert counts[0] < counts[1] < counts[2]
    assert counts[0] < 3e6


def parameters_of(recipe: Recipe) -> int:
    """Of all networks; of the autoencoder itself, without what only its training needs, where there is nothing else."""
    if recipe.backbones or recipe.encoders:
        return count_parameters(meta_model(recipe))
    with torch.device("meta"):
        return sum(count_parameters(config.build()) for config in recipe.autoencoders.values())


@pytest.mark.rung("sized")
@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name, size="paper").paper.parameters is not None])
def test_the_paper_size_has_the_published_number_of_parameters(name: str) -> None:
    """Within two percent of a printed count, which the recipe cites; a nominal "7B" is not compared."""
    recipe = load_recipe(name, size="paper")
    assert recipe.paper.parameters_source
    assert parameters_of(recipe) == pytest.approx(recipe.paper.parameters, rel=0.02)


# sizes and overrides


def test_the_size_says_what_changes_and_everything_else_is_the_paper() -> None:
    tiny, small, paper = (recipe_from(SIZED, size=size) for size in SIZES)
    assert [recipe.backbones["lm"].width for recipe in (tiny, small, paper)] == [24, 48, 48]
    assert [recipe.phases[0].steps for recipe in (tiny, small, paper)] == [10, 77, 10]
    assert tiny.backbones["lm"].depth == 3
    assert recipe_from(SIZED).size == "small"


def test_a_resolved_recipe_keeps_its_size() -> None:
    text = recipe_from(SIZED, size="tiny").to_toml()
    assert recipe_from(text).size == "tiny"
    assert recipe_from(text, size="tiny").backbones["lm"].width == 24
    with pytest.raises(RecipeError, match="already resolved at size 'tiny', it cannot become 'small'") as caught:
        recipe_from(text, size="small")
    assert "shipped" in caught.value.hint


def test_overrides_reach_any_address_and_are_written_into_the_resolved_form() -> None:
    recipe = recipe_from(
        SIZED,
        size="tiny",
        sets=[
            "phases.joint.steps=3",
            "backbones.lm.width=72",
            "backbones.lm.heads=9",
            'ports.text.objective={kind="next-token", z_loss=0.5}',
            "sample.text.max_tokens=4",
            "ports.codes.mask=causal",
            'tasks.answer.segments=[{port="codes", field="image"}, {port="text", text="{caption}", role="target"}]',
        ],
    )
    assert recipe.phases[0].steps == 3
    assert recipe.backbones["lm"].width == 72
    assert recipe.ports["text"].objective.z_loss == 0.5  # type: ignore[union-attr]
    assert recipe.ports["codes"].mask == "causal"  # a bare word is a string
    assert recipe.sample["text"].max_tokens == 4  # type: ignore[attr-defined]
    assert recipe_from(recipe.to_toml()) == recipe


def test_a_part_of_another_kind_replaces_the_old_one_with_all_its_keys() -> None:
    assert mixed_recipe('backbones.lm.mlp={kind="gelu"}').backbones["lm"].mlp.kind == "gelu"
    denoise = (
        mixed_recipe('ports.latents.objective={kind="denoise", predict="clean"}', 'ports.latents.objective={schedule="cosine"}')
        .ports["latents"]
        .objective
    )
    assert (denoise.schedule, denoise.predict) == ("cosine", "clean")  # type: ignore[union-attr]
    sampler = mixed_recipe("sample.latents.clip=3.0", 'sample.latents={sampler="ddim", eta=1.0}').sample["latents"]
    assert (sampler.kind, sampler.eta, sampler.clip, sampler.num_steps) == ("ddim", 1.0, None, 50)  # type: ignore[attr-defined]


def test_the_source_of_a_recipe_is_not_shared_with_what_it_becomes() -> None:
    recipe = mixed_recipe()
    before = recipe.to_toml()
    wider = recipe.with_parts({"autoencoders.vq": {**recipe.source["autoencoders"]["vq"], "channels": 12}})
    assert wider.autoencoders["vq"].channels == 12  # type: ignore[attr-defined]
    assert recipe.to_toml() == before


def test_where_weights_start_is_collected_by_address() -> None:
    recipe = recipe_from(MIXED.replace('kind = "transformer"\n', 'kind = "transformer"\ninit_from = "hf://org/model"\n', 1))
    assert recipe.init_from == {"backbones.lm": "hf://org/model"}
    assert tomllib.loads(recipe.to_toml())["backbones"]["lm"]["init_from"] == "hf://org/model"


# mistakes: (what is written instead of what, message, hint); line: where the message points

BROKEN = {
    "a key of a port": (
        'tokenizer = "bpe"',
        'tokeniser = "bpe"',
        r"ports\.text\.tokeniser: there is no such key",
        "did you mean 'tokenizer'?",
    ),
    "a key of a part": (
        "mlp_ratio = 1.5",
        "mlp_ration = 1.5",
        r"backbones\.lm\.mlp_ration: 'transformer' has no such key",
        "did you mean 'mlp_ratio'?",
    ),
    "a key of a phase": ("batch_size = 3", "batchsize = 3", r"phases.*batchsize: there is no such key", "did you mean 'batch_size'?"),
    "a key of a segment": ("merge = true", "merged = true", r"tasks\.answer.*merged: there is no such key", "did you mean 'merge'?"),
    "a key of the markers": (
        "supervised = true",
        "supervise = true",
        r"ports\.latents\.markers\.supervise: there is no such key",
        "did you mean 'supervised'?",
    ),
    "a key of a sampler": (
        "max_tokens = 9",
        "max_token = 9",
        r"sample\.text\.max_token: 'autoregressive' has no such key",
        "did you mean 'max_tokens'?",
    ),
    "a table": ("[tasks.draw]", "[task.draw]", r"task: there is no such key", "did you mean 'tasks'?"),
    "a kind": (
        'kind = "masked-token"',
        'kind = "masked-tokens"',
        r"ports\.codes\.objective\.kind: there is no 'masked-tokens'",
        "did you mean 'masked-token'?",
    ),
    "no kind": ('connector = { kind = "embedding" }', "connector = { }", r"ports\.text\.connector: `kind` is missing", "embedding"),
    "no table": (
        'connector = { kind = "embedding" }',
        "connector = 3",
        r"ports\.text\.connector: expected a table such as .*, found 3",
        "",
    ),
    "a value of the wrong type": ("depth = 3", 'depth = "deep"', r"backbones\.lm\.depth: .*found 'deep'", ""),
    "a value that is not a choice": (
        'mask = "full"\npositions = "grid"',
        'mask = "round"\npositions = "grid"',
        r"ports\.codes\.mask: .*found 'round'",
        "",
    ),
    "a probability above one": ("cond_dropout_prob = 0.1 }", "cond_dropout_prob = 1.1 }", r"cond_dropout_prob: .*found 1\.1", ""),
    "an unknown tokenizer": ('tokenizer = "bpe"', 'tokenizer = "bpo"', r"ports\.text\.tokenizer: there is no 'bpo'", "did you mean 'bpe'?"),
    "an unknown autoencoder": (
        'autoencoder = "vq"',
        'autoencoder = "vqq"',
        r"ports\.codes\.autoencoder: there is no 'vqq'",
        "did you mean 'vq'?",
    ),
    "an unknown expert": ('expert = "words"', 'expert = "word"', r"ports\.text\.expert: there is no 'word'", "did you mean 'words'?"),
    "no expert": ('expert = "words"\n', "", r"ports\.text\.expert: write which one, there are several", "pictures, words"),
    "an unknown port": (
        '{ port = "codes", field = "image", role = "target" }',
        '{ port = "code", field = "image", role = "target" }',
        r"tasks\.draw\.segments\.port: there is no 'code'",
        "did you mean 'codes'?",
    ),
    "an unknown task": (
        "tasks = { draw = 1.0, answer",
        "tasks = { drew = 1.0, answer",
        r"phases\.joint\.tasks: there is no 'drew'",
        "did you mean 'draw'?",
    ),
    "a sampler of no port": ("[sample.codes]", "[sample.code]", r"sample\.code: there is no 'code'", "did you mean 'codes'?"),
    "a sampler that does not fit": (
        'sampler = "masked"\nnum_steps = 3',
        'sampler = "autoregressive"',
        r"sample\.codes\.sampler: 'autoregressive' does not fit the objective 'masked-token'",
        "masked",
    ),
    "a sampler of a port that is only read": (
        'objective = { kind = "denoise" }\n',
        "",
        r"is a target but ports\.latents has no objective",
        "",
    ),
    "no tokenizer": ('tokenizer = "bpe"\n', "", r'ports\.text\.tokenizer: content "token-ids" needs one', ""),
    "no noise level": (
        'timestep = "add"\n',
        "",
        r"ports\.latents\.timestep: a port that denoises must say how the noise level enters",
        'timestep = "add"',
    ),
    "a port hidden from itself": (
        'timestep = "add"\n',
        'timestep = "add"\nhidden_from = ["latents"]\n',
        r"ports\.latents\.hidden_from: a port sees its own rows",
        'mask = "isolated" hides them from later blocks',
    ),
    "hidden from nobody there is": (
        'timestep = "add"\n',
        'timestep = "add"\nhidden_from = ["texts"]\n',
        r"ports\.latents\.hidden_from: there is no 'texts'",
        "did you mean 'text'?",
    ),
    "words read at rows they never see": (
        'markers = { before = "<soi>", after = "<eoi>", inside = false, supervised = true }',
        'hidden_from = ["text"]',
        r"tasks\.paint\.segments: a next-token target of 'text' would be read at rows of 'latents', which are hidden from it",
        "give ports.latents an end marker",
    ),
    "a head of pictures for words": (
        'head = { kind = "linear" }\nobjective = { kind = "next-token" }',
        'head = { kind = "deep" }\nobjective = { kind = "next-token" }',
        r"ports\.text\.head: 'deep' looks at the rows and columns of latents, not of token-ids",
        "linear",
    ),
    "no head": (
        'head = { kind = "linear" }\nobjective = { kind = "next-token" }',
        'objective = { kind = "next-token" }',
        r"ports\.text\.head: an objective needs a head",
        "",
    ),
    "rows of codes that are not read in order": (
        'markers = { before = "<soi>", after = "<eoi>" }',
        'markers = { before = "<soi>", row = "<sot>", after = "<eoi>" }',
        r"ports\.codes\.markers\.row: only codes in a causal block end their rows with a token",
        'mask = "causal"',
    ),
    "a target that is padded": (
        'objective = { kind = "next-token" }\n',
        'objective = { kind = "next-token" }\nnull_condition = "pad"\n',
        r"tasks\.paint\.segments: 'text' is a target, and <pad> in its place would be learned",
        "empty",
    ),
    "a field and a text": (
        'text = "<bos>" }',
        'text = "<bos>", field = "caption" }',
        r"tasks\.paint\.segments: a segment has either a field or a text \(text\)",
        "",
    ),
    "a text without a tokenizer": (
        'port = "codes", field = "image", role = "target"',
        'port = "codes", text = "a picture", role = "target"',
        r"a literal text needs a port with a tokenizer, 'codes' has none",
        "",
    ),
    "merged masks that disagree": (
        'text = "<mmu>", mask = "full"',
        'text = "<mmu>"',
        r"'codes' \(full\) is merged into a block of 'text' \(causal\); give both the same mask",
        "",
    ),
    "text after an isolated block": (
        '{ port = "latents", field = "image", role = "target" }',
        '{ port = "latents", field = "image", role = "target", mask = "isolated" }',
        r"a next-token target cannot follow an isolated block",
        "start marker",
    ),
    "two probabilities in a group": (
        '{ port = "text", text = "<bos>" },',
        '{ port = "text", text = "<bos>", drop_group = "caption", cond_dropout_prob = 0.2 },',
        r"the drop group 'caption' has two probabilities in one task",
        "",
    ),
    "places of what has no rows and columns": (
        'tokenizer = "bpe"\n',
        'tokenizer = "bpe"\ngrid_embedding = "sincos-2d"\n',
        r"ports\.text\.grid_embedding: only codes and latents",
        "none",
    ),
    "two sizes of a batch": (
        "batch_size = 3",
        "batch_size = 3\nbatch_tokens = 99",
        r"phases\.joint: batch_size and batch_tokens are both written; keep one",
        "",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_mistake_is_one_message_with_the_key_and_the_nearest_choice(what: str) -> None:
    old, new, message, hint = BROKEN[what]
    assert old in MIXED
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_from(MIXED.replace(old, new, 1))
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2
    assert re.match(r"/.*test\.toml(:\d+)?: ", caught.value.message), caught.value.message


@pytest.mark.parametrize(
    ("old", "new", "start"),
    [
        ('tokenizer = "bpe"', 'tokeniser = "bpe"', "tokeniser"),
        ("mlp_ratio = 1.5", "mlp_ration = 1.5", "mlp_ration"),
        ("max_tokens = 9", "max_token = 9", "max_token"),
        ("depth = 3", 'depth = "deep"', "depth"),
        ('expert = "words"', 'expert = "word"', 'expert = "word"'),
    ],
)
def test_a_message_points_at_the_line(old: str, new: str, start: str) -> None:
    text = MIXED.replace(old, new, 1)
    with pytest.raises(RecipeError) as caught:
        recipe_from(text)
    assert f"test.toml:{line_of(text, start)}: " in caught.value.message


def test_guidance_needs_a_task_that_drops_its_condition() -> None:
    text = MIXED.replace("cond_dropout_prob = 0.1", "cond_dropout_prob = 0.0")
    with pytest.raises(RecipeError, match=r"sample\.codes\.guidance_scale: no task that writes 'codes' ever drops its condition") as caught:
        recipe_from(text, sets=["sample.codes.guidance_scale=3.0"])
    assert "cond_dropout_prob = 0.1" in caught.value.hint
    assert recipe_from(MIXED, sets=["sample.codes.guidance_scale=3.0"]).sample["codes"].guidance_scale == 3.0


def test_two_phases_of_one_name_are_an_error() -> None:
    phase = '[[phases]]\nname = "joint"\nstage = "align"\nsteps = 1\n'
    with pytest.raises(RecipeError, match=r"phases\.joint: two phases have this name"):
        recipe_from(MIXED.replace("[sample.codes]", phase + "[sample.codes]", 1))


def test_a_stage_without_a_phase_says_which_stages_there_are() -> None:
    assert [phase.name for phase in mixed_recipe().phases_for("train-unified")] == ["joint"]
    with pytest.raises(RecipeError, match="has no phase for the stage align") as caught:
        mixed_recipe().phases_for("align")
    assert "train-unified" in caught.value.hint


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("phases.joint.steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("phase.joint.steps=3", "a recipe has no table 'phase'"),
        ("name=other", "a recipe has no table 'name'"),
        ("phases.join.steps=3", "there is no phase 'join'"),
        ("phases.joint.step=3", "there is no such key"),
        ("backbones.lm.widht=8", "'transformer' has no such key"),
        ("phases.joint.steps=-1", "expected at least 0"),
    ],
)
def test_a_bad_override_says_what_is_wrong_with_it(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        mixed_recipe(assignment)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[sizes.tiny]", "[sizes.tinny]", r"sizes must be tiny, small and paper; missing \['tiny'\]"),
        ("[sizes.paper]\n", "[sizes.paper]\n[sizes.huge]\n", r"unknown \['huge'\]"),
        ("phases.joint = { steps = 77 }", "phases.jont = { steps = 77 }", r"sizes\.small\.phases\.jont: there is no phase 'jont'"),
    ],
)
def test_sizes_are_checked_whichever_is_asked_for(old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from(SIZED.replace(old, new, 1), size="tiny")


def test_a_size_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(RecipeError, match="there is no size 'tinny'") as caught:
        recipe_from(SIZED, size="tinny")
    assert caught.value.hint == "did you mean 'tiny'?"


def test_a_recipe_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="there is no recipe 'show-oh'") as caught:
        load_recipe("show-oh")
    assert caught.value.hint.startswith("did you mean 'show-o'?")
    with pytest.raises(RecipeError, match=r"elsewhere/my\.toml: no such recipe file"):
        load_recipe("elsewhere/my.toml")


def test_a_file_that_is_not_toml_says_where_it_stops_being_toml() -> None:
    with pytest.raises(RecipeError, match=r"this is not TOML: .*line 2"):
        recipe_from('size = "tiny"\n[paper\n')


def test_recipes_are_data_and_cannot_change_after_loading() -> None:
    recipe = mixed_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.ports["text"].mask = "full"  # type: ignore[assignment]
    assert isinstance(recipe, Recipe)
    assert all(path.suffix == ".toml" and path.is_relative_to(RECIPES) for path in recipe_names().values())
