"""The ladder: what has been shown about each recipe. Its cells are test results, never typed by hand.

    described   the recipe loads and can be drawn                     sized   at size paper it has the published parameter count (2 %)
    learns      it overfits a batch and gives it back when sampled    agrees  copied weights give the outputs of a public reference class
    works       trained on a CPU it beats a stated score on prompts that were held out

A test says which rung of which recipe it proves:

    @pytest.mark.rung("agrees", "clip")            one recipe, or several
    @pytest.mark.rung("learns")                    the recipe is the test's parameter called `recipe` or `name`

`make ladder` (python -m stages.ladder) runs the tests of every rung whose result is missing or stale and writes `recipes/ladder.json`:
for each rung the tests, whether all of them passed, the date, and a hash of the TOML and of the code that was used. `table` believes a
result only while that hash still holds; a stale result, a test that was skipped or never run is null, never true. An expected failure
(xfail) is a rung that was tried and not reached: false.
"""

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stages.anatomy import count_words, model_size
from stages.documents import read_object_if_any
from stages.errors import MmgenError, UsageError, nearest
from stages.files import write_atomic
from stages.recipe import RECIPES, SIZES, Recipe, Stage, load_recipe, recipe_names
from stages.terminal import put, tell

RUNGS = ("described", "sized", "learns", "agrees", "works")
LADDER = RECIPES / "ladder.json"
ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
SECTION = ("<!-- systems -->", "<!-- /systems -->")  # of README.md; what stands between them is written by `make ladder`
MARKS = {True: "yes", False: "no", None: "–"}

Row = dict[str, Any]


# --- the table --------------------------------------------------------------------------------------------------------------------


def table(*, checked: bool = True) -> list[Row]:
    """One row a recipe: name, family, paper (arXiv id), parameters at each size and as published, and the five rungs.

    parameters also has `nominal` where the paper prints no count but a name such as "7B". checked: results whose hash no longer holds are
    None; without it the table is what was last recorded, which is what README.md shows.
    """
    records = read_ladder()
    return [row_of(name, path, records.get(name, {}), checked=checked) for name, path in recipe_names().items()]


def row_of(name: str, path: Path, record: Mapping[str, Any], *, checked: bool) -> Row:
    recipe = load_recipe(name)
    counts = record.get("parameters", {})
    if counts.get("hash") != code_hash(path, "sized"):
        counts = count_parameters_of(path)
    parameters: Row = {size: counts[size] for size in SIZES} | {"published": recipe.paper.parameters}
    if recipe.paper.nominal:
        parameters["nominal"] = recipe.paper.nominal
    rungs = {rung: result_of(record.get("rungs", {}).get(rung), path, rung, checked=checked) for rung in RUNGS}
    row = {"name": name, "family": recipe.family, "paper": recipe.paper.arxiv, "parameters": parameters, "rungs": rungs}
    return row | ({"scope": recipe.scope} if recipe.scope else {})


def result_of(entry: Mapping[str, Any] | None, path: Path, rung: str, *, checked: bool = True) -> bool | None:
    """What a record says, or None where there is none or it no longer holds."""
    if entry is None or (checked and not is_fresh(entry, path, rung)):
        return None
    return bool(entry["passed"])


def is_fresh(entry: Mapping[str, Any], path: Path, rung: str) -> bool:
    """Whether the recipe, the code and (where the sources of the tests are at hand) the tests are those of the record."""
    if entry["hash"] != code_hash(path, rung):
        return False
    return not TESTS.is_dir() or entry["tests_hash"] == hash_of_tests(entry["tests"])


def count_parameters_of(path: Path) -> dict[str, Any]:
    """Parameters at each size, on the meta device, with the hash they hold for."""
    return {"hash": code_hash(path, "sized"), **{recipe.size: model_size(recipe) for recipe in at_every_size(path)}}


def read_ladder(path: Path | None = None) -> dict[str, Any]:
    """The records, recipe → parameters and rungs; none where there is no file yet."""
    path = path or LADDER
    return read_object_if_any(path)


# --- what a result rests on -------------------------------------------------------------------------------------------------------

STAGE_MODULES: dict[Stage, str] = {
    "pretrain-tokenizer": "stages.pretrain_tokenizer",
    "align": "stages.align",
    "train-unified": "stages.train_unified",
}
# Modules whose change can change a result. Shards, run folders and progress are not among them: they move results, they do not make them.
COMPUTING = (
    *("stages.parts", "stages.sequence", "stages.training", "stages.metrics", "stages.drawing", "stages.data.scenes"),
    *("stages.recipe", "stages.model", "stages.decoding", "stages.anatomy", "stages.draw", "stages.sample", "stages.evaluate"),
    *STAGE_MODULES.values(),
)


@cache
def code_hash(path: Path, rung: str) -> str:
    """sha256 of a recipe's file and of every module the rung's result rests on."""
    digest = hashlib.sha256(path.read_bytes())
    for module in modules_used(path, rung):
        digest.update(f"\n{module}\n".encode() + source_of(module).read_bytes())
    return digest.hexdigest()


def hash_of_tests(ids: Iterable[str]) -> str:
    """sha256 of the files that hold these tests; a file that is gone changes it too."""
    digest = hashlib.sha256()
    for file in sorted({test.split("::")[0] for test in ids}):
        digest.update(f"\n{file}\n".encode() + ((ROOT / file).read_bytes() if (ROOT / file).is_file() else b"gone"))
    return digest.hexdigest()


def modules_used(path: Path, rung: str) -> list[str]:
    """The modules of a recipe's parts at any size, the entry points of the rung, and what those import, as far as it computes."""
    recipes = at_every_size(path)
    trains = {STAGE_MODULES[phase.stage] for recipe in recipes for phase in recipe.phases}
    entries = {
        "described": {"stages.draw"},
        "sized": {"stages.model", "stages.anatomy"},
        "learns": {"stages.model", "stages.sample", *trains},
        "agrees": {"stages.model"},
        "works": {"stages.model", "stages.sample", "stages.evaluate", *trains},
    }[rung]
    seen: set[str] = set()
    waiting = [*entries, *(module for recipe in recipes for module in part_modules(recipe))]
    while waiting:
        module = waiting.pop()
        if module not in seen and module.startswith(COMPUTING) and source_of(module).name != "__init__.py":
            seen.add(module)
            waiting += imports_of(module)
    return sorted(seen)


@cache
def at_every_size(path: Path) -> tuple[Recipe, ...]:
    return tuple(load_recipe(path, size=size) for size in SIZES)


def part_modules(value: Any) -> Iterator[str]:
    """Where the classes of all configs below a value are defined."""
    if isinstance(value, BaseModel):
        yield type(value).__module__
        for name in type(value).model_fields:
            yield from part_modules(getattr(value, name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from part_modules(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from part_modules(inner)


@cache
def imports_of(module: str) -> tuple[str, ...]:
    """Modules of this package that a module imports. A name taken from a catalogue (a family's __init__) counts as the module that
    defines it; the catalogue's own dict does not, or every recipe would rest on every part."""
    found: list[str] = []
    for owner, name in imported_names(module):
        if source_of(owner).name == "__init__.py":
            inner = f"{owner}.{name}"
            found += [inner] if source_of(inner).is_file() else [source for source, held in imported_names(owner) if held == name]
        else:
            found.append(owner)
    return tuple(dict.fromkeys(found))


@cache
def imported_names(module: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of every `from stages... import name`, anywhere in a module."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stages"]
    return tuple((str(node.module), alias.name) for node in nodes for alias in node.names)


def source_of(module: str) -> Path:
    """The file of a module of this package: its own, or the __init__ of a folder."""
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


# --- making it --------------------------------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: keeps the tests that prove a wanted rung, and what came of them."""

    def __init__(self, wanted: set[tuple[str, str]]) -> None:
        self.wanted = wanted
        self.claims: dict[str, set[tuple[str, str]]] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept: list[Any] = []
        dropped: list[Any] = []
        for item in items:
            claims = claims_of(item) & self.wanted
            if claims:
                self.claims[item.nodeid] = claims
            (kept if claims else dropped).append(item)
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test passes when its call does and nothing around it fails; a skip is no result, an expected failure is a failure."""
        before = self.outcomes.get(report.nodeid)
        if report.failed or (report.skipped and hasattr(report, "wasxfail")):
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self.outcomes[report.nodeid] = "skipped"
        elif report.when == "call" and before is None:
            self.outcomes[report.nodeid] = "passed"

    def results(self) -> dict[tuple[str, str], tuple[bool | None, list[str]]]:
        """(recipe, rung) → whether all of its tests passed, and which they are; None where one of them gave no result."""
        results: dict[tuple[str, str], tuple[bool | None, list[str]]] = {}
        for claim in sorted({claim for claims in self.claims.values() for claim in claims}):
            tests = sorted(test for test, claims in self.claims.items() if claim in claims)
            outcomes = {self.outcomes.get(test, "not run") for test in tests}
            known = outcomes <= {"passed", "failed"}
            results[claim] = (False if "failed" in outcomes else True if known else None, tests)
        return results


def claims_of(item: Any) -> set[tuple[str, str]]:
    """(recipe, rung) pairs that a collected test proves. UsageError for a rung or a recipe that does not exist."""
    claims = set()
    for mark in item.iter_markers("rung"):
        rung, *names = mark.args or ("",)
        if rung not in RUNGS:
            raise UsageError(f"{item.nodeid}: there is no rung '{rung}'", hint=nearest(rung, RUNGS))
        if not names:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            names = [getattr(value, "name", value) for key, value in parameters.items() if key in ("recipe", "name")][:1]
        unknown = [name for name in names if name not in recipe_names()]
        if unknown or not names:
            raise UsageError(
                f"{item.nodeid}: marked as rung '{rung}' of {unknown or 'no recipe'}",
                hint='write rung("learns", "NAME"), or call the test\'s parameter `recipe` or `name`',
            )
        claims |= {(str(name), rung) for name in names}
    return claims


def make_ladder(*, everything: bool = False, tests: Path = TESTS, out: Path | None = None) -> int:
    """Run what is missing or stale (or everything) and write the records. Returns pytest's exit code."""
    import pytest

    out = out or LADDER
    code_hash.cache_clear()
    records = read_ladder(out)
    paths = recipe_names()
    fresh = (
        set()
        if everything
        else {(name, rung) for name, rung, entry in entries_of(records) if name in paths and is_fresh(entry, paths[name], rung)}
    )
    wanted = {(name, rung) for name in paths for rung in RUNGS} - fresh
    recorder = Recorder(wanted)
    files = [str(file) for file in sorted(tests.rglob("test_*.py")) if "mark.rung(" in file.read_text(encoding="utf-8")]
    if not files:
        raise UsageError(f"{tests}: no test proves a rung here", hint="the ladder is made from a checkout, where the tests are")
    code = int(pytest.main([*files, "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={tests.parent}"], plugins=[recorder]))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return code  # interrupted, or a file that cannot be collected: nothing was proved or disproved
    results = recorder.results()
    today = datetime.now(UTC).date().isoformat()
    made: dict[str, Any] = {}
    for name, path in paths.items():
        old = records.get(name, {}).get("rungs", {})
        rungs = {rung: old[rung] for rung in RUNGS if (name, rung) in fresh}
        for rung in RUNGS:
            passed, ids = results.get((name, rung), (None, []))
            if passed is not None:
                rungs[rung] = {
                    "passed": passed,
                    "date": today,
                    "hash": code_hash(path, rung),
                    "tests_hash": hash_of_tests(ids),
                    "tests": ids,
                }
        made[name] = {"parameters": count_parameters_of(path), "rungs": {rung: rungs[rung] for rung in RUNGS if rung in rungs}}
    write_atomic(out, json.dumps(made, indent=1) + "\n")
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code


def entries_of(records: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(recipe, rung, entry) of everything on record."""
    for name, record in records.items():
        for rung, entry in record.get("rungs", {}).items():
            yield name, rung, entry


def drop_stale(out: Path | None = None) -> list[str]:
    """Take results that no longer hold off the record, so that the README cannot show them; returns "recipe: rung" of each."""
    out = out or LADDER
    records, paths = read_ladder(out), recipe_names()
    stale = [(name, rung) for name, rung, entry in entries_of(records) if name not in paths or not is_fresh(entry, paths[name], rung)]
    for name, rung in stale:
        del records[name]["rungs"][rung]
    if stale:
        write_atomic(out, json.dumps({name: record for name, record in records.items() if name in paths}, indent=1) + "\n")
    return [f"{name}: {rung}" for name, rung in stale]


# --- the README -------------------------------------------------------------------------------------------------------------------


def markdown(rows: Iterable[Row]) -> str:
    """The table of systems, for a README."""
    lines = ["| system | paper | tiny | small | paper's size | " + " | ".join(RUNGS) + " |", "|---|---|--:|--:|--:|" + ":-:|" * len(RUNGS)]
    for row in rows:
        sizes = row["parameters"]
        told = (
            f"{count_words(sizes['published'])} published" if sizes["published"] else f"“{sizes['nominal']}”" if "nominal" in sizes else ""
        )
        cells = [
            f"`{row['name']}`" + (f" ({row['scope']})" if "scope" in row else ""),
            f"[{row['paper']}](https://arxiv.org/abs/{row['paper']})",
            *(count_words(sizes[size]) if sizes[size] else MARKS[None] for size in ("tiny", "small")),
            (count_words(sizes["paper"]) if sizes["paper"] else MARKS[None]) + (f" ({told})" if told else ""),
            *(MARKS[row["rungs"][rung]] for rung in RUNGS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme(path: Path) -> None:
    """Put the table of what is on record between the markers of a README. UsageError if it has none."""
    before, _, after = split_readme(path)
    write_atomic(path, f"{before}{SECTION[0]}\n\n{markdown(table(checked=False))}\n\n{SECTION[1]}{after}")


def readme_is_stale(path: Path) -> bool:
    """Whether a README shows another table than the one on record."""
    return split_readme(path)[1].strip() != markdown(table(checked=False))


def split_readme(path: Path) -> tuple[str, str, str]:
    """What stands before, between and after the markers."""
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(SECTION[0])
    section, stop, after = rest.partition(SECTION[1])
    if not start or not stop:
        raise UsageError(f"{path}: no table of systems", hint=f"put the lines {SECTION[0]} and {SECTION[1]} where it belongs")
    return before, section, after


def main(arguments: list[str] | None = None) -> int:
    """`python -m stages.ladder`: run, record, and bring README.md up to date; with --readme FILE only the last."""
    parser = argparse.ArgumentParser(prog="python -m stages.ladder", description="Run the tests that earn the rungs of `mmgen recipes`.")
    parser.add_argument("--all", action="store_true", help="run every test of the ladder, also those whose result still holds")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="only write the table on record into this file; stale results are dropped"
    )
    chosen = parser.parse_args(arguments)
    code = 0
    if chosen.readme is None:
        code = make_ladder(everything=chosen.all)
        if code > 1:
            return code
    else:
        for gone in drop_stale():
            tell(f"no longer holds: {gone}")
    readme = chosen.readme or ROOT / "README.md"
    if chosen.readme is not None or readme.is_file():
        write_readme(readme)
    put(markdown(table()))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MmgenError as problem:
        tell(f"{problem.message}\n{problem.hint}".rstrip())
        sys.exit(problem.exit_code)
