"""HTML as nested function calls: text is escaped by default, and only what `el` itself made passes as markup.

    el("p", {"class": "lead"}, "a < b ", el("b", {}, "bold"))   ->   <p class="lead">a &lt; b <b>bold</b></p>

Prompts, answers and file names come from data, so nothing reaches the page but through here.
"""

from collections.abc import Mapping

from stages.escape import Child, Markup, markup_text, render

__all__ = ["Child", "Markup", "el", "render"]

VOID = {"img", "input", "br", "meta"}  # of HTML; SVG closes everything


def el(tag: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Markup:
    """One element. An attribute that is None or False is left out, True stands alone; children may be nested lists, None is nothing."""
    written = []
    for name, value in (attributes or {}).items():
        if value is not None and value is not False:
            written.append(f" {name}" if value is True else f' {name}="{markup_text(value)}"')
    opening = f"<{tag}{''.join(written)}>"
    return Markup(opening if tag in VOID and not children else f"{opening}{render(children)}</{tag}>")
