"""Recipe → model: the networks, and for each port how its content enters and how its predictions leave.

`Model.losses(batch)` is what every training step runs: corrupt (the objectives), embed (connectors), the backbone, then for
each port only the rows that carry loss, through its head, over its own vocabulary. Nothing here knows a system; what differs
between systems is which ports there are. The state dict's names are the recipe's addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stages import ranks
from stages.errors import GuardError, RecipeError
from stages.parts.backbones import KeyValueCache, Load, MoEConfig, Transformer, balance
from stages.parts.config import built_at
from stages.parts.connectors.queries import Queries
from stages.parts.connectors.scales import accumulated_maps
from stages.parts.layers import MaskVector, TimestepEmbedding, sincos_2d
from stages.parts.quantizers import MultiScaleVQ
from stages.recipe import Port, Recipe, backbone_of, vocabulary_owner
from stages.sequence.segment import Batch, Content, PortRows

MAX_TENSORS = 2**17  # of one network: four times those of the largest published mixture of experts
FLOAT_BYTES = 4
Module = TypeVar("Module", bound=nn.Module)
ID_PLACES = 0.1  # embeddings start at a standard deviation of 0.02: whole sines would drown them


@dataclass(frozen=True)
class PortLoss:
    """Weighted sum of one port's token losses, and how many tokens that was (of several ranks: on average, see `shared_losses`)."""

    total: Tensor
    count: float

    @property
    def mean(self) -> Tensor:
        return self.total / (self.count or 1)


@dataclass(frozen=True)
class Slice:
    """A port's ids within the vocabulary it shares: rows [start, stop) of the owner's embedding and head; `mask` is the extra
    input row of masked-token objectives, -1 without one."""

    owner: str
    start: int
    stop: int
    total: int
    mask: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class PortModule(nn.Module):
    """The weights of one port: connector, head, timestep embedding; whichever it owns."""

    def __init__(self, port: Port, connector: nn.Module | None, head: nn.Module | None, timestep: nn.Module | None) -> None:
        super().__init__()
        self.port = port
        if connector is not None:
            self.connector = connector
        if head is not None:
            self.head = head
        if timestep is not None:
            self.timestep = timestep


def keeps_memory(port: nn.Module) -> bool:
    """Whether a port's connector looks at whole pictures, hides tokens by itself and keeps a memory for the head."""
    return getattr(getattr(port, "connector", None), "keeps_memory", False)


class Model(nn.Module):
    """All networks of a recipe but its tokenizers and autoencoders, which come with the shards and never train here.

    `quantizers`: those of autoencoders whose codes are read as sums of scales, by name, given after the model is built. They are no part
    of it: not in its state dict, never trained, never sharded.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.quantizers: dict[str, MultiScaleVQ] = {}
        self.slices = vocabulary_slices(recipe)
        self.encoders = nn.ModuleDict({name: self._build_encoder(name) for name in recipe.encoders})
        self.backbones = nn.ModuleDict({name: config.build() for name, config in recipe.backbones.items()})
        self.ports = nn.ModuleDict({name: self._build_port(name) for name in recipe.ports})
        used = {objective for phase in recipe.phases for task in phase.tasks for objective in recipe.tasks[task].objectives}
        self.objectives = nn.ModuleDict({name: recipe.objectives[name].build() for name in recipe.objectives if name in used})  # type: ignore[attr-defined]

    def _build_encoder(self, name: str) -> nn.Module:
        with built_at(f"encoders.{name}"):
            return self.recipe.encoders[name].build(**_encoder_inputs(self.recipe, name))

    def _build_port(self, name: str) -> PortModule:
        with built_at(f"ports.{name}"):
            return self._port(name)

    def _port(self, name: str) -> PortModule:
        port = self.recipe.ports[name]
        backbone = self.recipe.backbones.get(backbone_of(self.recipe, port)) if port.enters == "sequence" else None
        width = backbone.width if backbone is not None else 0
        connector: nn.Module | None = None
        head: nn.Module | None = None
        if port.is_ids and port.enters == "sequence":
            piece = self.slices[name]
            if piece.owner == name:
                if port.connector is None:
                    raise RecipeError(f"ports.{name}.connector: ids need one", hint='connector = { kind = "embedding" }')
                if port.by_scale:
                    quantizer: Any = self.recipe.autoencoders[port.autoencoder].quantizer  # type: ignore[attr-defined]
                    connector = port.connector.build(quantizer.dim, width, quantizer.sides)
                else:
                    connector = port.connector.build(piece.total + (piece.mask >= 0), width)
                head = port.head.build(width, piece.total, tied_to=connector) if port.head is not None else None
        else:
            in_dim = self.content_dim(port)
            if port.content == Content.QUERIES:
                connector = Queries(port.count, width)
            elif port.objective is not None and port.objective.kind == "regress":
                connector = Queries(self.num_features(port), width)
            elif port.connector is not None:
                connector = port.connector.build(in_dim, width)
            if port.head is not None:
                head = port.head.build(width, in_dim)
        timestep = TimestepEmbedding(width) if port.timestep in ("add", "token") else None
        module = PortModule(port, connector, head, timestep)
        if port.objective is not None and port.objective.kind == "masked-denoise" and not keeps_memory(module):
            module.mask = MaskVector(width)
        return module

    def content_dim(self, port: Port) -> int:
        """Channels of one token of a port's content, before its connector."""
        if port.of:
            return self.recipe.backbones[backbone_of(self.recipe, self.recipe.ports[port.of[0]])].width
        if port.encoder:
            encoder: Any = self.encoders[port.encoder]
            return encoder.pooled_dim if port.select == "pooled" else encoder.out_dim
        channels = self.recipe.autoencoders[port.autoencoder].latent_channels if port.autoencoder else 3
        return channels * port.patch_size**2

    def num_features(self, port: Port) -> int:
        """How many tokens a port's encoder makes of a picture as its view shows it."""
        config: Any = self.recipe.encoders[port.encoder]
        return config.num_tokens(port.view.size, port.view.size)

    def init_weights(self, generator: Generator) -> None:
        """Every part that says how it starts, in a fixed order, from one generator."""
        for module in _own_inits(self):
            module.init_weights(generator)

    @property
    def backbone(self) -> Transformer:
        """The first network, which of most recipes is the only one."""
        return self.network("")

    def network(self, name: str) -> Transformer:
        """The network whose table is called so in a batch: "" is the first."""
        network = self.backbones[name] if name else next(iter(self.backbones.values()), None)
        if not isinstance(network, Transformer):
            raise RecipeError(f"recipe '{self.recipe.name}' has no sequence network")
        return network

    def network_of(self, port: str) -> Transformer:
        """The network that a port enters."""
        return self.network(self.recipe.ports[port].backbone)

    def shard_networks(self) -> list[nn.Module]:
        """What is kept in shards layer by layer: the networks, which all ranks run. Ports and encoders, which a rank may have no use for
        in its batch, are put together once a step."""
        return list(self.backbones.values())

    # training

    def losses(self, batch: Batch, generator: Generator) -> dict[str, PortLoss]:
        """One loss per port, one per objective that looks across samples, and those that parts of the network ask for (`auxiliary_weights`)."""
        noisy = self.corrupt(batch, generator)
        losses: dict[str, PortLoss] = {}
        rows_of: dict[str, Tensor] = {}
        for network, here in self._running(noisy).items():
            name = network if len(self.recipe.backbones) > 1 else ""
            loads: list[Load] = []
            if here:
                hidden = self.hidden(noisy, loads=loads, network=name, others=rows_of)
                rows_of[name] = hidden.reshape(-1, hidden.shape[-1])
            else:  # for the other ranks: a port of this network is judged by nothing
                port = next(port for port in self.recipe.ports if self._enters(port, name))
                losses[port] = PortLoss(self.network(name).idle(loads).sum() * 0.0, 0)
            if loads:  # training steps are taken by all ranks together, also by one that has no sample and looks on at another's
                shared = balance(loads, everywhere=self.training, counted=here and batch.num_supervised > 0)
                losses[f"{network}.balance"] = PortLoss(*shared)
        for name, rows in noisy.ports.items():
            if rows.supervised is not None:
                losses[name] = self._supervise(name, rows, rows_of[self.table_of(name)], generator)
        for name, objective in self.objectives.items():
            between = [address.removeprefix("ports.") for address in self.recipe.objectives[name].between]  # type: ignore[attr-defined]
            if all(port in noisy.ports for port in between):
                first, second = (ranks.gathered_rows(self.pooled(port, noisy.ports[port])) for port in between)
                losses[name] = PortLoss(objective(first, second), 1)
        return losses

    def _running(self, batch: Batch) -> dict[str, bool]:
        """The networks that have tokens in the batch, here or, while training, on any rank: network → whether here.

        What ranks do with a network they do together (put its weights together, average gradients, balance its experts), so none stays away.
        """
        several = len(self.recipe.backbones) > 1
        layouts = {network: batch.layouts.get(network if several else "") for network in self.recipe.backbones}
        here = {network: layout is not None and layout.sample_id.numel() > 0 for network, layout in layouts.items()}
        anywhere = torch.tensor(list(here.values()), dtype=torch.int64)
        if several and self.training:
            ranks.summed(anywhere)
        return {network: own for (network, own), count in zip(here.items(), anywhere.tolist(), strict=True) if count}

    def table_of(self, port: str) -> str:
        """What the table of a port's network is called in a batch."""
        return self.recipe.ports[port].backbone if len(self.recipe.backbones) > 1 else ""

    def corrupt(self, batch: Batch, generator: Generator) -> Batch:
        """Each port's objective prepares its rows: what is hidden or noised, what is judged, where it is read."""
        prepared = {}
        for name, rows in batch.ports.items():
            objective = self.recipe.ports[name].objective
            rows = self.encoded(name, rows) if objective is not None else rows
            if objective is None:
                prepared[name] = rows
            elif objective.kind == "masked-token":
                prepared[name] = objective.corrupt(rows, generator, mask_id=self.slices[name].size)
            else:
                prepared[name] = objective.corrupt(rows, generator)
        return replace(batch, ports=prepared)

    @torch.no_grad()
    def encoded(self, name: str, rows: PortRows) -> PortRows:
        """Pictures whose features are to be predicted, as those features: what is learned does not reach back into the encoder."""
        if rows.values.dim() != 4 or not self.recipe.ports[name].encoder:
            return rows
        return replace(rows, values=self.encoders[self.recipe.ports[name].encoder](rows.values).tokens.flatten(0, 1))

    def hidden(
        self,
        batch: Batch,
        cache: KeyValueCache | None = None,
        loads: list[Load] | None = None,
        network: str = "",
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One network's last hidden rows (b, l, d), after its final norm. others: those of networks that it reads, flat."""
        layout = batch.layouts.get(network, batch.layout)
        return self.network(network)(self.embed(batch, network, others), layout, cache, loads, self.noise(batch, network))

    def noise(self, batch: Batch, network: str = "") -> Tensor | None:
        """The noise level (b, l) of each token of a modulated network: the highest in its block, so that what belongs to a noisy
        picture is told how noisy it is, and what is cached before it does not depend on it."""
        if self.network(network).timestep is None:
            return None
        layout = batch.layouts.get(network, batch.layout)
        levels = torch.zeros(layout.sample_id.numel(), device=layout.sample_id.device)
        for name, rows in batch.ports.items():
            if self._enters(name, network) and rows.timestep is not None:
                levels = levels.index_copy(0, rows.rows, rows.timestep)
        block = layout.sample_id * (layout.block_id.max() + 1) + layout.block_id  # padding is -1 in both
        names, which = torch.unique(block.reshape(-1), return_inverse=True)
        highest = torch.zeros(len(names), device=levels.device).scatter_reduce(0, which, levels, "amax")
        return highest.index_select(0, which).reshape(layout.shape)

    def embed(self, batch: Batch, network: str = "", others: Mapping[str, Tensor] | None = None) -> Tensor:
        """The rows of every port of one network at their places: (b, l, d); padding is zero."""
        b, length = batch.layouts.get(network, batch.layout).shape
        ports = {name: rows for name, rows in batch.ports.items() if self._enters(name, network)}
        for name, rows in ports.items():
            if rows.source is not None and others is not None:
                read = others[self.table_of(self.recipe.ports[name].of[0])]
                ports[name] = replace(rows, values=read.index_select(0, rows.source))
        vectors = [self.embed_rows(name, rows) for name, rows in ports.items()]
        places = [rows.rows for rows in ports.values()]
        for name, rows in ports.items():
            if rows.time_rows is not None:
                vectors.append(self.ports[name].timestep(rows.segment_times()))  # type: ignore[operator]
                places.append(rows.time_rows)
        both = torch.cat(vectors)
        return both.new_zeros(b * length, both.shape[1]).index_copy(0, torch.cat(places), both).reshape(b, length, -1)

    def _enters(self, port: str, network: str) -> bool:
        return self.recipe.ports[port].enters == "sequence" and self.table_of(port) == network

    def embed_rows(self, name: str, rows: PortRows) -> Tensor:
        """One port's values → vectors (n, d)."""
        module: Any = self.ports[name]
        port = self.recipe.ports[name]
        values = rows.values
        if values.dim() == 4:  # pixels, one picture a segment: the encoder runs here, once
            values = self.encoders[port.encoder](values).tokens
            values = values.reshape(-1, values.shape[-1])
        if port.by_scale:
            maps = values if values.is_floating_point() else accumulated_maps(self.quantizer_of(name), rows)
            vectors = module.connector(maps, rows)
        elif keeps_memory(module):
            vectors, rows.memory = module.connector(values, rows.grids, rows.hidden)
        else:
            vectors = self.embed_ids(name, values) if port.is_ids else module.connector(values, rows.grids)
            if rows.hidden is not None:
                vectors = module.mask(vectors, rows.hidden)
        if port.grid_embedding != "none":
            vectors = vectors + self.embed_places(name, rows.grids).to(vectors)
        if port.timestep == "add":
            t = rows.timestep if rows.timestep is not None else torch.zeros(vectors.shape[0], device=vectors.device)
            levels, place = torch.unique(t, return_inverse=True)  # one row a picture, not one a token
            vectors = vectors + module.timestep(levels).index_select(0, place)
        return vectors

    def embed_ids(self, name: str, ids: Tensor) -> Tensor:
        """Ids of one port (the id after its last means hidden) → vectors, from the table its vocabulary shares."""
        piece = self.slices[name]
        owner: Any = self.ports[piece.owner]
        shared = torch.where(ids == piece.size, piece.mask, ids + piece.start) if piece.mask >= 0 else ids + piece.start
        return owner.connector(shared)

    def quantizer_of(self, name: str) -> MultiScaleVQ:
        """The frozen quantizer whose scales a port reads, where the model is."""
        autoencoder = self.recipe.ports[name].autoencoder
        if autoencoder not in self.quantizers:
            raise RecipeError(f"ports.{name} reads sums of scales, and the model was not given the quantizer of autoencoders.{autoencoder}")
        return self.quantizers[autoencoder].to(next(self.parameters()).device)

    def embed_places(self, name: str, grids: Iterable[tuple[int, ...]]) -> Tensor:
        """What a port adds to its tokens for their places in pictures of these grids: a fixed table (n, d), scaled to its contents."""
        scale = ID_PLACES if self.recipe.ports[name].is_ids else 1.0
        return scale * torch.cat([sincos_2d(grid, self.network_of(name).config.width) for grid in grids])

    def predict(
        self, name: str, hidden: Tensor, *, whole: bool = False, rows: PortRows | None = None, picked: Tensor | None = None
    ) -> Tensor:
        """Hidden rows (n, d) → one port's logits over its own ids, or over the `whole` shared vocabulary, or its vectors.

        rows: the port's tokens, of which `picked` (all without it) are these; heads that look at pictures as wholes are told their grids
        and noise levels.
        """
        port = self.recipe.ports[name]
        module: Any = self.ports[self.slices[name].owner if port.is_ids else name]
        if not port.is_ids and getattr(module.head, "sees_pictures", False):
            assert rows is not None and rows.timestep is not None
            picked = torch.arange(len(rows.rows), device=hidden.device) if picked is None else picked
            return module.head(hidden, rows.grids_of(picked), rows.timestep.index_select(0, picked))
        if not port.is_ids:
            return module.head(hidden)
        piece = self.slices[name]
        return module.head(hidden) if whole else module.head(hidden, piece.start, piece.stop)

    def conditions(self, name: str, rows: PortRows, hidden: Tensor) -> Tensor:
        """The hidden rows (n, d) of all of one port's tokens → what its diffusion head denoises each by (n, w)."""
        head: Any = self.ports[name].head
        return head.condition(hidden, rows.grids, rows.memory)

    def _supervise(self, name: str, rows: PortRows, flat: Tensor, generator: Generator) -> PortLoss:
        assert rows.supervised is not None and rows.read is not None and rows.goal is not None
        picked = rows.supervised.nonzero().squeeze(1)
        if not len(picked):
            return PortLoss(flat.sum() * 0.0, 0)
        objective: Any = self.recipe.ports[name].objective
        whole = getattr(objective, "softmax", "port") == "vocabulary"
        goal = rows.goal.index_select(0, picked)
        if objective.kind == "masked-denoise":
            z = self.conditions(name, rows, flat.index_select(0, rows.rows)).index_select(0, picked)
            losses = objective.denoising_loss(self.ports[name].head, goal, z, generator) * rows.weight.index_select(0, picked)
            return PortLoss(losses.sum(), len(picked))
        if whole:
            goal = goal + self.slices[name].start
        prediction = self.predict(name, flat.index_select(0, rows.read.index_select(0, picked)), whole=whole, rows=rows, picked=picked)
        losses = objective.loss(prediction, goal) * rows.weight.index_select(0, picked)
        return PortLoss(losses.sum(), len(picked))

    def pooled(self, name: str, rows: PortRows) -> Tensor:
        """What an encoder says of each segment as a whole: (s, dim), through the port's connector."""
        port = self.recipe.ports[name]
        module: Any = self.ports[name]
        encoder = self.encoders[port.encoder]
        features = encoder(rows.values) if rows.values.dim() == 4 else encoder(rows.values, rows.lengths)
        return module.connector(features.pooled, rows.grids)


def shared_losses(recipe: Recipe, losses: Mapping[str, PortLoss]) -> tuple[dict[str, PortLoss], dict[str, float]]:
    """Losses whose average over the ranks is that of all tokens of the batch, wherever they are; and each port's mean, for the log.

    A port is judged by the number of its tokens on all ranks: means of ranks would give a token among few more weight than one among many.
    """
    names = [*recipe.ports, *recipe.objectives, *auxiliary_weights(recipe)]
    numbers = torch.zeros(len(names), 2, dtype=torch.float64)
    for name, loss in losses.items():
        numbers[names.index(name)] = torch.stack([loss.total.detach().double().cpu(), torch.tensor(float(loss.count)).double()])
    ranks.summed(numbers)
    totals, counts = (numbers / ranks.size()).unbind(1)
    shared = {name: PortLoss(loss.total, float(counts[names.index(name)])) for name, loss in losses.items()}
    return shared, {name: float(total / count) for name, total, count in zip(names, totals, counts, strict=True) if count}


def auxiliary_weights(recipe: Recipe) -> dict[str, float]:
    """The losses that parts of the network ask for beside those of ports and objectives, and their weights."""
    return {f"{name}.balance": config.mlp.balance_weight for name, config in recipe.backbones.items() if isinstance(config.mlp, MoEConfig)}


def vocabulary_slices(recipe: Recipe) -> dict[str, Slice]:
    """Where each port's ids lie in the vocabulary it shares. Order is that of the file, so the resolved recipe fixes every id."""
    sizes: dict[str, int] = {}
    groups: dict[str, list[str]] = {}
    for name, port in recipe.ports.items():
        if not port.is_ids:
            continue
        if port.content == Content.TOKEN_IDS:
            sizes[name] = recipe.tokenizers[port.tokenizer].vocab_size
        else:
            codebook = recipe.autoencoders[port.autoencoder].codebook_size
            if codebook is None:
                raise RecipeError(f"ports.{name}: content is codes, but autoencoders.{port.autoencoder} has no quantizer")
            sizes[name] = codebook
        groups.setdefault(vocabulary_owner(recipe, name), []).append(name)
    slices: dict[str, Slice] = {}
    for owner, members in groups.items():
        total = sum(_unique_sizes(recipe, members, sizes).values())
        hides = any(
            objective is not None and objective.kind == "masked-token" for objective in (recipe.ports[m].objective for m in members)
        )
        starts: dict[str, int] = {}
        for member in members:
            source = _id_source(recipe, member)
            starts.setdefault(source, sum(size for key, size in _unique_sizes(recipe, members[: members.index(member)], sizes).items()))
            slices[member] = Slice(owner, starts[source], starts[source] + sizes[member], total, total if hides else -1)
    return slices


def _id_source(recipe: Recipe, name: str) -> str:
    """Two ports over one tokenizer, or over one codebook, mean the same ids."""
    port = recipe.ports[name]
    return f"tokenizers.{port.tokenizer}" if port.content == Content.TOKEN_IDS else f"autoencoders.{port.autoencoder}"


def _unique_sizes(recipe: Recipe, names: Iterable[str], sizes: Mapping[str, int]) -> dict[str, int]:
    return {_id_source(recipe, name): sizes[name] for name in names}


def _encoder_inputs(recipe: Recipe, name: str) -> dict[str, Any]:
    """What an encoder must know of its input: the vocabulary it reads, or the size of its pictures."""
    for port in recipe.ports.values():
        if port.encoder == name:
            if port.tokenizer:
                return {"vocab_size": recipe.tokenizers[port.tokenizer].vocab_size}
            if port.view is None:
                raise RecipeError(f"an encoder needs pictures of a known size: give the port of encoders.{name} a view")
            return {"image_size": port.view.size}
    raise RecipeError(f"encoders.{name}: no port uses it")


def _own_inits(module: nn.Module) -> Iterable[Any]:
    """The outermost modules below `module` that have an `init_weights` of their own."""
    for child in module.children():
        if hasattr(child, "init_weights"):
            yield child
        else:
            yield from _own_inits(child)


def build_model(recipe: Recipe, seed: int, device: str | torch.device = "cpu") -> Model:
    """The recipe's model with fresh weights, a function of (recipe, seed) alone. RecipeError where this machine cannot hold it.

    Parts without an `init_weights` (convolutions) start as torch starts them, under a seed of their own.
    """
    with torch.random.fork_rng(devices=[]):
        check_memory(meta_model(recipe), f"recipe '{recipe.name}' at size '{recipe.size}'")
        torch.manual_seed(seed)
        model = Model(recipe)
        model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device)


def meta_model(recipe: Recipe, most: int = MAX_TENSORS) -> Model:
    """The same model without memory: shapes and counts only. RecipeError where it has more than `most` tensors."""
    return on_meta(lambda: Model(recipe), most)


def on_meta(build: Callable[[], Module], most: int = MAX_TENSORS, address: str = "") -> Module:
    """A module without memory. It is given up as soon as it has more than `most` tensors (RecipeError), so that a recipe from a stranger
    costs no more time than that. address: whose numbers they are, where the module is one part."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise RecipeError(f"the recipe describes a network of more than {most:,} tensors")

    handle = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"), built_at(address) if address else nullcontext():
            return build()
    finally:
        handle.remove()


def check_memory(module: nn.Module, what: str) -> None:
    """RecipeError where the weights of a module, which is given on the meta device, are more than this machine's memory."""
    needed = FLOAT_BYTES * count_parameters(module)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise RecipeError(
            f"{what}: its {needed // FLOAT_BYTES:,} parameters take {needed / 2**30:,.1f} GiB, and this machine has {there / 2**30:,.1f} GiB",
            hint="a smaller --size, or --set its widths and depths; --dry-run prints what a run takes",
        )


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def set_trainable(model: nn.Module, trainable: Iterable[str], frozen: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """Freeze all but what the phase names; returns the parameters that learn, with their addresses.

    An address covers everything below it, "*" is everything. Raises RecipeError for an address that holds no weights, and
    GuardError when nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for address in [*trainable, *frozen]:
        if address != "*" and not any(covers(address, name) for name in names):
            tops = {".".join(name.split(".")[:2]) for name in names}
            raise RecipeError(f"'{address}' holds no weights to train or to freeze; there are: {', '.join(sorted(tops))}")
    learning = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(covers(a, name) for a in trainable) and not any(covers(a, name) for a in frozen))
        if parameter.requires_grad:
            learning.append((name, parameter))
    if not learning:
        raise GuardError("every parameter is frozen: there is nothing to train")
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.train(False)  # a frozen tower keeps its statistics and drops nothing out
    return learning


def covers(address: str, name: str) -> bool:
    return address == "*" or name == address or name.startswith(address + ".")
