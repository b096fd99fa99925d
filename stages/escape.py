"""Text that comes from outside, written so that it stays text: on a terminal, in HTML and SVG, Markdown, YAML, JSON, as a file's name.

Names, keys, captions, answers, recipes, records and the messages of servers are outside text. Each place where it appears has one
function here, and nothing else in mmgen escapes by itself.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from html import escape
from typing import Any, TypeAlias

# What a terminal or a viewer obeys instead of showing: control characters, line separators, bidirectional overrides and isolates,
# annotations; and what is no character at all (halves of a surrogate pair, U+FFFE, U+FFFF). Invisible joiners and marks belong to
# other scripts and to emoji: there, after such a character, they stay.
_OBEYED = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff\ufffe\uffff"
_JOINERS = "\u061c\u200b-\u200f\u2060-\u2065\ufeff"
_OTHER_SCRIPTS = "\u0300-\u061b\u061d-\u1fff\u2070-\ud7ff\ue000-\ufefe\uff00-\ufff8\ufffc\ufffd\U00010000-\U0010ffff"
_UNSAFE = re.compile(f"[{_OBEYED}]|(?<![{_OTHER_SCRIPTS}])[{_JOINERS}]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

_YAML_WORDS = frozenset(
    ["y", "n", "yes", "no", "on", "off", "true", "false", "null"]
)  # what YAML reads as something else than these letters

MAX_NAME_BYTES = 200  # of the 255 most file systems allow, with room for an ending
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names Windows keeps for devices


def visible(text: str, keep: str = "") -> str:
    r"""The text with what is obeyed rather than shown written out, as `\n`, `\t`, `\u001b`; by itself always one line.

    keep: characters that stay as they are, such as "\n" for a text that was put together from lines. Doing it twice changes nothing.
    The escapes are those of JSON, so JSON stays the same value.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", text)


def lines_of(lines: Iterable[str]) -> str:
    """Lines as a text of as many lines, whatever they hold."""
    return "\n".join(map(visible, lines))


def json_text(value: Any, *, ascii: bool = False, indent: int | None = None) -> str:
    """JSON that no terminal obeys; letters of every script stay readable unless it is to be ASCII.

    A number that is not finite becomes null: JSON has no other word for it.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii, indent=indent, allow_nan=False)
    except ValueError:
        value = json.loads(json.dumps(value), parse_constant=lambda name: None)
        text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    return visible(text, keep="\n")


# --- HTML and SVG -----------------------------------------------------------------------------------------------------------------


class Markup(str):
    """Text that is markup already, and not escaped again."""


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def markup_text(text: object) -> str:
    """Text between tags or inside a quoted attribute of HTML or XML; line breaks and tabs stay."""
    return escape(visible(str(text), keep="\n\t"))


def render(child: Child) -> str:
    """A child of an element, or a nest of children, as escaped text; only Markup passes as it is."""
    if child is None:
        return ""
    if isinstance(child, Markup):
        return str(child)
    if isinstance(child, str):
        return markup_text(child)
    if isinstance(child, int | float):
        return str(child)
    return "".join(render(inner) for inner in child)


# --- Markdown and YAML ------------------------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """One line of Markdown that shows the text: no heading, link, image, HTML, table cell or emphasis comes of it.

    Words between single backquotes stay code, in which nothing else has a meaning. It may stand at the start of a line or an item.
    """
    pieces = re.split(r"(`[^`|]+`)", visible(text).strip())
    pieces[::2] = [_plain_markdown(piece) for piece in pieces[::2]]
    line = "".join(pieces)
    return re.sub(r"^(?=>|#{1,6}(?:\s|$)|[-+](?:\s|$)|-+\s*$|=+\s*$)|^(\d+)(?=[.)](?:\s|$))", r"\1\\", line)


def _plain_markdown(text: str) -> str:
    text = re.sub(r"[\\*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace("`", "&#96;")
    return re.sub(r"(?i)(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", "<!-- -->", text)  # or an address becomes a link without being asked to


def code_span(text: str) -> str:
    """The text as code in a line of Markdown, whatever backquotes it holds."""
    text = visible(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{room}{text}{room}{fence}"


def yaml_text(value: object) -> str:
    """A string as a value in YAML: as it is where YAML reads it as that string, otherwise in quotes."""
    text = visible(str(value))
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./*-]*", text) and text.lower() not in _YAML_WORDS
    return text if plain else json.dumps(text, ensure_ascii=False)


# --- names of files ---------------------------------------------------------------------------------------------------------------


def file_name(text: str) -> str:
    """A name for a file or folder, without an ending, that stays in its folder on every common system.

    A text that is such a name is its own; of another the unfit characters become `-`, and a part of its hash is added, so that two
    texts never share a name.
    """
    name = re.sub(r'[/\\:*?"<>|\s]+', "-", re.sub(_UNSAFE, "-", text)).strip("-. ")
    name = name.encode("utf-8")[:MAX_NAME_BYTES].decode("utf-8", "ignore")
    if name == text and name and not _RESERVED.fullmatch(name):
        return name
    return f"{name or 'x'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
