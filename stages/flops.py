"""How much a training step computes: floating-point operations, counted from the batch and its mask.

A matrix costs two operations a weight for each row that passes it, and twice that again on the way back ("Scaling Laws for Neural Language
Models", arXiv:2001.08361, section 2.1: 6 · N · tokens); a pair of a query and a key that it may see costs 4 · width in each layer, and
twice that again on the way back. What makes systems different is counted as it is: rows of hard-routed experts by their expert, of learned
ones by `top_k`, heads only where loss is carried and over a port's own ids, pictures that an encoder sees, and of all pairs those that the
mask allows. Norms, activations, softmax, lookups, the optimizer and padding are not counted; of masked codes all count as judged.

    counter = FlopCounter(model, phase)      the model may be on the meta device
    counter.of(batch)                        {"backbones.lm": 1.2e9, "backbones.lm.attention": 3.4e8, "ports.text": …}
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.anatomy import learns
from stages.model import Model
from stages.parts.backbones import MoE, Transformer
from stages.parts.backbones.modulation import Modulation
from stages.parts.connectors import Embedding
from stages.parts.heads.linear import LinearHead
from stages.recipe import Phase, Port, backbone_of, vocabulary_owner
from stages.sequence.segment import Batch, Layout, PortRows


def allowed_pairs(layout: Layout) -> int:
    """How many (query, key) pairs `may_attend` allows, padding apart, without the table of all pairs.

    A token sees its block, or its past in it, and every earlier block of its sample that is not isolated.
    """
    real = layout.sample_id >= 0
    if not bool(real.any()):
        return 0
    sample, block, index, full, isolated = (
        values[real].long() for values in (layout.sample_id, layout.block_id, layout.index, layout.full, layout.isolated)
    )
    span = int(block.max()) + 1
    blocks, of, sizes = torch.unique(sample * span + block, return_inverse=True, return_counts=True)
    first = torch.full_like(blocks, int(index.max())).scatter_reduce_(0, of, index, "amin")
    own = torch.where(full.bool(), sizes[of], index - first[of] + 1)
    shown = sizes * (1 - torch.zeros_like(blocks).scatter_(0, of, isolated))
    before = shown.cumsum(0) - shown  # tokens of all earlier blocks, those of other samples included
    start = before[torch.searchsorted(blocks, blocks // span * span)]
    return int(own.sum() + ((before - start) * sizes).sum())


class FlopCounter:
    """Counts for one model in one phase: what does not learn has no gradient of its own, and an encoder that does not learn none at all."""

    def __init__(self, model: Model, phase: Phase) -> None:
        self.model, self.recipe, self.phase = model, model.recipe, phase
        self._learning = {name for name, _ in model.named_parameters() if learns(phase, name)}
        self._pictures = {name: self._picture(name) for name in self.recipe.encoders if not self._port_of(name).tokenizer}
        self._stacks = {name: self._stack(name) for name in self.recipe.backbones}
        self._connectors = {name: self._matrices(f"ports.{name}.connector") for name in self.recipe.ports}
        self._timesteps = {name: self._matrices(f"ports.{name}.timestep") for name in self.recipe.ports}

    def of(self, batch: Batch) -> dict[str, float]:
        """Operations of one step, forward and backward, by the address of what computes."""
        counts: dict[str, float] = defaultdict(float)
        for name, (costs, pair) in self._stacks.items():
            layout = batch.layouts.get(name if len(self._stacks) > 1 else "")
            if layout is None or not bool((layout.sample_id >= 0).any()):
                continue
            tokens = torch.bincount(layout.expert_id[layout.sample_id >= 0]).tolist()
            counts[f"backbones.{name}"] += sum(cost * rows for cost, rows in zip(costs, tokens, strict=False))
            counts[f"backbones.{name}.attention"] += pair * allowed_pairs(layout)
        for name, rows in batch.ports.items():
            self._count_port(name, self.recipe.ports[name], rows, counts)
        return {address: count for address, count in counts.items() if count}

    def _count_port(self, name: str, port: Port, rows: PortRows, counts: dict[str, float]) -> None:
        if port.encoder and rows.values.dim() == 4:
            counts[f"encoders.{port.encoder}"] += self._pictures[port.encoder] * len(rows.values)
        if port.enters != "sequence":
            return
        owner = vocabulary_owner(self.recipe, name) if port.is_ids else name
        counts[f"ports.{name}"] += self._connectors[owner] * len(rows.rows) + self._timesteps[name] * len(rows.grids)
        if port.objective is not None:
            judged = rows.supervised if rows.supervised is not None else rows.target
            counts[f"ports.{name}"] += self._head(name, owner, port) * int(judged.sum())

    # what one row costs

    def _passes(self, address: str) -> int:
        """Forward; the gradient of the weights, where they learn; the gradient of the input, which only what stands first does without."""
        if address in self._learning:
            return 3
        return 1 if ".connector." in address or ".timestep." in address else 2

    def _matrices(self, root: str) -> float:
        """Of the matrices below an address: tables that are looked up have none."""
        try:
            module = self.model.get_submodule(root)
        except AttributeError:
            return 0.0
        return sum(self._weight(f"{root}.{path}".rstrip("."), inner) for path, inner in module.named_modules())

    def _weight(self, address: str, module: nn.Module) -> float:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or isinstance(module, Embedding | nn.Embedding):
            return 0.0
        return 2.0 * weight.numel() * self._passes(f"{address}.weight")

    def _stack(self, name: str) -> tuple[list[float], float]:
        """A token's cost in each hard-routed expert, and that of an allowed pair."""
        network: Any = self.model.backbones[name]
        assert isinstance(network, Transformer)
        config, root = network.config, f"backbones.{name}"
        shared = self._backbone(f"{root}.shared", network.shared) if network.shared is not None else 0.0
        costs = [shared + self._backbone(f"{root}.experts.{expert}", network.experts[expert]) for expert in config.experts]
        return costs, 3 * 4.0 * config.depth * config.heads * config.attention_dim

    def _backbone(self, root: str, stack: nn.Module) -> float:
        """All matrices, those of learned experts by the share of them that a token passes, without those that pass noise levels only."""
        cost = self._matrices(root)
        for path, module in stack.named_modules():
            if isinstance(module, MoE):
                unused = 1 - module.config.top_k / module.config.experts
                cost -= unused * self._matrices(f"{root}.{path}.experts")
            elif isinstance(module, Modulation):
                cost -= self._matrices(f"{root}.{path}")
        return cost

    def _head(self, name: str, owner: str, port: Port) -> float:
        """A judged row's cost: the head's matrices, of the vocabulary's only the rows that are compared."""
        root = f"ports.{owner}.head"
        cost = self._matrices(root)
        if not port.is_ids:
            return cost
        head = self.model.get_submodule(root)
        path, last = next((path, module) for path, module in head.named_modules() if isinstance(module, LinearHead))
        whole = getattr(port.objective, "softmax", "port") == "vocabulary"
        used = self.model.slices[name].total if whole else self.model.slices[name].size
        if hasattr(last, "weight"):
            return cost - (1 - used / last.out_dim) * self._weight(f"{root}.{path}".rstrip("."), last)
        return 6.0 * used * self.recipe.backbones[backbone_of(self.recipe, port)].width  # tied to the embedding

    # what one picture costs

    def _port_of(self, encoder: str) -> Port:
        return next(port for port in self.recipe.ports.values() if port.encoder == encoder)

    def _picture(self, name: str) -> float:
        """One picture through an encoder, counted by torch on tensors that have a size and no memory."""
        port, config = self._port_of(name), self.recipe.encoders[name]
        with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            config.build(port.view.size)(torch.zeros(1, 3, port.view.size, port.view.size))
        learning = any(address.startswith(f"encoders.{name}.") for address in self._learning)
        return float(counted.get_total_flops()) * (3 if learning else 1)
