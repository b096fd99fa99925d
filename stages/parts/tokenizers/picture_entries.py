"""Entries of a released text vocabulary that are codes of pictures, as Chameleon and Emu3 have them: here codes are a port of their own."""

import json
import re

ENTRY = re.compile(r"IMGIMG([A-J]{1,9})Z|<\|visual token ([0-9]{1,9})\|>")
DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def code_of(entry: str) -> int | None:
    """The code that an entry is, None for a word: 8191 of IMGIMGIBJBZ and of <|visual token 008191|>."""
    found = ENTRY.fullmatch(entry)
    return int((found[1] or found[2]).translate(DIGITS)) if found else None


def without_codes(text: str) -> str:
    """A tokenizer.json without those entries; the others move up in their order. As it is where there are none."""
    if not ENTRY.search(text):
        return text
    table = json.loads(text)
    added = {entry["content"]: entry["id"] for entry in table["added_tokens"]}
    ids = {**table["model"]["vocab"], **added}
    words = sorted((id, entry) for entry, id in ids.items() if code_of(entry) is None)
    place = {entry: number for number, (_, entry) in enumerate(words)}
    table["model"]["vocab"] = {entry: place[entry] for entry in table["model"]["vocab"] if entry in place}
    table["added_tokens"] = [entry | {"id": place[entry["content"]]} for entry in table["added_tokens"] if entry["content"] in place]
    table["post_processor"] = None  # it adds special tokens by their old ids; here a recipe says where they stand
    return json.dumps(table)
