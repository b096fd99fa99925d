"""Outside text stays text: what each place would obey is found by a parser of that place, not by looking for known attacks."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stages.drawing import svg
from stages.escape import MAX_NAME_BYTES, Markup, code_span, file_name, json_text, lines_of, markdown, render, visible, yaml_text
from stages.report.html import el

OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# letters, marks of every syntax, what terminals obey, halves of pairs
ANY = st.text(
    st.one_of(st.characters(codec=None), st.sampled_from("\\`*_{}[]()#+-.!|<>~$&;:/@'\"=\n\r\t \x1b\x9b\u202e\u2066\u200d")), max_size=40
)
PIECES = [
    "<b>",
    "</script>",
    "<!--",
    "]]>",
    "&lt;",
    "&#60;",
    "`",
    "``",
    "[a](b)",
    "![a](b)",
    "# ",
    "- ",
    "1. ",
    "---",
    "***",
    "|",
    "\n",
    "  ",
    "\\",
    "*a*",
]
PIECES += ["_a_", "~~a~~", "<http://a.b>", "word", "javascript:x", "2) ", "===", "> ", '"', "'", "x: y", "\t", "\u2028", "é", "猫"]
TEXTS = st.one_of(ANY, st.lists(st.sampled_from(PIECES), max_size=7).map("".join))


@given(TEXTS)
@example("\u202e\u200d\u061c\u200d")
def test_visible_is_one_line_that_nothing_obeys_and_stays_as_it_is(text: str) -> None:
    shown = visible(text)
    assert OBEYED.search(shown) is None
    assert visible(shown) == shown
    assert len(lines_of([text, text]).split("\n")) == 2


@pytest.mark.parametrize(
    "text", ["猫在左边", "قطة حمراء", "می‌خواهم", "👩‍👩‍👧 🏴‍☠️", "naïve – “quoted”", "ก\u200bข", "עברית\u200f!", 'C:\\new "a"']
)
def test_letters_of_every_script_stay_as_they_are(text: str) -> None:
    assert visible(text) == text
    assert render(text).replace("&quot;", '"') == text


@pytest.mark.parametrize("text", ["e\u200drror", "\ufefferror", "a\u200bb", "x\u200f", "\u061c1"])
def test_invisible_characters_cannot_hide_among_plain_letters(text: str) -> None:
    assert visible(text).isascii()


@given(
    st.recursive(st.one_of(TEXTS, st.integers(), st.none()), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=5)
)
def test_json_text_is_the_same_value_and_nothing_obeys_it(value: Any) -> None:
    text = json_text(value)
    assert json.loads(text) == value
    assert OBEYED.search(text) is None
    assert json.loads(json_text(value, indent=1)) == value


# --- HTML and SVG -----------------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text, self.others = "", 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.others += 1

    handle_decl = handle_pi = unknown_decl = handle_comment


@given(TEXTS)
def test_text_in_html_is_text_and_in_an_attribute_its_value(text: str) -> None:
    seen = Seen(el("p", {"title": text}, text, el("b", {}, [text])))
    assert [tag for tag, _ in seen.tags] == ["p", "b"]
    assert seen.tags[0][1] == [("title", visible(text, keep="\n\t"))]
    assert seen.text == 2 * visible(text, keep="\n\t")
    assert seen.others == 0


@given(TEXTS)
def test_text_in_a_drawing_is_well_formed_xml(text: str) -> None:
    drawing = svg.el("svg", [svg.el("title", text), svg.text(0, 0, text), svg.rect(0, 0, 1, 1, "box", title=text)], data_task=text or "-")
    root = ElementTree.fromstring(drawing)
    assert [child.tag for child in root] == ["title", "text", "rect"]
    assert (root[0].text or "") == (root[1].text or "") == visible(text, keep="\n\t")
    assert [(child.tag, child.text or "") for child in root[2]] == ([("title", visible(text, keep="\n\t"))] if text else [])


def test_only_markup_passes_as_markup() -> None:
    assert render(["<i>", Markup("<i>"), None, 3]) == "&lt;i&gt;<i>3"
    assert svg.group(["<script>"]) == "<g>&lt;script&gt;</g>"


# --- Markdown and YAML ------------------------------------------------------------------------------------------------------------

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
OURS = re.compile(r"<!-- -->")


def inline(source: str) -> tuple[list[str], list[str], list[str]]:
    """(block tokens, kinds of inline tokens, texts of the inline blocks) of a piece of Markdown."""
    tokens = PARSER.parse(source)
    blocks = [token.type for token in tokens if token.type != "inline"]
    kinds, texts = [], []
    for token in tokens:
        if token.type == "inline":
            children = token.children or []
            kinds += [child.type for child in children if not (child.type == "html_inline" and OURS.fullmatch(child.content))]
            texts.append("".join(child.content for child in children if child.type != "html_inline"))
    return blocks, kinds, texts


PLACES = {
    "# %s\n": "heading",
    "- %s\n": "list",
    "%s\n": "paragraph",
    "| a | b |\n|---|---|\n| %s | x |\n": "table",
    "a *%s*.\n": "paragraph",
}


@given(TEXTS, st.sampled_from(sorted(PLACES)))
@example("` `` <b>", "%s\n")
@example("\\`<b>`", "- %s\n")
def test_markdown_shows_the_text_and_makes_nothing_of_it(text: str, place: str) -> None:
    blocks, kinds, texts = inline(place % markdown(text))
    plain_blocks, plain_kinds, _ = inline(place % "word")
    if visible(text).strip():
        assert blocks == plain_blocks
    assert set(kinds) <= {"text", "code_inline", "text_special"} | set(plain_kinds), kinds
    if place == "%s\n" and "`" not in text and visible(text).strip():
        assert texts == [visible(text).strip()]


@pytest.mark.parametrize("text", ["see https://evil.example/x", "WWW.evil.example", "a@evil.example", "ftp://x.y"])
def test_an_address_does_not_become_a_link(text: str) -> None:
    assert not re.search(r"(?i)://|\bwww\.|\w@", markdown(text))


@given(TEXTS)
def test_a_code_span_holds_the_text_whatever_quotes_it_has(text: str) -> None:
    tokens = PARSER.parse(f"a {code_span(text)} b")
    children = tokens[1].children or []
    assert [child.type for child in children] == ["text", "code_inline", "text"]
    if text.strip():
        assert children[1].content.strip() == visible(text).strip()


@given(TEXTS)
@example("no")
@example("2014")
@example("a: b\nc: d")
@example("mit\n---\n# x")
def test_a_value_in_front_matter_is_that_string(text: str) -> None:
    read = yaml.safe_load(f"- split: {yaml_text(text)}\n  path: 1\n")
    assert read == [{"split": visible(text), "path": 1}]


@pytest.mark.parametrize("text", ["train", "val/*.tar", "cc-by-sa-4.0", "apache-2.0"])
def test_ordinary_values_are_written_as_before(text: str) -> None:
    assert yaml_text(text) == markdown(text.replace("*", "x")).replace("x.tar", "*.tar") == text
    assert code_span(text) == f"`{text}`"


# --- names of files ---------------------------------------------------------------------------------------------------------------


@given(TEXTS)
@example("../../etc/passwd")
@example("a" * 3000)
@example("猫" * 300)
@example("CON")
def test_a_file_name_stays_in_its_folder(text: str) -> None:
    name = file_name(text)
    assert Path(name).name == name
    assert name not in ("", ".", "..")
    assert not re.search(r'[/\\:*?"<>|\s]', name)
    assert OBEYED.search(name) is None
    assert len(name.encode()) <= MAX_NAME_BYTES + 9
    assert not name.startswith((".", "-"))


@given(TEXTS, TEXTS)
@example("a/b", "a-b")
def test_two_texts_never_share_a_file_name(first: str, second: str) -> None:
    assert (file_name(first) == file_name(second)) == (first == second)


@pytest.mark.parametrize("name", ["000017.image", "cat_1-a.caption", "猫.image"])
def test_an_ordinary_name_is_kept(name: str) -> None:
    assert file_name(name) == name
