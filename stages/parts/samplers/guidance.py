"""Classifier-free guidance (arXiv:2207.12598), with one condition or several: which passes to run, and how to combine them.

`guided = uncond + scale · (cond - uncond)`: 1 is off, 0 unconditional. With several groups of conditions a term says which groups are
dropped in a pass and how far to go. *nested* starts from the full condition and pulls it away from each term's pass in turn (BAGEL,
arXiv:2505.14683); *additive* starts at the first term's pass and adds scaled differences between neighbours (InstructPix2Pix,
arXiv:2211.09800). Predictions of noise, clean data and velocity are affine in each other at a fixed noisy input, so all are guided alike;
so are logits.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stages.parts.config import MAX_NAMES, Fraction, Names, PartConfig, Scale, Strict

Renorm = Literal["none", "global", "channel"]


def guided(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale · (cond - uncond); exactly `cond` at scale 1 and exactly `uncond` at scale 0.

    Both must be finite: logits are guided first, and ids ruled out with -inf after.
    """
    return torch.lerp(uncond, cond, scale)


def renormalised(value: Tensor, full: Tensor, renorm: Renorm) -> Tensor:
    """`value` scaled down, never up, to the norm of `full`: over each sample (`global`) or over the last axis (`channel`)."""
    if renorm == "none":
        return value
    axes = tuple(range(1, value.dim())) if renorm == "global" else (-1,)
    ratio = torch.linalg.vector_norm(full, dim=axes, keepdim=True) / torch.linalg.vector_norm(value, dim=axes, keepdim=True).clamp(
        min=1e-12
    )
    return value * ratio.clamp(max=1.0)


class GuidanceTerm(Strict):
    """One pass: the groups it drops, and the scale of what it contributes."""

    drop: Names
    scale: Scale = 1.0


class GuidanceConfig(PartConfig):
    """Terms in order; active for noise levels t with interval[0] < t <= interval[1] (arXiv:2404.07724)."""

    kind: Literal["nested", "additive"] = "nested"
    terms: tuple[GuidanceTerm, ...] = Field(min_length=1, max_length=MAX_NAMES)
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    renorm: Renorm = "none"


@dataclass(frozen=True)
class Guide:
    """Guidance for one task: run `passes(t)`, give their outputs to `combine` in the same order.

    `terms` are (index into the passes, scale); pass 0 drops nothing.
    """

    kind: Literal["nested", "additive"]
    drops: tuple[frozenset[str], ...]
    terms: tuple[tuple[int, float], ...]
    interval: tuple[float, float]
    renorm: Renorm

    def passes(self, t: float | None = None) -> tuple[frozenset[str], ...]:
        """The sets of groups to drop, one network pass each; the first is the full condition. t is None where there is no noise level."""
        active = t is None or self.interval[0] < t <= self.interval[1]
        return self.drops if active else self.drops[:1]

    def after(self, groups: Collection[str]) -> "Guide":
        """The guide for what stands after conditions of these groups only: a nested term that drops none of them is left out, since its
        pass would count the full condition twice. Additive terms cancel by themselves."""
        if self.kind == "additive":
            return self
        return replace(self, terms=tuple(term for term in self.terms if self.drops[term[0]] & set(groups)))

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The guided prediction from one output (b, ...) per pass; a single output is returned as it is."""
        full = outputs[0]
        if len(outputs) == 1:
            return full
        if self.kind == "nested":
            value = full
            for index, scale in self.terms:
                value = guided(outputs[index], value, scale)
        else:
            previous = value = outputs[self.terms[0][0]]
            for index, scale in self.terms[1:]:
                value = value + scale * (outputs[index] - previous)
                previous = outputs[index]
        return renormalised(value, full, self.renorm)


class SamplerConfig(PartConfig):
    """What every sampler has: `guidance_scale` drops all conditions together; `guidance` says it term by term, instead."""

    guidance_scale: Scale = 1.0
    guidance: GuidanceConfig | None = None

    @model_validator(mode="after")
    def _one_guidance(self) -> Self:
        if self.guidance is not None and self.guidance_scale != 1.0:
            raise ValueError("write guidance_scale or guidance, not both")
        return self

    def guide(self, groups: Collection[str]) -> Guide:
        """Guidance for a task whose conditions form `groups`.

        A term that drops only groups which the task does not have is left out; otherwise nested guidance would count the full condition
        twice. A nested term of scale 1 changes nothing and costs no pass.
        """
        if self.guidance is None:
            terms = (GuidanceTerm(drop=tuple(sorted(groups)), scale=self.guidance_scale),)
            config = GuidanceConfig(kind="nested", terms=terms)
        else:
            config = self.guidance
        drops: list[frozenset[str]] = [frozenset()]
        kept: list[tuple[int, float]] = []
        for term in config.terms:
            drop = frozenset(term.drop) & frozenset(groups)
            if config.kind == "nested" and (not drop or term.scale == 1.0):
                continue
            if config.kind == "additive" and term.drop and not drop:
                continue
            if drop not in drops:
                drops.append(drop)
            kept.append((drops.index(drop), term.scale))
        if not any(index for index, _ in kept):
            drops = drops[:1]
        return Guide(kind=config.kind, drops=tuple(drops), terms=tuple(kept), interval=config.interval, renorm=config.renorm)
