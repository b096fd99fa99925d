"""What a metric is, and what it gives back.

A metric looks at each sample once, and keeps of it two things: what the model made (`look`: an answer, what a reader finds in the
drawn picture, features) and what it should have made (`expect`). Scores come from the two lists side by side, so a control is only
another pairing: the *shuffled* one holds what the model made against what another prompt asked for. A score is a number, how many
things it counts, an interval, and the protocol: everything that must be equal before two such numbers may stand in one column.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field
from torch import Tensor

from stages.data.sample import Sample
from stages.documents import Document, check, shown, sound
from stages.errors import DataError

Fields = Mapping[str, Any]  # the fields of one sample; "__key__" is its key


@dataclass(frozen=True)
class Score:
    """One number. `n` counts what was judged (samples, objects, questions, tokens), `samples` how many samples that came from.

    `chance` is what answering without looking reaches, where that is known; `interval` is 95 %.
    """

    category: str
    value: float
    n: int
    samples: int
    interval: tuple[float, float] | None = None
    chance: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """Real pictures to measure a distance to: the fingerprint of their shards, their features (n, d)."""

    fingerprint: str
    features: Tensor


@dataclass(frozen=True)
class Setting:
    """What the metrics of one evaluation share: the seed of the bootstrap, the name of the network that compares pictures
    (a key of FEATURES, or "best"), the real pictures, and the size of the codebook, where there are such."""

    seed: int = 0
    features: str = "best"
    reference: Reference | None = None
    codebook_size: int | None = None


class Metric(Protocol):
    """One file of stages/metrics/ per metric; METRICS lists them."""

    paired: bool  # False where pairing with another prompt makes no sense (distances between sets, codebook usage)

    def __init__(self, setting: Setting) -> None: ...

    @staticmethod
    def applies(sample: Fields, setting: Setting) -> bool:
        """Whether such a sample has what the metric judges."""
        ...

    def look(self, sample: Fields) -> Any:
        """What to remember of the model's output: small, and all the expensive work. Raises DataError for a malformed field."""
        ...

    def expect(self, sample: Fields) -> Any:
        """What to remember of the truth."""
        ...

    def scores(self, seen: list[Any], expected: list[Any]) -> list[Score]:
        """The numbers over at least one sample; seen[i] was made for the prompt of expected[i], or is judged as if it had been."""
        ...


class Meta(Document):
    """What is read of the field `meta`."""

    prompt_key: str = ""
    tasks: list[str] = Field(default=[])


class Question(Document):
    """An entry of `sample.qa`."""

    question: str
    answer: str
    truth: str
    type: str


class Likelihood(Document):
    """An entry of `sample.likelihood`: how well a true text was predicted."""

    task: str
    nats: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Annotated[int, Field(ge=1, lt=2**63)]


class Called(Document):
    """An entry of `sample.tools`: a call, and what came of it."""

    ok: bool
    kind: str
    result: str


class Turn(Document):
    """An entry of `sample.steps`: what was called, and what should have been."""

    call: str
    truth: str


class Judged(Document):
    """The fields that metrics and reports look into, where a sample has them. Scenes check themselves (`Scene.from_json`)."""

    plan: str = ""
    sample_caption: str = Field(default="", alias="sample.caption")
    sample_plan: str = Field(default="", alias="sample.plan")
    sample_qa: list[Question] = Field(default=[], alias="sample.qa")
    sample_likelihood: list[Likelihood] = Field(default=[], alias="sample.likelihood")
    sample_tools: list[Called] = Field(default=[], alias="sample.tools")
    sample_steps: list[Turn] = Field(default=[], alias="sample.steps")


PICTURES = ("image", "sample.image", "sample.picture", "sample.result")


def check_fields(fields: Fields, entry: Sample) -> None:
    """Raises DataError where a field that metrics or reports look into is not what its name says. entry: the sample, for the message."""
    where = f"{entry.source}: {entry.key}"
    check(fields, where, Judged)
    for name in PICTURES:
        value = fields.get(name)
        if value is not None and not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3):
            found = f"an array {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else shown(value)
            raise DataError(f"{where}: field '{name}': expected a picture, found {found}")


def about(sample: Fields) -> dict[str, Any]:
    """What `meta` says of a sample; nothing where it is no object, or what it says has another type, as in sets that others made."""
    return sound(sample.get("meta"), Meta)


def prompt_key(sample: Fields) -> str:
    """The key of the prompt a sample answers: its own, unless it is one of several samples for one prompt."""
    return about(sample).get("prompt_key") or sample["__key__"]
