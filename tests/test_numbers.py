"""Numbers: every number of every config has bounds, and what is outside them is one message that names the key."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel
from worlds import mixed_recipe

import stages.parts.losses  # noqa: F401  (their configs are of no union)
from stages.errors import RecipeError
from stages.model import meta_model
from stages.parts.config import PartConfig, Strict, built_at
from stages.recipe import SegmentSpec, load_recipe, recipe_names

BAD = (float("nan"), float("inf"), float("-inf"), -1, 0, 10**12, 10**400)
# what a config needs beside its `kind`, of those that no shipped recipe has
TOWER = {"kind": "any", "width": 8, "depth": 2, "heads": 2, "patch_size": 4}
NEEDED: dict[str, dict[str, Any]] = {
    "RopeScalingConfig": {"kind": "llama3", "factor": 8.0},
    "AutoencoderConfig": {"downsample": 4, "latent_channels": 4},
    "DiscreteConfig": {"downsample": 4, "latent_channels": 4},
    "ConvolutionalConfig": {"downsample": 2, "multipliers": (1, 1), "attention": False, "latent_channels": 4},
    "TowerConfig": {name: value for name, value in TOWER.items() if name != "patch_size"},
    "PatchTowerConfig": TOWER,
    "TokenizerConfig": {"vocab_size": 300},
}


def all_configs(base: type[BaseModel] = Strict) -> Iterator[type[BaseModel]]:
    for config in base.__subclasses__():
        if config.__module__.startswith("stages."):
            yield config
            yield from all_configs(config)


CONFIGS = list(dict.fromkeys(all_configs()))


def unbounded(schema: Any, path: str) -> Iterator[str]:
    """The numbers of a JSON schema that lack a least or a greatest value, and the lists that may be of any length."""
    if isinstance(schema, Mapping):
        if is_number(schema):
            for side in ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}):
                if not side & set(schema):
                    yield f"{path} has no {sorted(side)[1]}"
        if schema.get("type") == "array" and "maxItems" not in schema:
            yield f"{path} has no maxItems"
        for key, value in schema.items():
            if key not in ("default", "$defs", "additionalProperties") or isinstance(value, Mapping):
                yield from unbounded(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for place, value in enumerate(schema):
            yield from unbounded(value, f"{path}.{place}")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_of_a_config_has_bounds_and_every_list_an_end(config: type[BaseModel]) -> None:
    own = {name: field for name, field in config.model_fields.items() if name != "source"}
    schema = config.model_json_schema()["properties"]
    assert [problem for name in own for problem in unbounded(schema[name], f"{config.__name__}.{name}")] == []


def test_the_check_finds_a_number_without_bounds() -> None:
    class Loose(PartConfig):
        depth: int = 1
        sizes: tuple[float, ...] = ()

    schema = Loose.model_json_schema()["properties"]
    assert len(list(unbounded(schema["depth"], "depth"))) == 2
    assert len(list(unbounded(schema["sizes"], "sizes"))) == 3


def test_no_config_stands_beside_the_base_that_refuses_what_is_not_finite() -> None:
    """Numbers of a recipe that are declared in a model of another base would let NaN in."""
    beside = [
        model.__name__
        for model in BaseModel.__subclasses__()
        if model.__module__.startswith(("stages.parts", "stages.recipe")) and model is not Strict
    ]
    assert beside == []


# values


def allowed(schema: Mapping[str, Any], value: float) -> bool:
    """Whether a JSON schema says that a number may be this."""
    if "anyOf" in schema:
        return any(allowed(option, value) for option in schema["anyOf"])
    if schema.get("type") not in ("integer", "number") or value != value or abs(value) == float("inf"):
        return False
    least = value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", value - 1)
    return least and value <= schema.get("maximum", value) and value < schema.get("exclusiveMaximum", value + 1)


def numbers_of(schema: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Callable[[float], Any]]]:
    """The numbers of one key: the schema of each, and how a value is put there."""
    for option in [schema, *schema.get("anyOf", [])]:
        entries = option.get("prefixItems") or [option.get("items", {})]
        inner = option.get("additionalProperties")
        if is_number(option):
            yield schema, lambda value: value
        elif is_number(entries[0]):
            count = len(entries)
            yield entries[0], lambda value, count=count: [value] * count
        elif isinstance(inner, Mapping) and is_number(inner):
            yield inner, lambda value: {"some": value}


def is_number(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") in ("integer", "number") and "enum" not in schema


def refusal(config: type[BaseModel], table: Mapping[str, Any]) -> str | None:
    """What is said of a table, None where it is taken. Any other exception is a failure."""
    try:
        with built_at("part"):
            config(**table)
    except RecipeError as problem:
        return problem.message
    return None


@cache
def written() -> dict[type[BaseModel], dict[str, Any]]:
    """What some shipped recipe says in each kind of table."""
    found: dict[type[BaseModel], dict[str, Any]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, BaseModel):
            found.setdefault(type(value), {name: getattr(value, name) for name in value.model_fields_set})
            walk(vars(value))
        elif isinstance(value, Mapping):
            walk(list(value.values()))
        elif isinstance(value, list | tuple):
            for entry in value:
                walk(entry)

    for name in recipe_names():
        walk(load_recipe(name, size="tiny"))
    return found


NUMBERS = [
    pytest.param(config, key, number, put, id=f"{config.__name__}.{key}")
    for config in CONFIGS
    for key, schema in config.model_json_schema()["properties"].items()
    for number, put in numbers_of(schema)
]


@pytest.mark.parametrize(("config", "key", "number", "put"), NUMBERS)
def test_a_number_outside_its_bounds_is_one_message_with_its_key(
    config: type[BaseModel], key: str, number: Mapping[str, Any], put: Callable[[float], Any]
) -> None:
    table = written().get(config) or NEEDED.get(config.__name__, {})
    table = {name: "any" for name, field in config.model_fields.items() if field.is_required() and field.annotation is str} | table
    assert refusal(config, table) is None
    said = {str(value)[:20]: refusal(config, {**table, key: put(value)}) for value in BAD}
    taken = {str(value)[:20] for value in BAD if allowed(number, value)}
    assert {value for value, message in said.items() if message is None} <= taken
    for message in said.values():
        assert message is None or (key in message and len(message) < 300 and "Input should" not in message)


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("phases.joint.lr=nan", "phases.joint.lr"),
        ("phases.joint.lr=-1", "phases.joint.lr"),
        ('phases.joint.lr={"*"=-1}', "phases.joint.lr.*"),
        ("phases.joint.weight_decay=-1", "phases.joint.weight_decay"),
        ("phases.joint.warmup_steps=-3", "phases.joint.warmup_steps"),
        ("phases.joint.batch_tokens=1000000000000", "phases.joint.batch_tokens"),
        ("phases.joint.tasks.draw=nan", "phases.joint.tasks.draw"),
        ("phases.joint.tasks.draw=-1", "phases.joint.tasks.draw"),
        ("phases.joint.betas=[0.9, 1.0]", "phases.joint.betas.1"),
        ("sample.codes.guidance_scale=nan", "sample.codes.guidance_scale"),
        ("sample.codes.num_steps=1e9", "sample.codes.num_steps"),
        ("sample.text.temperature=-0.5", "sample.text.temperature"),
        ("backbones.lm.heads=0", "backbones.lm.heads"),
        ("backbones.lm.depth=0", "backbones.lm.depth"),
        ("backbones.lm.depth=10000000", "backbones.lm.depth"),
        ("backbones.lm.width=0", "backbones.lm.width"),
        ("backbones.lm.heads=7", "heads must divide"),
        ("backbones.lm.kv_heads=4", "kv_heads must divide"),
        ("backbones.lm.rope.axes=[2, 2, 2]", "rope.axes must add up"),
        ("backbones.lm.rope.axes=[3, 1, 4]", "backbones.lm.rope.axes"),
        ('backbones.lm.mlp={kind="moe", experts=1024, top_k=1}', "feed-forward"),
        ("autoencoders.vq.quantizer.codebook_size=0", "autoencoders.vq.quantizer.codebook_size"),
        (f"phases.joint.steps={'9' * 5000}", "phases.joint.steps"),
    ],
)
def test_an_override_is_judged_like_the_file(assignment: str, key: str) -> None:
    sets = [assignment] if "moe" not in assignment else [assignment, "backbones.lm.depth=512"]
    with pytest.raises(RecipeError) as caught:
        mixed_recipe(*sets)
    assert key in caught.value.message
    assert len(caught.value.message) < 400
    assert "Input should" not in caught.value.message


def test_a_recipe_file_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(path)


# texts of tasks


@pytest.mark.parametrize(
    "text",
    [
        "{caption.__class__}",
        "{__class__}",
        "{caption!r}",
        "{caption:>99999999}",
        "{0}",
        "{}",
        "{caption[0]}",
        "{caption",
        "caption}",
        "{{caption}}",
        "{caption.}",
        "{.caption}",
        "{a..b}",
        "{Caption}",
        "{caption }",
        "{cap\ntion}",
        '{"a": 1}',
    ],
)
def test_braces_in_a_text_hold_the_name_of_a_field_and_nothing_else(text: str) -> None:
    segments = tomli_w.dumps({"segments": [{"port": "text", "text": text}]}).removeprefix("segments = ")
    with pytest.raises(RecipeError, match=r"tasks\.answer\.segments\.0\.text: braces in a text hold the name of a field"):
        mixed_recipe(f"tasks.answer.segments={segments.replace(chr(10), ' ')}")


@pytest.mark.parametrize(("text", "fields"), [("{caption}", ("caption",)), ("<sot>{a.b} and {c_d}<eot>", ("a.b", "c_d")), ("no field", ())])
def test_names_of_fields_in_braces_are_read(text: str, fields: tuple[str, ...]) -> None:
    assert SegmentSpec(port="text", text=text).fields == fields


def test_a_text_longer_than_any_prompt_is_refused() -> None:
    with pytest.raises(RecipeError, match="at most 10000 letters"):
        mixed_recipe(f'tasks.answer.segments=[{{port="text", text="{"a" * 10_001}"}}]')


def test_a_recipe_has_an_end_of_ports_and_tasks() -> None:
    ports = {f"ports.p{number}.content": "token-ids" for number in range(300)}
    with pytest.raises(RecipeError, match="ports: expected at most 256 entries"):
        mixed_recipe(*[f"{address}={value}" for address, value in ports.items()])


# parts that do not fit each other


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (('ports.latents.head={kind="deep", heads=5}',), r"ports\.latents: heads must divide the width 48, found 5"),
        (('ports.latents.connector={kind="transformer", depth=1, heads=3}',), r"ports\.latents: heads must divide the width 5, found 3"),
    ],
)
def test_a_part_that_does_not_fit_its_network_names_its_address(sets: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        meta_model(mixed_recipe(*sets))
