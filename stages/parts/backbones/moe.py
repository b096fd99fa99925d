"""A mixture of experts that learns where to send each token, in the place of a block's MLP.

A router scores the experts for each token, the `top_k` best compute, and their outputs are added with the router's probabilities,
which are made to sum to one again (Mixtral, arXiv:2401.04088, section 2.1). A single best one keeps its probability as it is (Switch
Transformer, arXiv:2101.03961, equation 2): made to one it would teach the router nothing. Tokens are sorted by expert, each expert
multiplies its own rows once, and no token is dropped however many choose the same expert. `shared` experts see every token
(DeepSeekMoE, arXiv:2401.06066, section 3.2).

Left alone, a router sends everything to the few experts that were good first. The balance loss (Switch Transformer, section 2.2) makes
it pay for that: E · Σ f_e · P_e with f_e the fraction of tokens sent to expert e and P_e the mean of its probability. It is `top_k`
when all are used alike, and E when `top_k` is 1 and one expert gets everything.

Shape letters: n rows, t tokens (rows without padding), d width, k = top_k, E experts.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from stages import ranks
from stages.parts.config import Count, PartConfig, Weight
from stages.parts.layers import SwiGLU, init_linear

ROUTER_STD = 0.02  # of the router's first weights, as the published Mixtral: nearly equal probabilities


class MoEConfig(PartConfig):
    """`experts` SwiGLU networks of `mlp_ratio` · width hidden units, of which each token uses `top_k`, and `shared` that all tokens use.

    balance_weight: of the balance loss, averaged over layers, in the loss that is differentiated (Switch Transformer: 0.01).
    """

    kind: Literal["moe"] = "moe"
    experts: Count
    top_k: Count
    shared: int = Field(default=0, ge=0, le=1024)
    balance_weight: Weight = 0.01

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {self.experts} experts")
        return self


class Load(NamedTuple):
    """What a batch gave the experts of one layer. Both float32 (E,)."""

    counts: Tensor  # tokens sent to each, without a gradient; they sum to k · t
    probabilities: Tensor  # the router's, summed over tokens; they sum to t


class MoE(nn.Module):
    """x (n, d) and which rows are tokens, bool (n,) → (n, d), and the load. Padding rows are not routed, nor counted."""

    def __init__(self, config: MoEConfig, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(dim, config.experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden, bias) for _ in range(config.experts))
        self.shared = SwiGLU(dim, config.shared * hidden, bias) if config.shared else None

    def init_weights(self, generator: Generator, out_std: float) -> None:
        init_linear(self.router, generator, std=ROUTER_STD)
        for expert in [*self.experts, *([self.shared] if self.shared is not None else [])]:
            assert isinstance(expert, SwiGLU)
            expert.init_weights(generator, out_std)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Load]:
        rows = real.nonzero().squeeze(1)
        probabilities = self.route(x.index_select(0, rows))  # (t, E)
        weights, chosen = probabilities.topk(self.config.top_k, dim=1)  # (t, k)
        if self.config.top_k > 1:
            weights = weights / weights.sum(dim=1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # of the k · t copies: those of the first expert, of the second, …
        counts = torch.bincount(chosen.flatten(), minlength=self.config.experts)
        source = rows.index_select(0, order // self.config.top_k)
        shares = x.index_select(0, source).split(counts.tolist())
        # while training every expert runs, also on no token: ranks average the gradients of the same weights
        done = [expert(own) for expert, own in zip(self.experts, shares, strict=True) if len(own) or torch.is_grad_enabled()]
        weighted = torch.cat([x[:0], *done]) * weights.flatten().index_select(0, order)[:, None]
        base = self.shared(x) if self.shared is not None else torch.zeros_like(x)
        return base.index_add(0, source, weighted.to(base.dtype)), Load(counts.float(), probabilities.sum(dim=0))

    def route(self, tokens: Tensor) -> Tensor:
        """(t, d) → the probability of each expert (t, E), in float32 whatever the rest computes in (Switch Transformer, section 2.4)."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.router.weight.float()).softmax(dim=1)


def balance(loads: Sequence[Load], *, everywhere: bool = False, counted: bool = True) -> tuple[Tensor, float]:
    """The balance loss of each layer times its tokens, summed, and the sum of tokens: their quotient is the mean over layers.

    A product of two means over a batch is not the mean of the products over its parts. With `everywhere` the fractions f are those of
    all ranks' tokens, and the totals of the ranks add up to that of the whole batch; every rank must then ask, one whose tokens are not
    to be `counted` too.
    """
    counts = torch.stack([load.counts for load in loads]) * counted  # (layers, E)
    probabilities = torch.stack([load.probabilities for load in loads]) * counted
    tokens = probabilities.detach().sum(dim=1)
    both = torch.cat([counts, tokens[:, None]], dim=1).cpu()
    sent, of = (ranks.summed(both) if everywhere else both).to(counts).split([counts.shape[1], 1], dim=1)
    fractions = sent / of.clamp_min(1.0)
    return counts.shape[1] * (fractions * probabilities).sum(), float(tokens.sum())
