"""The page itself: what stands where. A section without content is left out; the order is from the answer to its reasons."""

import tempfile
from pathlib import Path
from typing import Any

from stages.drawing.figure import draw_recipe
from stages.files import replace_own
from stages.recipe import load_recipe
from stages.report import gallery, numbers
from stages.report.curves import curves
from stages.report.folders import Folder, chain, number, read_folders
from stages.report.html import Child, Markup, el
from stages.report.lineage import machine, provenance
from stages.report.pictures import Pictures
from stages.report.style import STYLE

# The page has neither scripts nor anything to fetch, and a browser lets nothing in it have any.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MARKER = '<meta name="generator" content="mmgen report">'  # by which a report is known that may be written again


def report(paths: list[Path], out: Path) -> Path:
    """Write one self-contained HTML page about the run folders `paths` (shards, checkpoints, samples, evaluations) to `out`.

    Everything is read from the files stages leave behind; nothing is computed anew but the verdicts beside the pictures.
    Raises UsageError for a path that is no run folder and where another file than a report has the name, DataError for a damaged one.
    """
    folders = read_folders(paths)
    replace_own(out, page(folders), MARKER)
    return out


def page(folders: list[Folder]) -> str:
    """The whole HTML document."""
    title, lead = title_of(folders), lead_of(folders)
    sections = list(sections_of(folders))
    links = [el("a", {"href": f"#{anchor}"}, name) for anchor, name, _, _ in sections]
    evaluated = [folder for folder in folders if folder.results]
    headline = numbers.tiles(evaluated[0]) if len(evaluated) == 1 else numbers.glance(folders)
    body = [
        el(
            "header",
            {},
            el("p", {"class": "over"}, "mmgen report"),
            el("h1", {}, title),
            el("p", {"class": "lead"}, lead) if lead else None,
            headline,
            numbers.legend(evaluated[0]) if len(evaluated) == 1 else None,
            el("nav", {"aria-label": "Sections"}, links) if len(links) > 1 else None,
        ),
        el("main", {}, [section(*entry) for entry in sections]),
        el(
            "footer",
            {},
            "Made by mmgen report from the files its stages left behind. Pictures and samples are the first ones, not selected ones.",
        ),
    ]
    head = [
        el("meta", {"charset": "utf-8"}),
        el("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}),
        el("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        el("meta", {"name": "generator", "content": "mmgen report"}),
        el("title", {}, f"{title} — mmgen report"),
        el("style", {}, Markup(STYLE)),
    ]
    return "<!doctype html>\n" + el("html", {"lang": "en"}, el("head", {}, head), el("body", {}, el("div", {"class": "page"}, body))) + "\n"


Section = tuple[str, str, str, Child]  # anchor, title, one line of introduction, content


def section(anchor: str, title: str, intro: str, content: Child) -> Markup:
    return el("section", {"id": anchor}, el("h2", {}, title), el("p", {"class": "intro"}, intro) if intro else None, content)


def sections_of(folders: list[Folder]) -> list[Section]:
    pictures = Pictures()
    sources = [folder for folder in folders if folder.kind == "shards"]
    made = [gallery.look_through(folder, limit=max(6, 12 // max(1, len(sources)))) for folder in sources]
    several = len(made) > 1

    def from_each(kind: str, cards: Any) -> list[Markup]:
        parts = []
        for entry in made:
            shown = getattr(entry, kind)
            if shown:
                count = f"the first {len(shown)} of {entry.total[kind]:,}" if entry.total[kind] > len(shown) else f"all {len(shown)}"
                heading = el(
                    "h3",
                    {},
                    f"{entry.folder.name} " if several else count.capitalize(),
                    el("span", {"class": "soft"}, count) if several else None,
                )
                parts.append(el("div", {"class": "group"}, heading, cards(entry, pictures)))
        return parts

    tables = numbers.results(folders)
    codes = [gallery.codes_chart(entry) for entry in made if entry.code_counts]
    usage = el("div", {"class": "charts"}, codes) if codes else None
    verdicts = any(gallery.scene_of(fields) is not None for entry in made for fields in entry.drawn)
    judged = "Each card: the prompt, the real picture, what the model drew" + (
        ", and the reader's verdict on every object." if verdicts else "."
    )
    entries: list[Section] = [
        ("pictures", "Pictures from prompts", judged, from_each("drawn", gallery.drawn_cards)),
        (
            "questions",
            "Questions answered",
            "The model's answer in bold; where it is wrong, the true one follows.",
            from_each("questions", gallery.question_cards),
        ),
        (
            "captions",
            "Captions written",
            "What the model says about a picture, above what is true.",
            from_each("captions", gallery.caption_cards),
        ),
        (
            "reconstructions",
            "Reconstructions",
            "Pictures after a round trip through the tokenizer.",
            from_each("reconstructions", gallery.reconstruction_cards),
        ),
        (
            "results",
            "Results",
            "Every number beside its controls: the same model before training, and the same outputs held against other prompts.",
            tables,
        ),
        ("curves", "Training curves", "", curves(folders)),
        ("codebook", "Codebook usage", "How often each code occurs; a flat area would be equal use.", usage),
        (
            "layout",
            "Sequence layout and mask",
            "What one training example looks like to the network, and which token may attend to which.",
            layouts(folders),
        ),
        (
            "provenance",
            "Where this comes from",
            "Every run on the way here, from the import on, with the command that repeats it.",
            [provenance(folders), machine(folders), recipes(folders)],
        ),
    ]
    return [entry for entry in entries if has_content(entry[3])]


def has_content(child: Child) -> bool:
    if isinstance(child, list):
        return any(has_content(inner) for inner in child)
    return bool(child)


# --- the words at the top ---------------------------------------------------------------------------------------------------------


def recipes_of(folders: list[Folder]) -> dict[str, dict[str, Any]]:
    """Resolved recipes of what the report is about, TOML text -> tables: the networks shown, else the tokenizers; of samples and
    scores those they descend from."""
    own = {folder.recipe_toml: folder.recipe for folder in folders if folder.recipe_toml}
    if not own:
        records = [Folder(Path(link.path), "checkpoint", dict(link.record)) for link in chain(folders)]
        own = {record.recipe_toml: record.recipe for record in records if record.recipe_toml}
    for kind in ("backbones", "autoencoders"):
        of_kind = {toml: recipe for toml, recipe in own.items() if recipe.get(kind)}
        if of_kind:
            return of_kind
    return own


def title_of(folders: list[Folder]) -> str:
    found = list(dict.fromkeys((str(recipe.get("name", "")), str(recipe.get("size", ""))) for recipe in recipes_of(folders).values()))
    if len(found) == 1 and found[0][0]:
        name, size = found[0]
        return f"{name}, {size}" if size else name
    if names := list(dict.fromkeys(name for name, _ in found if name)):
        return " · ".join(names)
    return folders[0].name if len(folders) == 1 else f"{len(folders)} runs"


def lead_of(folders: list[Folder]) -> str:
    """A sentence or two on what this is, made of what the files say and nothing else."""
    recipes = list(recipes_of(folders).values())
    said = []
    if len(recipes) == 1:
        paper, tasks = recipes[0].get("paper", {}), list(recipes[0].get("tasks", {}))
        what = "One network" if recipes[0].get("backbones") else "An image tokenizer" if recipes[0].get("autoencoders") else "A model"
        source = f"“{paper['title']}”" if paper.get("title") else f"arXiv:{paper['arxiv']}" if paper.get("arxiv") else ""
        said.append(what + (f" after {source}" if source else "") + (f"; its tasks: {', '.join(tasks)}" if tasks else ""))
    elif recipes:
        said.append(f"{len(recipes)} recipes side by side")
    trained = [(folder.step, training_seconds(folder)) for folder in folders if folder.metrics and folder.step]
    if len(trained) == 1:
        steps, seconds = trained[0]
        said.append(f"Trained for {steps:,} steps" + (f" in {spoken_time(seconds)}" if seconds else ""))
    splits = list(dict.fromkeys(row["split"] for folder in folders for row in folder.results if row["split"]))
    if splits:
        said.append(f"Judged on {'the split' if len(splits) == 1 else 'the splits'} {listed(splits)}")
    return ". ".join(said) + "." if said else ""


def training_seconds(folder: Folder) -> float:
    return max((number(line.get("seconds")) or 0.0 for line in folder.metrics), default=0.0)


def spoken_time(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- the recipe -------------------------------------------------------------------------------------------------------------------


def recipes(folders: list[Folder]) -> list[Markup]:
    """The resolved recipes, folded away."""
    return [
        el(
            "details",
            {"class": "recipe"},
            el("summary", {}, f"Resolved recipe: {recipe.get('name', 'unnamed')}"),
            el("pre", {"tabindex": 0}, el("code", {}, toml)),
        )
        for toml, recipe in recipes_of(folders).items()
    ]


def layouts(folders: list[Folder]) -> list[Markup]:
    """The drawing of every network's recipe, made by the code that runs it."""
    drawings = []
    for toml, recipe in recipes_of(folders).items():
        if recipe.get("ports"):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "recipe.toml"
                file.write_text(toml, encoding="utf-8", errors="backslashreplace")
                try:
                    drawing: Child = draw_recipe(load_recipe(file))
                except Exception as error:  # of another version or from anywhere: the page goes without the drawing
                    drawing = el("p", {}, f"This recipe cannot be drawn: {str(error).replace(str(file), 'recipe')}")
            drawings.append(el("figure", {"class": "drawing", "tabindex": 0}, drawing))
    return drawings
