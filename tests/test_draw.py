"""Drawings say what the code does: masks, marks, experts and objectives are read back from the SVG and compared with their source."""

import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.anatomy import model_size, parts_of, weights_of
from stages.draw import draw, draw_svg
from stages.drawing.example import NothingDrawn, examples_of
from stages.drawing.svg import width_of, wrap
from stages.errors import UsageError
from stages.model import build_model, set_trainable
from stages.recipe import Recipe, load_recipe, recipe_names

SVG = "{http://www.w3.org/2000/svg}"
HARD = """
[paper]
arxiv = "0000.00000"
differs = ["it is made up"]
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = 512
special = ["<soi>", "<eoi>", "<q>"]
[encoders.eye]
kind = "clip-vit"
width = 24
depth = 2
heads = 3
patch_size = 4
cls = "drop"
[autoencoders.vae]
kind = "kl-cnn"
downsample = 4
latent_channels = 4
multipliers = [1, 1, 1]
channels = 8
[backbones.lm]
kind = "transformer"
width = 32
depth = 2
heads = 4
experts = ["understand", "generate"]
[ports.text]
content = "token-ids"
tokenizer = "bpe"
expert = "understand"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "next-token" }
[ports.see]
content = "features"
encoder = "eye"
expert = "understand"
mask = "full"
positions = "shared"
view = { kind = "square", size = 32 }
connector = { kind = "mlp" }
[ports.draw]
content = "latents"
autoencoder = "vae"
patch_size = 2
expert = "generate"
mask = "full"
positions = "grid"
markers = { before = "<soi>", after = "<eoi>" }
timestep = "add"
connector = { kind = "linear" }
head = { kind = "linear" }
objective = { kind = "denoise" }
[tasks.edit]
segments = [
  { port = "see", field = "source" },
  { port = "text", text = "<q>{instruction} & <more>", cond_dropout_prob = 0.25, mask = "full", merge = true },
  { port = "draw", field = "result", role = "target", mask = "isolated" },
  { port = "draw", field = "result" },
  { port = "text", field = "caption", role = "target" },
]
[[phases]]
name = "connector"
stage = "align"
tasks = { edit = 1.0 }
trainable = ["ports.see.connector"]
steps = 10
[[phases]]
name = "tune"
stage = "train-unified"
tasks = { edit = 1.0 }
frozen = ["encoders.eye", "backbones.lm.experts.understand", "ports.text.head"]
steps = 20
[sizes.tiny]
[sizes.small]
[sizes.paper]
"""


@pytest.fixture
def hard(tmp_path: Path) -> Recipe:
    """Every mask kind, merged blocks, two experts, two picture ports, partial freezing, letters that XML must escape."""
    path = tmp_path / "hard.toml"
    path.write_text(HARD)
    return load_recipe(path)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def masks_in(svg: str) -> dict[str, np.ndarray]:
    """The masks a drawing shows, by task: the rectangles of its paths, in units of one token."""
    masks = {}
    for grid in parsed(svg).iter(f"{SVG}g"):
        if "data-length" not in grid.attrib:
            continue
        n = int(grid.attrib["data-length"])
        mask = np.zeros((n, n), dtype=bool)
        for path in grid.iter(f"{SVG}path"):
            if {"mmd-own", "mmd-earlier"} & set(path.attrib["class"].split()):
                for k, q, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.attrib["d"]):
                    assert not mask[int(q), int(k) : int(k) + int(width)].any(), "a cell is drawn twice"
                    mask[int(q), int(k) : int(k) + int(width)] = True
        masks[grid.attrib["data-task"]] = mask
    return masks


def expected_mask(kinds: list[tuple[str, int, int]]) -> np.ndarray:
    """Written out by hand: (mask kind, block, tokens) of each segment, entry by entry."""
    tokens = [(kind, block) for kind, block, length in kinds for _ in range(length)]
    mask = np.zeros((len(tokens), len(tokens)), dtype=bool)
    for q, (own_kind, own_block) in enumerate(tokens):
        for k, (kind, block) in enumerate(tokens):
            if block == own_block:
                mask[q, k] = k <= q or not own_kind.endswith("causal")
            else:
                mask[q, k] = block < own_block and not kind.startswith("isolated")
    return mask


def test_the_drawn_mask_is_may_attend_of_the_planned_example(hard: Recipe) -> None:
    (example,) = examples_of(hard)
    drawn = masks_in(draw_svg(hard))["edit"]
    assert drawn.tolist() == [list(row) for row in example.mask]
    by_hand = [(str(entry.segment.mask), entry.block, len(entry.labels)) for entry in example.segments]
    # the picture and the instruction are one full block; the noisy picture with its markers is seen by nobody after it
    assert [block for _, block, _ in by_hand] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [kind for kind, _, _ in by_hand] == ["full", "full", "isolated", "isolated", "isolated", "full", "full", "full", "causal"]
    np.testing.assert_array_equal(drawn, expected_mask(by_hand))


@pytest.mark.rung("described")
@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_can_be_drawn_at_every_size(name: str) -> None:
    for size in ("tiny", "small", "paper"):
        recipe = load_recipe(name, size=size)
        svg = draw_svg(recipe)
        drawn = masks_in(svg)
        for example in examples_of(recipe):
            if example.length:
                inside = [d for d in example.segments if d.in_table]
                expected = expected_mask([(str(d.segment.mask), d.block, len(d.labels)) for d in inside])
                ports = [d.port for d in inside for _ in d.labels]
                hidden = [[q in recipe.ports[k].hidden_from for k in ports] for q in ports]
                np.testing.assert_array_equal(drawn[example.title], expected & ~np.array(hidden))
        assert "nan" not in svg and all(f'data-part="{part.address}"' in svg for part in parts_of(recipe) if part.trained)


def test_marks_are_what_set_trainable_does(hard: Recipe) -> None:
    drawn = {
        (group.attrib["data-part"], group.attrib["data-phase"]): int(group.attrib["data-trained"])
        for group in parsed(draw_svg(hard)).iter(f"{SVG}g")
        if "data-part" in group.attrib
    }
    model = build_model(hard, seed=0)
    for phase in hard.phases:
        learning = set_trainable(model, phase.trainable, phase.frozen)
        for (address, named), trained in drawn.items():
            if named == phase.name:
                assert trained == sum(value.numel() for name, value in learning if name.startswith(address + ".")), (address, named)
    assert drawn["autoencoders.vae", "tune"] == 0
    assert drawn["ports.text", "connector"] == 0 < drawn["ports.text", "tune"]
    assert drawn["backbones.lm.experts.understand", "tune"] == 0 < drawn["backbones.lm.experts.generate", "tune"]


def test_a_partly_frozen_part_says_how_much_learns(hard: Recipe) -> None:
    """Embedding and head of a port are of one size, so without its head a half of it learns."""
    assert "50% learns" in [text.text for text in parsed(draw_svg(hard)).iter(f"{SVG}text")]


def test_counts_are_those_of_the_built_modules(hard: Recipe) -> None:
    model = build_model(hard, seed=0)
    autoencoder = hard.autoencoders["vae"].build()
    total = sum(value.numel() for value in model.parameters())
    assert model_size(hard) == total
    assert sum(weights_of(hard).values()) == total + sum(value.numel() for value in autoencoder.parameters())
    assert sum(part.parameters for part in parts_of(hard)) == sum(weights_of(hard).values()), "every weight belongs to one part"


def test_the_size_of_a_tokenizer_is_without_its_discriminator() -> None:
    recipe = load_recipe("vqgan", size="paper")
    autoencoder = sum(value.numel() for name, value in _meta_named(recipe) if name.startswith("autoencoders."))
    assert model_size(recipe) == autoencoder < sum(weights_of(recipe).values())


def _meta_named(recipe: Recipe) -> list[tuple[str, torch.Tensor]]:
    with torch.device("meta"):
        return [
            (f"autoencoders.{key}", value) for config in recipe.autoencoders.values() for key, value in config.build().named_parameters()
        ]


def test_the_example_shows_which_tokens_are_judged_and_where_they_are_read(hard: Recipe) -> None:
    (example,) = examples_of(hard)
    noisy, clean, caption = (example.segments[place] for place in (3, 6, 8))
    assert noisy.supervised == (True,) * 12 and noisy.reads == tuple(range(noisy.start, noisy.start + 12))
    assert clean.supervised == (False,) * 12 and clean.objective == ""
    assert caption.reads == tuple(range(caption.start - 1, caption.start - 1 + len(caption.labels))), "each word is read one row before it"
    assert caption.labels == ("a", "red", "circle", "above", "a", "blue", "square")
    assert (noisy.expert, caption.expert) == ("generate", "understand")


def test_an_example_is_never_left_without_its_conditions(hard: Recipe) -> None:
    (example,) = examples_of(hard)
    assert example.segments[1].cond_dropout_prob == 0.25
    chance = NothingDrawn()
    assert chance.random() == 1.0
    order = [3, 1, 2]
    chance.shuffle(order)
    assert order == [3, 1, 2] and isinstance(chance, random.Random)


def test_a_mask_port_shows_only_what_was_hidden() -> None:
    example = next(entry for entry in examples_of(load_recipe("show-o", size="tiny")) if entry.task == "draw")
    codes = next(drawn for drawn in example.segments if drawn.port == "codes")
    assert 1 <= sum(codes.supervised) <= 12 and codes.segment.grid == (3, 4)


def test_two_drawings_share_a_page_without_sharing_names(hard: Recipe) -> None:
    """Ids differ, classes are prefixed, every rule of the style is scoped to the drawing."""
    first, second = draw_svg(hard), draw_svg(load_recipe("transfusion", size="tiny"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= own
        assert {name for words in re.findall(r'class="([^"]+)"', svg) for name in words.split()} - {"mmd"} <= {
            name for name in re.findall(r"mmd-\w+", svg)
        }
        style = re.search(r"<style>(.*?)</style>", svg, re.S)
        assert style is not None
        selectors = [rule.split("{")[0].strip() for rule in re.split(r"\}", style[1]) if "{" in rule]
        assert all(selector.startswith(("svg.mmd", "@media (prefers-color-scheme: dark)")) for selector in selectors)


def test_a_drawing_is_the_same_every_time(hard: Recipe) -> None:
    assert draw_svg(hard) == draw_svg(hard)


def test_words_from_a_recipe_are_escaped(hard: Recipe) -> None:
    texts = [text.text for text in parsed(draw_svg(hard)).iter(f"{SVG}text")]
    assert any(text and "<q>{instruction} & <more>" in text for text in texts)


def test_nothing_reaches_over_the_edge(hard: Recipe, tmp_path: Path) -> None:
    """Rectangles and texts lie within the page, with the widths that are assumed for texts."""
    for recipe in [hard, *(load_recipe(name, size="paper") for name in recipe_names())]:
        root = parsed(draw_svg(recipe))
        width = float(root.attrib["viewBox"].split()[2])
        for x, element in placed(root, 0.0):
            if element.tag == f"{SVG}rect":
                assert x >= 0 and x + float(element.attrib["width"]) <= width
            elif element.tag == f"{SVG}text":
                kinds = element.attrib.get("class", "")
                font = "mono" if "mono" in kinds else "bold" if "bold" in kinds else "sans"
                long = width_of(element.text or "", float(element.attrib["font-size"]), font)  # type: ignore[arg-type]
                left = x - (long if "mmd-end" in kinds else long / 2 if "mmd-mid" in kinds else 0)
                assert left >= 0 and left + long <= width, element.text


def placed(element: ET.Element, x: float) -> list[tuple[float, ET.Element]]:
    """Elements below with their x on the page; scaled groups (masks, marks) hold no words and are left out."""
    found = []
    for child in element:
        transform = child.attrib.get("transform", "")
        if child.tag in (f"{SVG}defs", f"{SVG}style") or "scale" in transform:
            continue
        moved = re.match(r"translate\(([-\d.]+) ", transform)
        here = x + (float(moved[1]) if moved else 0.0)
        found.append((here + float(child.attrib.get("x", 0.0)), child))
        found += placed(child, here)
    return found


def test_wrapped_lines_keep_every_letter_and_fit() -> None:
    words = "a sentence with averyveryverylongwordthatfitsnoline inside it"
    lines = wrap(words, 90, 12)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(width_of(line, 12) <= 90 for line in lines)


def test_a_drawing_is_written_as_svg_and_as_nothing_else(hard: Recipe, tmp_path: Path) -> None:
    out = draw(hard, tmp_path / "new" / "hard.svg")
    assert parsed(out.read_text()).tag == f"{SVG}svg"
    with pytest.raises(UsageError) as caught:
        draw(hard, tmp_path / "hard.png")
    assert "hard.svg" in caught.value.hint
