"""What every part's config has in common: it is data, frozen, and rejects keys it does not know and numbers that mean nothing.

A recipe may come from a stranger, with a checkpoint, so every number has bounds, and they stand where the key is declared: below, what
has no meaning is left out (a width of 0, a weight of -1); above, what no published system comes near and no machine could hold. A test
asks every config for them, so a key of a new part cannot be without.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.documents import shown
from stages.errors import RecipeError, nearest

MAX_ENTRIES = 2**22  # of a vocabulary; the largest have 300,000
MAX_PIXELS = 8192  # along a side of a picture
MAX_NAMES = 256  # entries of one list or table of names: ports, tasks, phases, segments, experts

Count = Annotated[int, Field(ge=1, le=1024)]  # of what is built one by one: layers, heads, levels, experts
Even = Annotated[int, Field(ge=0, le=65_536, multiple_of=2)]  # of channels that turn in pairs
Size = Annotated[int, Field(ge=1, le=65_536)]  # of a vector: widths, channels
Pixels = Annotated[int, Field(ge=1, le=MAX_PIXELS)]  # along a side of a picture, or of a patch
Length = Annotated[int, Field(ge=1, le=65_536)]  # tokens of one thing: queries, latents, a text that is written
Entries = Annotated[int, Field(ge=1, le=MAX_ENTRIES)]  # of a vocabulary
Rounds = Annotated[int, Field(ge=1, le=10_000)]  # of a sampler
Updates = Annotated[int, Field(ge=0, le=10**9)]  # of the weights: how long training takes, or waits for something
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a loss, of a task
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]  # dropout, decay, betas
Epsilon = Annotated[float, Field(gt=0, le=1)]  # added before a division
Ratio = Annotated[float, Field(gt=0, le=64)]  # hidden width of an MLP over its width
Positive = Annotated[float, Field(gt=0, le=1e6)]
Temperature = Annotated[float, Field(ge=0, le=1e6)]
Names = Annotated[tuple[str, ...], Field(max_length=MAX_NAMES)]
Scale = Annotated[float, Field(ge=-1e6, le=1e6)]  # may be negative: guidance, a shift


class Strict(BaseModel):
    """Frozen; an unknown key, a number that is not finite and a text without end are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=10_000)


class PartConfig(Strict):
    """Settings of one part. Subclasses declare `kind: Literal["name"] = "name"` and the part's own keys, each number with its bounds,
    and have a `build(...)` that returns the module. A docstring names the paper."""

    kind: str


Config = TypeVar("Config", bound=PartConfig)

TOLD = {
    "missing": "is missing",
    "extra_forbidden": "there is no such key",
    "finite_number": "expected a finite number",
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected at most {le}",
    "less_than": "expected less than {lt}",
    "multiple_of": "expected a multiple of {multiple_of}",
    "too_short": "expected at least {min_length} entries",
    "too_long": "expected at most {max_length} entries",
    "string_too_long": "expected at most {max_length} letters",
    "literal_error": "expected {expected}",
    "enum": "expected {expected}",
    "value_error": "{error}",
}
EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text", "tuple": "a list", "list": "a list"}
TABLES = ("dict_type", "model_type", "model_attributes_type", "mapping_type", "is_instance_of")


def told(problem: Mapping[str, Any]) -> str:
    """One of pydantic's complaints in our words, with what was found."""
    kind = problem["type"]
    if kind in TOLD:
        text = TOLD[kind].format(**problem.get("ctx", {}))
    else:
        text = f"expected {'a table' if kind in TABLES else EXPECTED.get(kind.split('_')[0], 'something else')}"
    return text if kind in ("missing", "extra_forbidden", "value_error") else f"{text} (found {shown(problem['input'])})"


TRIED = re.compile(r"constrained-\w+|function-\S+|int|float|bool|str|\w+\[.*|[A-Z]\w*(Spec|Config)")


def is_tried(step: int | str) -> bool:
    """Whether a step of pydantic's path is no key but a type that it tried there."""
    return isinstance(step, str) and TRIED.fullmatch(step) is not None


def first_problem(error: ValidationError) -> tuple[Mapping[str, Any], list[int | str]]:
    """What to tell of a ValidationError, and the keys that lead there. Where several types were tried, that which went furthest."""
    problems = error.errors()
    place = list(itertools.takewhile(lambda step: not is_tried(step), problems[0]["loc"]))
    same = [problem for problem in problems if list(problem["loc"][: len(place)]) == place]
    furthest = max(same, key=lambda problem: len(problem["loc"]))
    return furthest, [step for step in furthest["loc"] if not is_tried(step)]


def whole_heads(width: int, heads: int) -> None:
    """ValueError where a width does not divide into heads."""
    if width % heads:
        raise ValueError(f"heads must divide the width {width}, found {heads}")


@contextlib.contextmanager
def built_at(address: str) -> Iterator[None]:
    """A part that cannot be built with these numbers (ValueError) is a RecipeError that names its address."""
    try:
        yield
    except ValidationError as error:
        problem, place = first_problem(error)
        raise RecipeError(f"{'.'.join(map(str, [address, *place]))}: {told(problem)}") from None
    except ValueError as error:
        raise RecipeError(f"{address}: {error}") from None


def parse_part(family: Mapping[str, type[Config]], table: Any, address: str) -> Config:
    """The config a recipe table describes: its `kind` picks the member of the family, the other keys are the member's own.

    Raises RecipeError that names the address, the key and the nearest valid name.
    """
    if not isinstance(table, Mapping):
        raise RecipeError(f'{address}: expected a table such as {{ kind = "{next(iter(family))}" }}, found {shown(table)}')
    if "kind" not in table:
        raise RecipeError(f"{address}: `kind` is missing", hint=nearest("", family))
    kind = table["kind"]
    if not isinstance(kind, str) or kind not in family:
        raise RecipeError(f"{address}.kind: there is no {shown(kind)}", hint=nearest(str(kind)[:80], family))
    member = family[kind]
    for key in table:
        if key not in member.model_fields:
            raise RecipeError(f"{address}.{key}: '{kind}' has no such key", hint=nearest(key, member.model_fields))
    with built_at(address):
        try:
            return member(**table)
        except RecipeError as error:  # a part within this one
            raise RecipeError(f"{address}.{error.message}", hint=error.hint) from None
