"""Where released autoencoders keep their weights: tables from our names to theirs, and the little code that reads them.

The convolutional autoencoders of the field have one body and several spellings of it:

    CompVis    taming transformers' VQGAN, latent diffusion, Chameleon's and VAR's tokenizers     encoder.down.0.block.1.conv1.weight
    LlamaGen   its VQ-8 and VQ-16                                                                encoder.conv_blocks.0.res.1.conv1.weight
    Janus      as transformers saves it: CompVis, the decoder's levels in the other order           decoder.up.0.upsample.conv.weight
    diffusers  AutoencoderKL and VQModel, with the attention names of before 2023 too            encoder.down_blocks.0.resnets.1.conv1.weight

A layout is recognised by its names. Every weight of ours has to be there in its shape, and every weight that is there has to be used,
but for what only training needs (losses, moving averages, counters); anything else is one error that lists it. Attention is a linear map
of each cell, written as a 1 x 1 convolution by some: a weight (d, d, 1, 1) is read as (d, d).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from stages.errors import DataError
from stages.parts.autoencoders.autoencoder import Autoencoder
from stages.parts.autoencoders.cnn import Attention, ConvolutionalConfig, Double, Halve, ResidualBlock

ROOT = "encoder.conv_in.weight"  # in every layout; what stands before it is the prefix of a larger model (first_stage_model., vae., ...)


@dataclass(frozen=True)
class Third:
    """One of the three equal parts, along the first axis, of a weight that holds query, key and value."""

    name: str
    part: int


Place = str | Third
Places = tuple[Place, ...]  # where to look, in this order
KINDS = {ResidualBlock: "block", Attention: "attention", Halve: "halve", Double: "double"}


@dataclass(frozen=True)
class Layout:
    """How one code base calls the weights. In `layers`, `level` counts from the pictures' end, `step` in the order things are computed."""

    name: str
    mark: str  # begins the name of a weight that no other layout has
    layers: Mapping[str, str]
    block: Mapping[str, Places]
    attention: Mapping[str, Places]
    norm_out: str


def _same(*names: str) -> dict[str, Places]:
    return {name: (name,) for name in names}


_BLOCK = _same("norm1", "conv1", "norm2", "conv2")

COMPVIS = Layout(
    "CompVis",
    mark="encoder.down.",
    layers={
        "encoder.block": "encoder.down.{level}.block.{number}",
        "encoder.attention": "encoder.down.{level}.attn.{number}",
        "encoder.halve": "encoder.down.{level}.downsample",
        "decoder.block": "decoder.up.{level}.block.{number}",
        "decoder.attention": "decoder.up.{level}.attn.{number}",
        "decoder.double": "decoder.up.{level}.upsample",
        "middle.block": "{half}.mid.block_{ordinal}",
        "middle.attention": "{half}.mid.attn_{ordinal}",
    },
    block=_BLOCK | {"shortcut": ("nin_shortcut",)},
    attention={
        "norm": ("norm",),
        "query": ("q", Third("qkv", 0)),  # the second is VAR's
        "key": ("k", Third("qkv", 1)),
        "value": ("v", Third("qkv", 2)),
        "out": ("proj_out",),
    },
    norm_out="norm_out",
)
LLAMAGEN = Layout(
    "LlamaGen",
    mark="encoder.conv_blocks.",
    layers={
        "encoder.block": "encoder.conv_blocks.{step}.res.{number}",
        "encoder.attention": "encoder.conv_blocks.{step}.attn.{number}",
        "encoder.halve": "encoder.conv_blocks.{step}.downsample",
        "decoder.block": "decoder.conv_blocks.{step}.res.{number}",
        "decoder.attention": "decoder.conv_blocks.{step}.attn.{number}",
        "decoder.double": "decoder.conv_blocks.{step}.upsample",
        "middle.block": "{half}.mid.{place}",
        "middle.attention": "{half}.mid.{place}",
    },
    block=_BLOCK | {"shortcut": ("nin_shortcut",)},
    attention={"norm": ("norm",), "query": ("q",), "key": ("k",), "value": ("v",), "out": ("proj_out",)},
    norm_out="norm_out",
)
DIFFUSERS = Layout(
    "diffusers",
    mark="encoder.down_blocks.",
    layers={
        "encoder.block": "encoder.down_blocks.{step}.resnets.{number}",
        "encoder.attention": "encoder.down_blocks.{step}.attentions.{number}",
        "encoder.halve": "encoder.down_blocks.{step}.downsamplers.0",
        "decoder.block": "decoder.up_blocks.{step}.resnets.{number}",
        "decoder.attention": "decoder.up_blocks.{step}.attentions.{number}",
        "decoder.double": "decoder.up_blocks.{step}.upsamplers.0",
        "middle.block": "{half}.mid_block.resnets.{number}",
        "middle.attention": "{half}.mid_block.attentions.{number}",
    },
    block=_BLOCK | {"shortcut": ("conv_shortcut",)},
    attention={
        "norm": ("group_norm",),
        "query": ("to_q", "query"),
        "key": ("to_k", "key"),
        "value": ("to_v", "value"),
        "out": ("to_out.0", "proj_attn"),
    },
    norm_out="conv_norm_out",
)
JANUS = replace(  # CompVis, but for the decoder's levels, which are counted as they are computed
    COMPVIS,
    name="Janus",
    mark="decoder.up.0.upsample.",
    layers={ours: theirs.replace("decoder.up.{level}", "decoder.up.{step}") for ours, theirs in COMPVIS.layers.items()},
)
LAYOUTS = (JANUS, COMPVIS, LLAMAGEN, DIFFUSERS)

AROUND: dict[str, Places] = {  # outside encoder and decoder all agree
    "to_moments": ("quant_conv",),
    "from_latents": ("post_quant_conv",),
    "quantizer.project_in": ("quant_conv",),
    "quantizer.project_out": ("post_quant_conv",),
    "quantizer.codebook": ("quantize.embedding.weight",),
    "quantizer.phi": ("quantize.quant_resi.qresi_ls",),  # VAR's
}
LEFT_OUT = (  # of theirs: what is not the autoencoder
    "loss.",
    "model_ema.",
    "colorize",
    "quantize.codebook_used",
    "quantize.ema_vocab_hit_SV",
)
OUR_OWN = ("latent_shift", "latent_scale", "quantizer.counts", "quantizer.sums")  # no release has them


def prefix_of(names: Iterable[str], where: str, chosen: str = "") -> str:
    """What stands before the autoencoder's names: nothing, or the path inside a larger model. DataError if there is none, or a choice.

    chosen: the path that was asked for.
    """
    names = list(names)
    found = sorted({name.removesuffix(ROOT) for name in names if name == ROOT or name.endswith("." + ROOT)})
    if chosen:
        found = [prefix for prefix in found if prefix == chosen.rstrip(".") + "."]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{where}: holds {len(found)} autoencoders", hint=f"choose with #PATH, one of: {', '.join(p or '.' for p in found)}"
        )
    shown = ", ".join(sorted(names)[:4])
    raise DataError(
        f"{where}: no weight is called {chosen.rstrip('.') + '.' if chosen else ''}{ROOT}, so this is no autoencoder in a layout that is known",
        hint=f"known are {', '.join(layout.name for layout in LAYOUTS)}; here the names begin {shown}",
    )


def layout_of(names: Iterable[str], where: str) -> Layout:
    """Which layout these names, without prefix, are written in. DataError if none."""
    names = list(names)
    for layout in LAYOUTS:
        if any(name.startswith(layout.mark) for name in names):
            return layout
    raise DataError(
        f"{where}: an autoencoder in a layout that is not known",
        hint="known are " + ", ".join(f"{layout.name} ({layout.mark}…)" for layout in LAYOUTS) + f"; here: {', '.join(sorted(names)[:4])}",
    )


def places(module: Autoencoder, layout: Layout) -> Iterator[tuple[str, Places]]:
    """Our modules and parameters by their path, each with where its weights may be in that layout."""
    config = module.config
    assert isinstance(config, ConvolutionalConfig)
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", (f"{half}.conv_in",)
        yield f"{half}.conv_out", (f"{half}.conv_out",)
        yield f"{half}.norm_out", (f"{half}.{layout.norm_out}",)
        for index, kind, place in walk(half, list(module.get_submodule(f"{half}.layers").children()), config):
            stem = layout.layers[kind].format(**place)
            leaves = layout.block if kind.endswith("block") else layout.attention if kind.endswith("attention") else _same("conv")
            for leaf, options in leaves.items():
                yield f"{half}.layers.{index}.{leaf}", tuple(_below(stem, option) for option in options)
    yield from AROUND.items()


def _below(stem: str, place: Place) -> Place:
    return f"{stem}.{place}" if isinstance(place, str) else Third(f"{stem}.{place.name}", place.part)


def walk(half: str, layers: list[nn.Module], config: ConvolutionalConfig) -> Iterator[tuple[int, str, dict[str, int | str]]]:
    """Of every layer that has a name in the layouts its index, what it is, and the numbers by which it may be called."""
    count = config.middle_blocks + config.middle_attention
    middle = range(count) if half == "decoder" else range(len(layers) - count, len(layers))
    body = [index for index in range(len(layers)) if index not in middle]
    levels = 1 + sum(isinstance(layer, (Halve, Double)) for layer in layers)
    for area, indices in (("middle", middle), (half, body)):
        step, counts = 0, Counter[str]()
        for index in indices:
            if (kind := KINDS.get(type(layers[index]))) is None:
                continue
            number = counts[kind]
            yield (
                index,
                f"{area}.{kind}",
                {
                    "half": half,
                    "step": step,
                    "level": step if half == "encoder" else levels - 1 - step,
                    "number": number,
                    "ordinal": number + 1,
                    "place": index - indices[0],
                },
            )
            counts[kind] += 1
            if kind in ("halve", "double"):
                step, counts = step + 1, Counter()


def translate(module: Autoencoder, tensors: Mapping[str, Tensor], where: str, part: str = "") -> dict[str, Tensor]:
    """Released weights (without prefix) under our names, in our shapes: all of the module's, or those below `part`.

    DataError lists what is missing, what is left over (not asked where only a part is wanted), and what has another shape.
    """
    layout = layout_of(tensors, where)
    if not isinstance(module.config, ConvolutionalConfig):
        raise DataError(f"{where}: a convolutional autoencoder (layout {layout.name}), and this recipe's is of kind '{module.config.kind}'")
    table = sorted(places(module, layout), key=lambda entry: -len(entry[0]))
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    reshaped: list[str] = []
    used: set[str] = set()
    for name, own in module.state_dict().items():
        if name in OUR_OWN or not (not part or name == part or name.startswith(part + ".")):
            continue
        options = [_below_weight(place, name.removeprefix(path)) for place, path in _matching(name, table)]
        option = next((option for option in options if _name(option) in tensors), None)
        if option is None:
            missing.append(_name(options[0]) if options else f"(ours) {name}")
            continue
        value = tensors[_name(option)]
        used.add(_name(option))
        if isinstance(option, Third):
            value = value.chunk(3)[option.part]
        if value.dim() == 4 and own.dim() == 2 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        if value.shape != own.shape:
            reshaped.append(f"{_name(option)} {tuple(tensors[_name(option)].shape)}, expected {tuple(own.shape)}")
        found[name] = value
    unexpected = [] if part else sorted(name for name in tensors if name not in used and not name.startswith(LEFT_OUT))
    if missing or unexpected or reshaped:
        lists = [("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)]
        told = "; ".join(f"{title}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" for title, names in lists if names)
        raise DataError(
            f"{where}: {len(missing)} weights missing, {len(unexpected)} unexpected, {len(reshaped)} reshaped for this recipe "
            f"(layout {layout.name}); {told}",
            hint="released weights fit a recipe of the same sizes, mostly --size paper; other sizes are set with --set autoencoders.…",
        )
    return found


def _matching(name: str, table: list[tuple[str, Places]]) -> Iterator[tuple[Place, str]]:
    """Where the weight may be, with the path of ours that the place stands for; of several paths the longest."""
    for path, options in table:
        if name == path or name.startswith(path + "."):
            yield from ((option, path) for option in options)
            return


def _below_weight(place: Place, rest: str) -> Place:
    """`rest`: `.weight`, `.bias`, or nothing where the place is the weight itself."""
    return place + rest if isinstance(place, str) else Third(place.name + rest, place.part)


def _name(place: Place) -> str:
    return place if isinstance(place, str) else place.name
