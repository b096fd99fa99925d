"""HTML as nested function calls: text is escaped by default, and only what `el` itself made passes as markup.

    el("p", {"class": "lead"}, "a < b ", el("b", {}, "bold"))   ->   <p class="lead">a &lt; b <b>bold</b></p>

Prompts, answers and file names come from data, so nothing reaches the page but through here.
"""

from collections.abc import Iterable, Mapping
from html import escape
from typing import TypeAlias

VOID = {"img", "input", "br", "meta"}  # of HTML; SVG closes everything


class Markup(str):
    """Text that is markup already, and not escaped again."""


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def el(tag: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Markup:
    """One element. An attribute that is None or False is left out, True stands alone; children may be nested lists, None is nothing."""
    written = []
    for name, value in (attributes or {}).items():
        if value is not None and value is not False:
            written.append(f" {name}" if value is True else f' {name}="{escape(str(value))}"')
    opening = f"<{tag}{''.join(written)}>"
    return Markup(opening if tag in VOID and not children else f"{opening}{render(children)}</{tag}>")


def render(child: Child) -> str:
    """A child, or a nest of children, as escaped text."""
    if child is None:
        return ""
    if isinstance(child, Markup):
        return str(child)
    if isinstance(child, str):
        return escape(child)
    if isinstance(child, int | float):
        return str(child)
    return "".join(render(inner) for inner in child)
