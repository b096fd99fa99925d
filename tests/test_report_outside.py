"""A report about runs from anywhere: whatever their files hold, the page has the elements we made and shows the rest as text."""

import contextlib
import copy
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from worlds import MIXED, recipe_from

from stages.data.sample import Sample
from stages.data.shards import ShardWriter
from stages.draw import draw_svg
from stages.errors import MmgenError
from stages.escape import visible
from stages.report import report

PICTURE = np.full((8, 8, 3), 90, np.uint8)
ATTACKS = [
    "<script>alert(1)</script>",
    "</title></style></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus=alert(1) autofocus tabindex=0 '",
    "javascript:alert(1)//<a href=javascript:alert(1)>",
    "]]><!--<iframe srcdoc='<script>'>",
    "&lt;script&gt;&#60;b&#62;",
    "url(https://evil.example/x);}</style><link rel=stylesheet href=//evil.example>",
    "x\x1b[2J\x00\x0b\ufffe\ud800\u202e",
]


def files_with(word: str) -> dict[str, Any]:
    """Every file of a run, a text of its own wherever a file holds one."""
    recipe = {
        "name": word,
        "size": word,
        "paper": {"title": word, "arxiv": word},
        "tasks": {word: {}},
        "autoencoders": {word: {"kind": word}},
    }
    started, finished = "2026-01-01T00:00:00+00:00", "2026-01-01T01:00:00+00:00"
    nested = {"stage": word, "command": [word, f"--{word}"], "started": started, "inputs": [{"path": word, "fingerprint": word}]}
    imported = {"importer": word, "arguments": {word: word, "source": word}, "fingerprint": word, "licence": word}
    record = {
        "stage": word,
        "command": [word, f"--{word}", word],
        "seed": word,
        "recipe": toml_of(recipe),
        "inputs": [
            {"role": word, "path": word, "fingerprint": word, "provenance": nested},
            {"path": word, "fingerprint": "f", "provenance": imported},
        ],
        "versions": {word: word},
        "git_commit": word,
        "machine": {"platform": word, "processor": word, "cpus": 2, "threads": 2, "gpus": [word]},
        "started": started,
        "finished": finished,
    }
    row = {"metric": word, "category": word, "split": word, "n": 3, "value": 0.5, "interval": [0.4, 0.6], "chance": 0.1, "control": None}
    protocol = {word: word, "list": [word], "sampling": {word: {word: word}}}
    known = {**row, "metric": "scene-accuracy", "category": "objects", "protocol": protocol}
    rows = [{**row, "protocol": protocol}, known, {**known, "control": "untrained", "value": 0.1}]
    timed = {"encode_per_second": 3.0, "decode_per_second": 4.0, "height": 8, "width": word, "device": word, "batch": word}
    metrics = [
        {"step": step, "phase": word, "seconds": 2.0, f"loss/{word}": 1.0 / step, word: step, "lr": 0.1 * step} for step in (1, 2, 3)
    ]
    return {
        "run.json": record,
        "status.json": {"state": word, "step": 3, "message": word},
        "results.json": {"inputs": [], "results": rows},
        "metrics.jsonl": [*metrics, timed],
    }


def toml_of(tables: dict[str, Any]) -> str:
    """Tables as TOML: JSON's strings are TOML's, but for halves of a pair, which TOML has not."""

    def value(inner: Any) -> str:
        if isinstance(inner, dict):
            return "{" + ", ".join(f"{value(key)} = {value(entry)}" for key, entry in inner.items()) + "}"
        return json.dumps(inner.encode("utf-8", "replace").decode(), ensure_ascii=False).replace("\x7f", "\\u007f")

    return "\n".join(f"{name} = {value(inner)}" for name, inner in tables.items())


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        lines = content if name.endswith(".jsonl") else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def samples_with(folder: Path, word: str) -> Path:
    qa = [{"question": word, "answer": word, "truth": f"{word}!", "type": word}]
    scene = {"level": 1, "count": 1, "objects": [{name: word for name in ("size", "texture", "colour", "shape", "place")}]}
    with ShardWriter(folder) as writer:
        about = {"caption": word, "scene": scene}
        writer.write(
            Sample(
                "a",
                {**about, "image": PICTURE, "sample.image": PICTURE, "sample.qa": qa, "sample.caption": word, "meta": {"tasks": [word]}},
            )
        )
        writer.write(
            Sample(
                "b",
                {
                    **about,
                    "image": PICTURE,
                    "sample.image": PICTURE,
                    "sample.qa": qa,
                    "sample.caption": word,
                    "meta": {"tasks": ["reconstruct"]},
                },
            )
        )
    return folder


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.addresses: list[str] = []
        self.values: list[str] = []
        self.styles: list[str] = []
        self.text, self.others = "", 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcset", "data", "xlink:href")]
        self.styles += [value or "" for name, value in attrs if name == "style"]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.others += 1

    handle_pi = unknown_decl = handle_comment


def page_of(word: str) -> tuple[Page, str]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        out = root / "page.html"
        text = visible(word).replace("\0", "") or "-"  # a sample's text holds neither halves of a pair nor NUL
        places = [write(root / "run", files_with(word)), samples_with(root / "samples", text)]
        html = report(places, out).read_text(encoding="utf-8")
    return Page(html), html


@cache
def harmless() -> Page:
    return page_of("word")[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.text(st.characters(codec=None), min_size=1, max_size=20),
        st.lists(st.sampled_from(ATTACKS), min_size=1, max_size=2).map(" ".join),
    )
)
@example(" ".join(ATTACKS))
def test_no_text_in_any_field_becomes_an_element_an_attribute_or_an_address(word: str) -> None:
    word = f"q{word}q"
    page, html = page_of(word)
    assert set(page.tags) == set(harmless().tags)
    assert [entry for entry in page.tags if entry[0] in ("meta", "style", "svg", "img", "a")] == [
        entry for entry in harmless().tags if entry[0] in ("meta", "style", "svg", "img", "a")
    ]
    assert page.others == harmless().others
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert all(re.fullmatch(r"(left|width):[\d.]+%(;width:[\d.]+%)?", style) for style in page.styles)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", html)
    shown = visible(word, keep="\n\t")
    assert page.text.count(shown) > 20
    assert any(shown in value for value in page.values)


def test_the_page_forbids_scripts_and_everything_outside() -> None:
    _, html = page_of("word")
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.replace("&#x27;", "'").split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "script-src" not in rules
    assert html.index("Content-Security-Policy") < html.index("<title>")


# --- numbers that are none, and files that hold anything --------------------------------------------------------------------------

NO_NUMBERS = [
    "<b>",
    "12",
    None,
    [],
    [1, 2],
    {},
    {"a": 1},
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    -(10**400),
    1e308,
    -1e308,
    5e-324,
    True,
    "",
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The addresses of everything in a nest of lists and dicts, itself included."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(inner, (*path, key))


def replaced(files: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    files = copy.deepcopy(files)
    place: Any = files
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return files


def is_numeric(files: dict[str, Any], path: tuple[Any, ...]) -> bool:
    value: Any = files
    for key in path:
        value = value[key]
    return isinstance(value, int | float)


def tell(folder: Path, files: dict[str, Any]) -> str:
    """The text of the page about a run with these files."""
    return Page(report([write(folder / "run", files)], folder / "page.html").read_text(encoding="utf-8")).text


def test_a_number_that_is_none_shows_as_a_dash_or_not_at_all(tmp_path: Path) -> None:
    """Every number of every file alone, and all of them at once."""
    files = files_with("word")
    paths = [path for path in leaves(files) if path and is_numeric(files, path)]
    changes = [([path], NO_NUMBERS[(7 * place) % len(NO_NUMBERS)]) for place, path in enumerate(paths)]
    for several, value in changes + [(paths, value) for value in NO_NUMBERS]:
        changed = files
        for path in several:
            changed = replaced(changed, path, value)
        assert not re.search(r"\b(nan|inf)\b", tell(tmp_path, changed)), (several, value)
    assert "—" in tell(tmp_path, replaced(files, ("results.json", "results", 1, "value"), "<b>"))


def test_a_file_with_anything_anywhere_gives_a_page_or_one_message(tmp_path: Path) -> None:
    """Every value of every file in turn is replaced by something else; several at once, by chance."""
    files, chance = files_with("word"), random.Random(0)
    paths = [path for path in leaves(files) if len(path) > 1]
    changes: list[list[tuple[Any, ...]]] = [[path] for path in paths] + [chance.sample(paths, 3) for _ in range(40)]
    for several in changes:
        changed = files
        for path in sorted(several, key=len, reverse=True):
            try:
                changed = replaced(
                    changed, path, chance.choice([*NO_NUMBERS, 7, -1, "x" * 70, {"fingerprint": 1, "path": 2, "provenance": 3}])
                )
            except (KeyError, IndexError, TypeError):
                continue
        with contextlib.suppress(MmgenError):
            tell(tmp_path, changed)


@pytest.mark.parametrize("name", ["run.json", "status.json", "results.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "\xff\xfe"])
def test_a_file_that_is_no_object_is_one_message(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / "run", files_with("word"))
    (tmp_path / "run" / name).write_text(content, encoding="latin-1")
    with pytest.raises(MmgenError, match=name):
        report([tmp_path / "run"], tmp_path / "page.html")


def test_records_that_name_each_other_end(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        record = {"stage": name, "inputs": [{"path": str(tmp_path / other), "fingerprint": "f"}] * 2}
        write(tmp_path / name, {"run.json": record})
    assert "One" in Page(report([tmp_path / "one"], tmp_path / "page.html").read_text()).text
    deep: dict[str, Any] = {"stage": "deepest", "command": ["x"]}
    for _ in range(300):
        deep = {"stage": "s", "command": ["x"], "inputs": [{"path": "p", "fingerprint": "f", "provenance": deep}]}
    write(tmp_path / "deep", {"run.json": deep})
    report([tmp_path / "deep"], tmp_path / "page.html")


@pytest.mark.parametrize(
    "fields",
    [
        {"sample.image": np.zeros((2, 3, 4, 5), np.float32), "image": PICTURE},
        {"sample.image": np.zeros(3, np.float32)},
        {"sample.qa": {"question": 1}, "image": PICTURE},
        {"sample.qa": [1, {"answer": [1]}, {"answer": None, "truth": {}}], "image": PICTURE},
        {"sample.caption": ["a", 3], "image": PICTURE},
        {"sample.caption": "a", "caption": 3, "image": PICTURE, "scene": {"level": 99, "objects": [1]}},
        {"sample.image": PICTURE, "image": np.zeros((4, 4, 3), np.uint8), "meta": {"tasks": ["reconstruct"]}},
        {"sample.image": PICTURE, "image": PICTURE, "meta": {"tasks": 3}},
        {"sample.image": PICTURE, "meta": 3, "scene": [1]},
        {
            "sample.image": PICTURE,
            "scene": {"level": 1, "objects": [{"size": "large", "texture": "plain", "colour": [1], "shape": 3, "place": "x"}]},
        },
    ],
)
def test_samples_whose_fields_are_of_another_kind_do_not_break_the_page(tmp_path: Path, fields: dict[str, Any]) -> None:
    with ShardWriter(tmp_path / "samples", codebook_sizes={"image.codes": 4}) as writer:
        writer.write(Sample("a", {**fields, "image.codes": np.array([[0, 3, -1, 99]])}))
    report([tmp_path / "samples"], tmp_path / "page.html")


# --- drawings ---------------------------------------------------------------------------------------------------------------------


def hostile_recipe(word: Callable[[str], str]) -> str:
    """MIXED with names of another's choice: of the recipe, its tasks, a port, an expert, a phase, a part, and with its texts."""
    text = MIXED.replace('arxiv = "0000.00000"', f"arxiv = {word('arxiv')}\ntitle = {word('title')}\ndiffers = [{word('differs')}]")
    text = text.replace("[tasks.draw]", f"[tasks.{word('task')}]").replace("draw = 1.0", f"{word('task')} = 1.0")
    text = text.replace('name = "joint"', f"name = {word('phase')}").replace('"words"', word("expert"))
    text = text.replace("[ports.latents]", f"[ports.{word('port')}]").replace('port = "latents"', f"port = {word('port')}")
    text = text.replace("[sample.latents]", f"[sample.{word('port')}]").replace(
        "{comment}<eot>", "{comment}<eot><img src=x onerror=alert(1)>"
    )
    return f"name = {word('name')}\n{text}"


TEXTS = ("name", "arxiv", "title", "differs")  # what may be any text; the names of parts, ports and tasks are checked when a recipe is read


@pytest.mark.parametrize("attack", [entry.replace(".", "") for entry in ATTACKS])
def test_a_drawing_is_well_formed_and_holds_no_element_but_ours(attack: str) -> None:
    attack = attack.encode("utf-8", "replace").decode()
    drawing = draw_svg(
        recipe_from(hostile_recipe(lambda key: toml_of({"a": f"{key} {attack}" if key in TEXTS else key}).removeprefix("a = ")))
    )
    root = ElementTree.fromstring(drawing)
    local = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert local <= {"svg", "title", "desc", "style", "defs", "pattern", "g", "rect", "text", "path", "circle"}
    names = {name for element in root.iter() for name in element.attrib}
    assert not {name for name in names if name.startswith("on") or "href" in name}
    assert visible(f"name {attack}", keep="\n\t") in {
        "".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")
    }
    assert sum(element.tag.endswith("style") for element in root.iter()) == 1
