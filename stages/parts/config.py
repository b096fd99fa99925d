"""What every part's config has in common: it is data, frozen, and rejects keys it does not know."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.documents import shown
from stages.errors import RecipeError, nearest


class PartConfig(BaseModel):
    """Settings of one part. Subclasses declare `kind: Literal["name"] = "name"` and the part's own keys,
    and have a `build(...)` that returns the module. A docstring names the paper."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str


Config = TypeVar("Config", bound=PartConfig)


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
    try:
        return member(**table)
    except RecipeError as error:  # a part within this one
        raise RecipeError(f"{address}.{error.message}", hint=error.hint) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([address, *map(str, first["loc"])])
        raise RecipeError(f"{where}: {first['msg']} (found {shown(first['input'])})") from None
