"""A recipe: one TOML file that describes one system as data. The only file that knows TOML; all validation is here.

The body of the file is the paper; `sizes.tiny|small|paper` say what changes for smaller machines. `load_recipe` merges the
chosen size and the `--set` overrides, checks every key once, and returns frozen models; after that nobody checks again.
A part's address is its path in the file (`ports.draw.head`, `backbones.lm.experts.image`), and freezing, `--init`, `--set` and
size overrides all speak in addresses. Reading order: `Recipe` (what a file may say), `load_recipe`, `_check` (what must agree).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator
from torch import nn

from stages.documents import MAX_TOML_BYTES, check_value, parse_toml, read_bytes
from stages.errors import RecipeError, nearest
from stages.files import inside
from stages.parts.autoencoders import AUTOENCODERS, AutoencoderConfig
from stages.parts.backbones import BACKBONES, BackboneConfig
from stages.parts.config import (
    MAX_NAMES,
    Below1,
    Fraction,
    Length,
    Names,
    PartConfig,
    Pixels,
    Strict,
    Updates,
    Weight,
    first_problem,
    parse_part,
    shown,
    told,
)
from stages.parts.connectors import CONNECTORS, EmbeddingScalesConfig
from stages.parts.encoders import ENCODERS, EncoderConfig
from stages.parts.heads import HEADS
from stages.parts.objectives import OBJECTIVES, ROW_OBJECTIVES, RowObjective
from stages.parts.quantizers import MultiScaleConfig
from stages.parts.samplers import SAMPLERS, SamplerConfig
from stages.parts.tokenizers import TOKENIZERS, TokenizerConfig
from stages.parts.views import VIEWS
from stages.sequence.segment import Content, MaskKind, PositionKind, Role

RECIPES = Path(__file__).parent / "recipes"
FROM_NO_FIELD = (Content.QUERIES, Content.HIDDEN)  # segments that are not filled with anything of the sample
HERE = "<here>"  # stands for the address until pydantic has said it
SIZES = ("tiny", "small", "paper")
MAX_VOCABULARY = 2**24  # entries that one embedding can have
MAX_ADDRESS = 20  # steps of a key that --set reaches
Stage = Literal["pretrain-tokenizer", "align", "train-unified"]
LearningRate = Annotated[float, Field(ge=0, le=1e3)]  # 1e3 and more is no number anybody trains with
FIELD = r"\{[a-z_]+(?:\.[a-z_]+)*\}"  # of a text: the name of a field in braces, and nothing else that braces may mean elsewhere


class _PartProblem(ValueError):
    """A RecipeError on its way through pydantic, which adds where it happened."""

    def __init__(self, problem: RecipeError) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _part(family: Mapping[str, type[PartConfig]]) -> BeforeValidator:
    """A recipe table → the config its `kind` names."""
    return BeforeValidator(lambda table: table if isinstance(table, PartConfig) else _parse(family, table))


def _parse(family: Mapping[str, type[PartConfig]], table: Any) -> PartConfig:
    try:
        return parse_part(family, table, HERE)
    except RecipeError as problem:
        raise _PartProblem(problem) from None


class Paper(Strict):
    """Where the system comes from, and how large it was."""

    arxiv: str
    title: str = ""
    parameters: float | None = Field(default=None, ge=0, le=1e15)  # a count; without one, `nominal` says what is printed about the size
    parameters_source: str = ""
    nominal: str = ""
    status: Literal["published", "reconstruction", "nearest-public"] = "published"
    differs: Names = ()


class Markers(Strict):
    """Special tokens around a segment, by name in the tokenizer; `row`: after each row of its grid. `inside`: part of its attention
    block. `supervised`: predicted wherever the segment is a target, which is how a model learns to switch modes by itself."""

    before: str = ""
    after: str = ""
    row: str = ""
    inside: bool = True
    supervised: bool = False


class Port(Strict):
    """How one network reads or writes one representation."""

    content: Content
    backbone: str = ""
    enters: Literal["sequence", "none"] = "sequence"
    tokenizer: str = ""
    encoder: str = ""
    autoencoder: str = ""
    select: Literal["tokens", "pooled"] = "tokens"
    count: int = Field(default=0, ge=0, le=65_536)  # of queries
    of: Annotated[Names, BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)] = ()  # of hidden rows
    skip_rows: int = Field(default=0, ge=0, le=65_536)  # of those, at the front
    view: Annotated[Any, _part(VIEWS)] = None
    patch_size: Pixels = 1
    connector: Annotated[Any, _part(CONNECTORS)] = None
    head: Annotated[Any, _part(HEADS)] = None
    objective: Annotated[RowObjective | None, _part(ROW_OBJECTIVES)] = None
    vocabulary: str = ""
    mask: MaskKind = MaskKind.CAUSAL
    positions: PositionKind = PositionKind.SEQUENTIAL
    grid_embedding: Literal["none", "sincos-2d"] = "none"  # added to every token: where it stands in its picture
    expert: str = ""
    timestep: Literal["none", "add", "token", "modulation"] = "none"  # token: a row of its own before the others
    hidden_from: Names = ()  # ports whose rows never see this port's
    markers: Markers = Markers()
    null_condition: Literal["remove", "hold", "empty", "pad"] = "remove"
    loss_weight: Weight = 1.0

    @property
    def is_ids(self) -> bool:
        return self.content in (Content.TOKEN_IDS, Content.CODES)

    @property
    def by_scale(self) -> bool:
        """Whether its pictures stand in the sequence scale by scale."""
        return isinstance(self.connector, EmbeddingScalesConfig)


class SegmentSpec(Strict):
    """A segment as a task asks for it: a field, or a literal text with fields in braces."""

    port: str
    field: str = ""
    text: str = ""
    role: Role = Role.CONTEXT
    mask: MaskKind | None = None
    weight: Weight | None = None
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    merge: bool = False
    optional: bool = False
    cond_dropout_prob: Fraction = 0.0
    drop_group: str = ""
    max_tokens: Length | None = None  # of a text that is written: at most so many, where the sampler allows more

    @field_validator("timestep_range")
    @classmethod
    def _from_clean_to_noise(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"the first bound must not be above the second, found {list(bounds)}")
        return bounds

    @field_validator("text")
    @classmethod
    def _braces_hold_fields(cls, text: str) -> str:
        left = re.sub(FIELD, "", text)
        if "{" in left or "}" in left or any("__" in name for name in re.findall(FIELD, text)):
            raise ValueError(f"braces in a text hold the name of a field and nothing else, as in {{caption}} (found {shown(text)})")
        return text

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a sample it reads, in order."""
        return (self.field,) if self.field else tuple(name[1:-1] for name in re.findall(FIELD, self.text))

    @property
    def group(self) -> str:
        """What guidance calls this condition."""
        return self.drop_group or (self.fields[0] if self.fields else "")


class EachSpec(Strict):
    """Segments repeated over a list field: turns of a dialogue, questions about one picture."""

    each: str
    segments: tuple[SegmentSpec, ...] = Field(max_length=MAX_NAMES)
    limit: int = Field(default=0, ge=0, le=10**9)  # at most so many records a sample and epoch, drawn anew each time; 0 = all


class Task(Strict):
    """What a training example of one kind looks like: its segments, in order."""

    segments: tuple[SegmentSpec | EachSpec, ...] = Field(min_length=1, max_length=MAX_NAMES)
    objectives: Names = ()
    then: str = ""  # when sampling: the task that goes on with the features this one wrote

    def flat(self) -> Iterator[SegmentSpec]:
        for segment in self.segments:
            yield from segment.segments if isinstance(segment, EachSpec) else (segment,)

    @property
    def prompt_fields(self) -> frozenset[str]:
        """Fields a prompt must have before this task can be asked of it: all but those of the last target that has any."""
        flat = [segment for segment in self.segments if isinstance(segment, SegmentSpec)]
        targets = [segment for segment in self.flat() if segment.role == Role.TARGET and segment.fields]
        each = {segment.each for segment in self.segments if isinstance(segment, EachSpec)}
        plain = {name for segment in flat if segment not in targets[-1:] and not segment.optional for name in segment.fields}
        return frozenset(each | plain)


class Phase(Strict):
    """One training run: which tasks, what learns, for how long."""

    name: str
    stage: Stage
    tasks: dict[str, Weight] = Field(default={}, max_length=MAX_NAMES)
    mix: Literal["sample", "every-step"] = "sample"
    trainable: Names = ("*",)
    frozen: Names = ()
    steps: Updates
    batch_size: int | None = Field(default=None, ge=1, le=2**20)
    batch_tokens: int | None = Field(default=None, ge=1, le=2**26)  # five times the largest of the shipped recipes
    lr: LearningRate | dict[str, LearningRate] = 1e-4
    warmup_steps: Updates = 0
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: Weight = 0.0
    betas: tuple[Below1, Below1] = (0.9, 0.95)
    grad_clip: float = Field(default=1.0, gt=0, le=1e12)  # a large one clips nothing
    ema_decay: Below1 | None = None
    reduce: Literal["own-tokens", "all-tokens"] = "own-tokens"


class Recipe(Strict):
    """A whole recipe, at one size."""

    name: str
    family: str = ""
    size: str = "small"
    paper: Paper
    scope: str = ""
    tokenizers: dict[str, Annotated[TokenizerConfig, _part(TOKENIZERS)]] = Field(default={}, max_length=MAX_NAMES)
    encoders: dict[str, Annotated[EncoderConfig, _part(ENCODERS)]] = Field(default={}, max_length=MAX_NAMES)
    autoencoders: dict[str, Annotated[AutoencoderConfig, _part(AUTOENCODERS)]] = Field(default={}, max_length=MAX_NAMES)
    backbones: dict[str, Annotated[BackboneConfig, _part(BACKBONES)]] = Field(default={}, max_length=MAX_NAMES)
    ports: dict[str, Port] = Field(default={}, max_length=MAX_NAMES)
    objectives: dict[str, Annotated[PartConfig, _part(OBJECTIVES)]] = Field(default={}, max_length=MAX_NAMES)
    tasks: dict[str, Task] = Field(default={}, max_length=MAX_NAMES)
    phases: tuple[Phase, ...] = Field(default=(), max_length=MAX_NAMES)
    sample: dict[str, Annotated[SamplerConfig, BeforeValidator(lambda table: _sampler(table))]] = Field(default={}, max_length=MAX_NAMES)
    init_from: dict[str, str] = Field(
        default={}, max_length=MAX_NAMES
    )  # address → where its weights start, from the parts' own `init_from` keys
    source: dict[str, Any] = Field(default={}, repr=False, exclude=True)  # the merged tables, to be written out again

    def to_toml(self) -> str:
        """The resolved recipe: one size, all overrides, loadable again."""
        return tomli_w.dumps({"name": self.name, "family": self.family, "size": self.size, **self.source})

    def phases_for(self, stage: Stage) -> tuple[Phase, ...]:
        phases = tuple(phase for phase in self.phases if phase.stage == stage)
        if not phases:
            stages = ", ".join(sorted({phase.stage for phase in self.phases})) or "none"
            raise RecipeError(f"recipe '{self.name}' has no phase for the stage {stage}", hint=f"its phases belong to: {stages}")
        return phases

    def with_parts(self, tables: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The same recipe with the tables at some addresses replaced: what the real tokenizers turned out to be."""
        source = _copy(self.source)
        for address, table in tables.items():
            *parents, last = address.split(".")
            place = source
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = _copy(table)
        return _validate(source, self.name, self.family, self.size, where=f"recipe '{self.name}'")


def _sampler(table: Any) -> SamplerConfig:
    if not isinstance(table, Mapping):
        return table
    renamed = {("kind" if key == "sampler" else key): value for key, value in table.items()}
    if "sampler" not in table:
        raise _PartProblem(RecipeError("`sampler` is missing", hint=nearest("", SAMPLERS)))
    config = _parse(SAMPLERS, renamed)
    assert isinstance(config, SamplerConfig)
    return config


def recipe_names() -> dict[str, Path]:
    """Every shipped recipe: name → file."""
    return {path.stem: path for path in sorted(RECIPES.glob("*/*.toml"))}


def load_recipe(name_or_path: str | Path, *, size: str | None = None, sets: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by its name (a string), or a file or checkpoint folder, at one size (default small; a resolved recipe keeps its own).

    sets: `address=value` strings, values in TOML. Raises RecipeError with the key, its line, and the nearest valid name.
    """
    path = _find(name_or_path)
    data = read_bytes(path, most=MAX_TOML_BYTES, error=RecipeError, linked=True)
    tables, text = parse_toml(data, path, error=RecipeError), data.decode("utf-8-sig")
    name, family = tables.pop("name", path.stem), tables.pop("family", path.parent.name)
    resolved_size = tables.pop("size", None)
    for key, value in (("name", name), ("family", family), ("size", resolved_size)):
        if not isinstance(value, str | None):
            raise RecipeError(f"{path}{_line_of(key, text)}: {key}: expected a text, found {shown(value)}")
    if size is not None and size not in SIZES:
        raise RecipeError(f"there is no size '{size}'", hint=nearest(size, SIZES))
    sizes = tables.pop("sizes", None)
    if sizes is None:
        if resolved_size is None:
            raise RecipeError(f"{path}: [sizes.tiny], [sizes.small] and [sizes.paper] are required")
        if size is not None and size != resolved_size:
            raise RecipeError(
                f"{path}: already resolved at size '{resolved_size}', it cannot become '{size}'", hint="start from the shipped recipe"
            )
        chosen = resolved_size
    else:
        if not isinstance(sizes, dict) or not all(isinstance(change, dict) for change in sizes.values()):
            raise RecipeError(f"{path}{_line_of('sizes', text)}: sizes: expected tables [sizes.tiny], [sizes.small] and [sizes.paper]")
        missing = [s for s in SIZES if s not in sizes]
        unknown = [s for s in sizes if s not in SIZES]
        if missing or unknown:
            raise RecipeError(
                f"{path}: sizes must be tiny, small and paper" + (f"; missing {missing}" if missing else f"; unknown {unknown}")
            )
        chosen = size or "small"
        for other in SIZES:  # all of them must reach existing keys, whichever is asked for
            merged = _merge(_copy(tables), sizes[other], where=f"{path}: sizes.{other}")
            if other == chosen:
                result = merged
        tables = result
    for assignment in sets or []:
        _assign(tables, assignment)
    return _validate(tables, name, family, chosen, where=str(path), text=text)


def _find(name_or_path: str | Path) -> Path:
    names = recipe_names()
    if isinstance(name_or_path, str) and name_or_path in names:  # a Path is a path: a run of llava may well be in ./llava
        return names[name_or_path]
    path = Path(name_or_path)
    if path.is_dir() and (own := inside(path, "recipe.toml")):
        return own
    if path.is_file():
        return path
    if path.suffix == ".toml" or len(path.parts) > 1:
        raise RecipeError(f"{path}: no such recipe file")
    raise RecipeError(f"there is no recipe '{name_or_path}'", hint=nearest(str(name_or_path), names) + " (`mmgen recipes` lists them)")


def _copy(table: Any) -> Any:
    if isinstance(table, Mapping):
        return {key: _copy(value) for key, value in table.items()}
    return [_copy(value) for value in table] if isinstance(table, list) else table


def _merge(base: dict[str, Any], change: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`change` into `base`, table by table; lists are replaced, phases are found by name, a part of another kind replaces the old one."""
    for key, value in change.items():
        here = f"{where}.{key}"
        old = base.get(key)
        if (
            isinstance(old, list)
            and isinstance(value, Mapping)
            and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in old)
        ):
            by_name = {item["name"]: item for item in old}
            for name, part in value.items():
                if name not in by_name:
                    raise RecipeError(f"{here}.{name}: there is no phase '{name}'", hint=nearest(name, by_name))
                if not isinstance(part, Mapping):
                    raise RecipeError(f"{here}.{name}: expected a table, found {shown(part)}")
                _merge(by_name[name], part, f"{here}.{name}")
        elif (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and all(value.get(k, old.get(k)) == old.get(k) for k in ("kind", "sampler"))
        ):
            _merge(old, value, here)
        else:
            base[key] = _copy(value)
    return base


def _assign(tables: dict[str, Any], assignment: str) -> None:
    """One `--set address=value`."""
    address, equals, text = assignment.partition("=")
    if not equals or not address:
        raise RecipeError(f"--set {assignment}: expected KEY=VALUE, such as phases.joint.steps=200")
    try:
        tables_of_value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    else:
        if tables_of_value.keys() != {"value"}:  # a line break, and then further keys
            raise RecipeError(f"--set {assignment}: expected one value")
        value = tables_of_value["value"]
        check_value(tables_of_value, f"--set {address}", error=RecipeError, whole_numbers=True)
    if address.count(".") > MAX_ADDRESS:
        raise RecipeError(f"--set {address:.60}…: no key of a recipe lies so deep")
    change: Any = value
    for key in reversed(address.strip().split(".")):
        change = {key: change}
    top = address.split(".")[0]
    if top not in Recipe.model_fields or top in ("name", "family", "size", "source"):
        raise RecipeError(f"--set {address}: a recipe has no table '{top}'", hint=nearest(top, set(Recipe.model_fields) - {"source"}))
    _merge(tables, change, "--set")


def _validate(tables: dict[str, Any], name: str, family: str, size: str, *, where: str, text: str = "") -> Recipe:
    source = _copy(tables)
    for table in ("init_from", "encoders", "backbones", "autoencoders"):
        if not isinstance(tables.get(table, {}), dict):
            raise RecipeError(f"{where}{_line_of(table, text)}: {table}: expected a table, found {shown(tables[table])}")
    init_from: dict[str, str] = dict(tables.get("init_from", {}))
    tables = _copy(tables)
    for table in ("encoders", "backbones", "autoencoders"):
        for part, keys in tables.get(table, {}).items():
            if isinstance(keys, dict) and "init_from" in keys:
                init_from[f"{table}.{part}"] = keys.pop("init_from")
    tables["init_from"] = init_from
    try:
        recipe = Recipe(name=name, family=family, size=size, source=source, **tables)
        _check(recipe)
    except ValidationError as error:
        raise _explain(error, where, text, tables.get("phases")) from None
    except RecipeError as error:
        raise RecipeError(f"{where}{_line_of(error.message, text)}: {error.message}", hint=error.hint) from None
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return recipe


def _explain(error: ValidationError, where: str, text: str, phases: Any) -> RecipeError:
    """pydantic's first complaint in our words: file, line, key, what was found, the nearest valid key."""
    first, place = first_problem(error)
    location = [str(step) for step in place]
    if location[0] == "phases" and len(location) > 1 and isinstance(phases, list):  # by its name, as --set says it
        phase = phases[int(location[1])]
        location[1] = str(phase.get("name", location[1])) if isinstance(phase, dict) else location[1]
    key = ".".join(location)
    hint = ""
    problem = first.get("ctx", {}).get("error")
    if isinstance(problem, _PartProblem):
        message = problem.problem.message.replace(HERE, key) if HERE in problem.problem.message else f"{key}: {problem.problem.message}"
        return RecipeError(f"{where}{_line_of(message, text)}: {message}", hint=problem.problem.hint)
    if first["type"] == "extra_forbidden":
        model = _model_at([step for step in first["loc"][:-1] if isinstance(step, str)])
        hint = nearest(location[-1], model.model_fields) if model is not None else ""
    return RecipeError(f"{where}{_line_of(key, text)}: {key}: {told(first)}", hint=hint)


def _model_at(location: list[str]) -> type[BaseModel] | None:
    """The pydantic model that owns a location, to name its keys."""
    models: dict[str, type[BaseModel]] = {"paper": Paper, "ports": Port, "tasks": Task, "phases": Phase}
    if not location:
        return Recipe
    if "markers" in location:
        return Markers
    if "SegmentSpec" in location or (location[0] == "tasks" and "segments" in location):
        return SegmentSpec
    return models.get(location[0])


def _line_of(key: str, text: str) -> str:
    """`:12` for the line that most likely holds a dotted key: pydantic and tomllib keep no positions."""
    steps = re.findall(r"[A-Za-z_][\w-]*", key.split(":")[0])
    lines = text.splitlines()
    start = 0
    for depth in range(len(steps), 0, -1):  # the table header that holds the key
        header = ".".join(steps[:depth])
        match = next((i for i, line in enumerate(lines) if line.strip().strip("[]").strip() == header), None)
        if match is not None:
            start = match
            break
    for step in reversed(steps):
        for number in range(start, len(lines)):
            if re.search(rf"(^|[\s{{,.\[\"]){re.escape(step)}\s*([=.\]]|$)", lines[number]) or f'"{step}"' in lines[number]:
                return f":{number + 1}"
    return ""


def _check(recipe: Recipe) -> None:
    """What the tables must agree on before anything is built (recipe pages call these the load-time checks)."""
    for family in ("tokenizers", "encoders", "autoencoders", "backbones", "ports", "objectives"):
        for name in getattr(recipe, family):
            _check_name(name, f"{family}.{name}")
    for name, network in recipe.backbones.items():
        for expert in network.experts:
            _check_name(expert, f"backbones.{name}.experts")
    for name, port in recipe.ports.items():
        here = f"ports.{name}"
        _known(port.tokenizer, ("", *recipe.tokenizers), f"{here}.tokenizer")
        _known(port.encoder, ("", *recipe.encoders), f"{here}.encoder")
        _known(port.autoencoder, ("", *recipe.autoencoders), f"{here}.autoencoder")
        _known(port.backbone, ("", *recipe.backbones), f"{here}.backbone")
        if port.enters == "sequence":
            if not recipe.backbones:
                raise RecipeError(
                    f"{here}: enters a sequence, but the recipe has no backbone", hint='write enters = "none", or a [backbones.NAME] table'
                )
            if len(recipe.backbones) > 1 and not port.backbone:
                raise RecipeError(f"{here}.backbone: write which one, there are several", hint=nearest("", recipe.backbones))
            experts = recipe.backbones[backbone_of(recipe, port)].experts
            if len(experts) > 1 and not port.expert:
                raise RecipeError(f"{here}.expert: write which one, there are several", hint=nearest("", experts))
            _known(port.expert, ("", *experts), f"{here}.expert")
        if port.grid_embedding != "none" and (port.content not in (Content.CODES, Content.LATENTS) or port.enters != "sequence"):
            raise RecipeError(f"{here}.grid_embedding: only codes and latents of a sequence have rows and columns", hint='"none"')
        if port.markers.row:
            _check_rows(here, port)
        for role in ("connector", "head"):
            part = getattr(port, role)
            if getattr(part, "for_pictures", False) and port.content != Content.LATENTS:
                raise RecipeError(
                    f"{here}.{role}: '{part.kind}' looks at the rows and columns of latents, not of {port.content}", hint="linear"
                )
        for other in port.hidden_from:
            _known(other, recipe.ports, f"{here}.hidden_from")
            if other == name:
                raise RecipeError(f"{here}.hidden_from: a port sees its own rows", hint='mask = "isolated" hides them from later blocks')
        _check_between_networks(recipe, here, port)
        regresses = port.objective is not None and port.objective.kind == "regress"
        if regresses and (not port.encoder or port.tokenizer or port.connector is not None):
            message = f'{here}: the objective "regress" is for features of pictures; learned rows stand for them, and no connector'
            raise RecipeError(message, hint="encoder = …, and leave the connector out")
        modulated = port.timestep == "modulation"
        if modulated and recipe.backbones[backbone_of(recipe, port)].modulation == "none":
            raise RecipeError(f"{here}.timestep: its network has no modulation", hint='modulation = "adaln-zero" on the network, or "add"')
        if port.by_scale or (port.objective is not None and port.objective.kind == "next-scale"):
            _check_scales(here, recipe, port)
        if port.objective is not None and port.objective.kind == "denoise" and port.timestep == "none":
            raise RecipeError(f"{here}.timestep: a port that denoises must say how the noise level enters", hint='timestep = "add"')
        _check_tokenwise(here, port)
        if (
            port.objective is not None
            and port.objective.kind in ("denoise", "masked-denoise")
            and (port.objective.schedule, port.objective.predict) == ("linear", "noise")
        ):
            message = f"{here}.objective: on the linear path, predicted noise says nothing about the picture at t = 1"
            raise RecipeError(message, hint='predict = "velocity", or schedule = "cosine"')
        needed = {Content.TOKEN_IDS: "tokenizer", Content.CODES: "autoencoder"}.get(port.content)
        if needed and not getattr(port, needed):
            raise RecipeError(f'{here}.{needed}: content "{port.content}" needs one')
        owner = vocabulary_owner(recipe, name)
        if port.objective is not None and recipe.ports[owner].head is None:
            raise RecipeError(
                f"{here}.head: an objective needs a head" + (f", on ports.{owner}, which owns the vocabulary" if owner != name else "")
            )
    for name, task in recipe.tasks.items():
        for segment in task.flat():
            _known(segment.port, recipe.ports, f"tasks.{name}.segments.port")
    for name, task in recipe.tasks.items():
        _check_task(recipe, name, task)
    names = [phase.name for phase in recipe.phases]
    for phase in recipe.phases:
        here = f"phases.{phase.name}"
        if names.count(phase.name) > 1:
            raise RecipeError(f"{here}: two phases have this name")
        for task_name in phase.tasks:
            _known(task_name, recipe.tasks, f"{here}.tasks")
        if phase.batch_size is not None and phase.batch_tokens is not None:
            raise RecipeError(f"{here}: batch_size and batch_tokens are both written; keep one")
        for task_name in phase.tasks if phase.batch_size is None and phase.stage != "pretrain-tokenizer" else ():
            if not any(recipe.ports[segment.port].enters == "sequence" for segment in recipe.tasks[task_name].flat()):
                raise RecipeError(f"{here}.batch_size: the task '{task_name}' has no tokens to count", hint="write batch_size")
    for name in recipe.sample:
        _known(name, recipe.ports, f"sample.{name}")
        objective = recipe.ports[name].objective
        sampler = recipe.sample[name].kind
        if objective is None:
            raise RecipeError(f"sample.{name}: the port has no objective, it can only be read")
        if sampler not in objective.samplers:
            raise RecipeError(
                f"sample.{name}.sampler: '{sampler}' does not fit the objective '{objective.kind}'",
                hint=nearest("", objective.samplers),
            )
        drawing = sorted({"temperature", "top_k", "top_p", "max_tokens"} & recipe.sample[name].model_fields_set)
        if objective.kind == "next-feature" and drawing:
            raise RecipeError(f"sample.{name}.{drawing[0]}: features are regressed, nothing is drawn from them", hint="leave it out")
    _check_guidance(recipe)


def _check_between_networks(recipe: Recipe, here: str, port: Port) -> None:
    """Queries are learned rows; hidden rows are those of another network, which runs before this one."""
    if port.content in FROM_NO_FIELD and (port.enters != "sequence" or port.objective is not None):
        raise RecipeError(f'{here}: content "{port.content}" enters a sequence and is only read', hint="no objective")
    if (port.content == Content.QUERIES) != bool(port.count):
        raise RecipeError(f'{here}.count: content "queries" needs a number of them, and nothing else has one', hint="count = 64")
    if port.content == Content.QUERIES and port.connector is not None:
        raise RecipeError(f"{here}.connector: queries are learned at the network's own width", hint="leave it out")
    if (port.content == Content.HIDDEN) != bool(port.of):
        raise RecipeError(f'{here}.of: content "hidden" names the ports whose rows it reads, and nothing else does', hint='of = "queries"')
    if not port.of:
        return
    if port.connector is None:
        raise RecipeError(f"{here}.connector: hidden rows need one, from their network's width to this one's", hint='{ kind = "linear" }')
    for name in port.of:
        _known(name, recipe.ports, f"{here}.of")
    networks = {backbone_of(recipe, recipe.ports[name]) for name in port.of}
    order, own = list(recipe.backbones), backbone_of(recipe, port)
    if len(networks) > 1 or any(recipe.ports[name].enters != "sequence" for name in port.of):
        raise RecipeError(f"{here}.of: {', '.join(port.of)} are not rows of one network")
    if order.index(networks.pop()) >= order.index(own):
        raise RecipeError(f"{here}.of: it must read a network that stands before backbones.{own} in the file, where they run in order")


def _check_tokenwise(here: str, port: Port) -> None:
    """Latents that are hidden need a head that denoises them one by one, and features that are regressed an encoder that makes them."""
    kind = port.objective.kind if port.objective is not None else ""
    head, connector = (part.kind if part is not None else "" for part in (port.head, port.connector))
    if kind == "masked-denoise" and (port.content != Content.LATENTS or port.enters != "sequence"):
        raise RecipeError(f"{here}.objective: 'masked-denoise' hides latents of a sequence, not \"{port.content}\"")
    if kind == "masked-denoise" and port.timestep != "none":
        raise RecipeError(
            f"{here}.timestep: the noise level of 'masked-denoise' enters its head alone, found \"{port.timestep}\"", hint='"none"'
        )
    if kind and (kind == "masked-denoise") != (head == "diffusion-mlp"):
        raise RecipeError(
            f"{here}.head: '{head}' does not fit the objective '{kind}'", hint="diffusion-mlp goes with masked-denoise, and only it"
        )
    if connector == "masked-encoder":
        decoder = getattr(port.head, "decoder", None)
        if kind != "masked-denoise":
            raise RecipeError(f"{here}.connector: 'masked-encoder' goes with the objective masked-denoise, found '{kind or 'none'}'")
        if decoder is not None and decoder.width != port.connector.width:
            message = (
                f"{here}.head.decoder.width: {decoder.width}, but it adds to what the connector keeps, which is {port.connector.width} wide"
            )
            raise RecipeError(message, hint=f"width = {port.connector.width}")
    if kind == "next-feature":
        if port.content != Content.FEATURES or not port.encoder or port.tokenizer or port.enters != "sequence" or port.select != "tokens":
            raise RecipeError(f"{here}.objective: 'next-feature' predicts the tokens an encoder makes of a picture, in a sequence")
        if port.mask != MaskKind.CAUSAL:
            raise RecipeError(
                f'{here}.mask: features written one after another must not see those to come, found "{port.mask}"', hint='"causal"'
            )


def _check_rows(here: str, port: Port) -> None:
    """A picture with a marker after each row is read and written row by row, left to right."""
    if port.content != Content.CODES or port.mask != MaskKind.CAUSAL:
        raise RecipeError(f"{here}.markers.row: only codes in a causal block end their rows with a token", hint='mask = "causal"')
    if port.objective is not None and port.objective.kind != "next-token":
        raise RecipeError(f"{here}.markers.row: does not go with the objective '{port.objective.kind}'", hint="next-token")
    if port.positions != PositionKind.SEQUENTIAL or port.grid_embedding != "none":
        raise RecipeError(f"{here}.markers.row: the markers say where a row ends; positions and grid_embedding must not say it again")


def _check_scales(here: str, recipe: Recipe, port: Port) -> None:
    """A picture that is drawn scale by scale is shown to the network as the sum of its scales, each of which sees itself whole."""
    if not port.by_scale:
        raise RecipeError(f"{here}.connector: next-scale reads sums of scales", hint='connector = { kind = "embedding-scales" }')
    if port.content != Content.CODES or port.enters != "sequence":
        raise RecipeError(f'{here}.connector: "embedding-scales" takes codes of a sequence, not "{port.content}"')
    if port.objective is not None and port.objective.kind != "next-scale":
        raise RecipeError(f"{here}.objective: '{port.objective.kind}' does not go with \"embedding-scales\"", hint="next-scale")
    if port.autoencoder in recipe.autoencoders:
        quantizer = getattr(recipe.autoencoders[port.autoencoder], "quantizer", None)
        if not isinstance(quantizer, MultiScaleConfig):
            found = quantizer.kind if isinstance(quantizer, PartConfig) else "none"
            raise RecipeError(
                f"autoencoders.{port.autoencoder}.quantizer: {here} needs the codes of scales, found '{found}'", hint="multi-scale"
            )
    if port.mask != MaskKind.FULL:
        raise RecipeError(f"{here}.mask: all codes of a scale are drawn at once, so it sees itself whole", hint='"full"')
    if port.vocabulary:
        raise RecipeError(f"{here}.vocabulary: an embedding of scales has no rows to share", hint="leave it out")
    if port.grid_embedding != "none":
        raise RecipeError(f"{here}.grid_embedding: an embedding of scales knows its places already", hint='"none"')
    if port.markers.inside and (port.markers.before or port.markers.after):
        raise RecipeError(f"{here}.markers.inside: each scale is a block of its own, markers stand outside", hint="inside = false")


def _check_task(recipe: Recipe, name: str, task: Task) -> None:
    previous: SegmentSpec | None = None
    probabilities: dict[str, float] = {}
    seen: set[str] = set()
    for segment in task.flat():
        here = f"tasks.{name}.segments"
        port = recipe.ports[segment.port]
        if port.content in FROM_NO_FIELD:
            if segment.field or segment.text:
                raise RecipeError(f"{here}: '{segment.port}' ({port.content}) is made of no field and no text", hint="leave both out")
            if port.of and not seen.intersection(port.of):
                raise RecipeError(f"{here}: '{segment.port}' reads {' and '.join(port.of)}, which must stand before it")
        elif bool(segment.field) == bool(segment.text):
            raise RecipeError(f"{here}: a segment has either a field or a text ({segment.port})")
        if segment.text and not port.tokenizer:
            raise RecipeError(f"{here}: a literal text needs a port with a tokenizer, '{segment.port}' has none")
        if segment.role == Role.TARGET and port.objective is None and port.enters == "sequence":
            raise RecipeError(f"{here}: '{segment.port}' is a target but ports.{segment.port} has no objective")
        if segment.cond_dropout_prob and port.null_condition == "pad":
            if port.content != Content.TOKEN_IDS:
                raise RecipeError(f'ports.{segment.port}.null_condition: only token ids can be padded, not "{port.content}"')
            if segment.role == Role.TARGET:
                raise RecipeError(f"{here}: '{segment.port}' is a target, and <pad> in its place would be learned", hint='"empty"')
        mask = segment.mask or port.mask
        if port.by_scale and (segment.merge or mask != MaskKind.FULL):
            raise RecipeError(f"{here}: the scales of '{segment.port}' are blocks of their own", hint="leave out merge and mask")
        if previous is not None:
            before = previous.mask or recipe.ports[previous.port].mask
            if segment.merge and before != mask:
                raise RecipeError(
                    f"{here}: '{segment.port}' ({mask}) is merged into a block of '{previous.port}' ({before}); give both the same mask"
                )
            shifted = port.objective is not None and port.objective.kind in ("next-token", "next-feature") and segment.role == Role.TARGET
            last = recipe.ports[previous.port]
            if shifted and segment.port in last.hidden_from and not last.markers.after and not port.markers.before:
                raise RecipeError(
                    f"{here}: a next-token target of '{segment.port}' would be read at rows of '{previous.port}', which are hidden from it",
                    hint=f"give ports.{previous.port} an end marker",
                )
            if shifted and before.is_isolated and not segment.merge and not port.markers.before:
                raise RecipeError(
                    f"{here}: a next-token target cannot follow an isolated block, whose rows it may not see", hint="give it a start marker"
                )
        if segment.cond_dropout_prob and probabilities.setdefault(segment.group, segment.cond_dropout_prob) != segment.cond_dropout_prob:
            raise RecipeError(f"{here}: the drop group '{segment.group}' has two probabilities in one task")
        previous = segment
        seen.add(segment.port)
    if task.then:
        _known(task.then, recipe.tasks, f"tasks.{name}.then")
        written = [s for s in task.flat() if s.role == Role.TARGET and recipe.ports[s.port].content == Content.FEATURES]
        encoders = {recipe.ports[s.port].encoder for s in written}
        if not any(recipe.ports[s.port].encoder in encoders for s in recipe.tasks[task.then].flat() if s.role == Role.CONTEXT):
            raise RecipeError(f"tasks.{name}.then: '{task.then}' reads no features that '{name}' writes")
    for objective in task.objectives:
        _known(objective, recipe.objectives, f"tasks.{name}.objectives")


def _check_guidance(recipe: Recipe) -> None:
    trained = {task for phase in recipe.phases for task in phase.tasks}
    for name, sampler in recipe.sample.items():
        writes = [task for task, spec in recipe.tasks.items() if any(s.port == name and s.role == Role.TARGET for s in spec.flat())]
        groups = {s.group for task in writes for s in recipe.tasks[task].flat() if s.cond_dropout_prob > 0}
        for term in sampler.guidance.terms if sampler.guidance is not None else ():
            for group in term.drop:
                _known(group, tuple(sorted(groups)), f"sample.{name}.guidance.terms.drop")
        dropped = {s.group for task in writes if task in trained for s in recipe.tasks[task].flat() if s.cond_dropout_prob > 0}
        if writes and not dropped and sampler.guidance_scale != 1.0:
            raise RecipeError(
                f"sample.{name}.guidance_scale: no task that writes '{name}' ever drops its condition",
                hint="give a context segment cond_dropout_prob = 0.1",
            )


def _check_name(name: str, where: str) -> None:
    """Names are steps of addresses, and names of modules."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise RecipeError(
            f"{where}: {shown(name)} cannot be a name", hint="letters, digits, - and _, and no word of torch's such as 'keys'"
        )


def _known(name: str, choices: Mapping[str, Any] | tuple[str, ...], where: str) -> None:
    if name not in choices:
        raise RecipeError(f"{where}: there is no '{name}'", hint=nearest(name, [choice for choice in choices if choice]))


def backbone_of(recipe: Recipe, port: Port) -> str:
    """The name of the network a port belongs to: written, or the only one."""
    return port.backbone or next(iter(recipe.backbones), "")


def vocabulary_owner(recipe: Recipe, name: str) -> str:
    """The port that holds the embedding and head for `name`: the first of those that share its vocabulary."""
    vocabulary = recipe.ports[name].vocabulary
    if not vocabulary:
        return name
    return next(other for other, port in recipe.ports.items() if port.vocabulary == vocabulary)
