"""The ladder believes tests and nothing else: what is stale, skipped or was never run is null."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages import ladder
from stages.anatomy import model_size
from stages.errors import UsageError
from stages.ladder import (
    RUNGS,
    Recorder,
    claims_of,
    code_hash,
    count_parameters_of,
    drop_stale,
    hash_of_tests,
    is_fresh,
    markdown,
    modules_used,
    read_ladder,
    readme_is_stale,
    result_of,
    table,
    write_readme,
)
from stages.recipe import load_recipe, recipe_names

NAMES = sorted(recipe_names())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.rung("sized")
def test_the_paper_size_has_the_published_count(name: str) -> None:
    recipe = load_recipe(name, size="paper")
    if recipe.paper.parameters is None:
        pytest.skip(f"no published count, only {recipe.paper.nominal!r}")
    assert recipe.paper.parameters_source, "a count needs its source"
    assert model_size(recipe) == pytest.approx(recipe.paper.parameters, rel=0.02)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ladder on which show-o learned and clip did not, whatever the real one says."""

    def record(name: str, *, passed: bool) -> dict[str, Any]:
        path = recipe_names()[name]
        entry = {
            "passed": passed,
            "date": "2026-01-02",
            "hash": code_hash(path, "learns"),
            "tests_hash": hash_of_tests(["tests/test_ladder.py"]),
        }
        return {"parameters": count_parameters_of(path), "rungs": {"learns": {**entry, "tests": ["tests/test_ladder.py::a"]}}}

    file = tmp_path / "ladder.json"
    file.write_text(json.dumps({"show-o": record("show-o", passed=True), "clip": record("clip", passed=False)}))
    monkeypatch.setattr(ladder, "LADDER", file)
    return file


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Hashes are remembered within a process; these tests change what they are of."""
    caches = (ladder.code_hash, ladder.imports_of, ladder.imported_names, ladder.at_every_size)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def row(name: str, **keywords: bool) -> dict[str, Any]:
    return next(row for row in table(**keywords) if row["name"] == name)


def test_every_recipe_has_a_row_of_the_promised_form(records: Path) -> None:
    rows = table()
    assert sorted(row["name"] for row in rows) == NAMES
    for entry in rows:
        assert {"name", "family", "paper", "parameters", "rungs"} <= set(entry)
        assert {"tiny", "small", "paper", "published"} <= set(entry["parameters"])
        assert tuple(entry["rungs"]) == RUNGS
        assert set(entry["rungs"].values()) <= {True, False, None}
    json.dumps(rows)


def test_what_was_shown_is_shown_and_what_was_not_run_is_null(records: Path) -> None:
    assert row("show-o")["rungs"] == {"described": None, "sized": None, "learns": True, "agrees": None, "works": None}
    assert row("clip")["rungs"]["learns"] is False
    assert set(row("llava")["rungs"].values()) == {None}


def test_parameters_are_counted_and_a_count_that_no_longer_holds_is_counted_again(records: Path) -> None:
    expected = {size: model_size(load_recipe("show-o", size=size)) for size in ("tiny", "small", "paper")}
    assert {size: row("show-o")["parameters"][size] for size in expected} == expected
    held = json.loads(records.read_text())
    held["show-o"]["parameters"]["tiny"] = 7
    records.write_text(json.dumps(held))
    assert row("show-o")["parameters"]["tiny"] == 7, "a count on record is not made again"
    held["show-o"]["parameters"]["hash"] = "of another time"
    records.write_text(json.dumps(held))
    assert row("show-o")["parameters"]["tiny"] == expected["tiny"]


def test_a_nominal_size_stands_beside_the_count(records: Path) -> None:
    sizes = row("chameleon")["parameters"]
    assert sizes["published"] is None and sizes["nominal"] == "7B" and sizes["paper"] > 6e9


def test_another_line_in_the_recipe_makes_its_results_null(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipe_names()["show-o"].read_text())
    entry = {"passed": True, "hash": code_hash(path, "learns"), "tests_hash": hash_of_tests([]), "tests": []}
    assert result_of(entry, path, "learns") is True
    path.write_text(path.read_text() + "\n# one more line\n")
    ladder.code_hash.cache_clear()
    assert result_of(entry, path, "learns") is None
    assert result_of(entry, path, "learns", checked=False) is True, "the README says what was recorded"


WATCHED = {"show-o", "llava", "transfusion", "vqgan", "kl-autoencoder"}
RESTS_ON = {
    "stages.parts.backbones.transformer": WATCHED,  # every model may hold one
    "stages.parts.objectives.denoise": {"transfusion"},
    "stages.parts.encoders.clip": WATCHED,  # --init reads whole released models, with their towers
    "stages.parts.connectors.embedding": WATCHED - {"vqgan", "kl-autoencoder"},
    "stages.parts.quantizers.vq": WATCHED,  # --init reads released autoencoders, which are built of cnn's blocks
    "stages.parts.losses.discriminator": {"vqgan", "kl-autoencoder"},
    "stages.align": {"llava"},
    "stages.data.shards": set(),  # moves samples, computes nothing
}


@pytest.mark.parametrize("module", sorted(RESTS_ON))
def test_another_line_in_a_part_makes_the_results_that_rest_on_it_null_and_no_others(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: code_hash(recipe_names()[name], "learns") for name in WATCHED}
    real = ladder.source_of
    changed = tmp_path / real(module).name
    changed.write_text(real(module).read_text() + "\n# one more line\n")
    monkeypatch.setattr(ladder, "source_of", lambda name: changed if name == module else real(name))
    ladder.code_hash.cache_clear()
    assert {name for name in WATCHED if code_hash(recipe_names()[name], "learns") != before[name]} == RESTS_ON[module]


def test_what_trains_counts_for_learning_and_not_for_size() -> None:
    path = recipe_names()["show-o"]
    learns, sized = modules_used(path, "learns"), modules_used(path, "sized")
    assert {"stages.training.loop", "stages.sequence.masks", "stages.decoding", "stages.parts.samplers.masked"} <= set(learns)
    assert not [module for module in sized if module.startswith("stages.training")]
    assert "stages.align" in modules_used(recipe_names()["llava"], "learns")
    assert "stages.pretrain_tokenizer" in modules_used(recipe_names()["vqgan"], "learns")


def test_a_changed_or_removed_test_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "ROOT", tmp_path)
    monkeypatch.setattr(ladder, "TESTS", tmp_path / "tests")
    (tmp_path / "tests").mkdir()
    file, path = tmp_path / "tests" / "test_it.py", recipe_names()["lm"]
    file.write_text("def test_a(): assert 1 + 1 == 2\n")
    entry = {"passed": True, "hash": code_hash(path, "agrees"), "tests_hash": hash_of_tests(["tests/test_it.py::test_a"])}
    entry["tests"] = ["tests/test_it.py::test_a"]
    assert is_fresh(entry, path, "agrees")
    file.write_text("def test_a(): pass\n")
    assert not is_fresh(entry, path, "agrees")
    file.unlink()
    assert not is_fresh(entry, path, "agrees")
    (tmp_path / "tests").rmdir()
    assert is_fresh(entry, path, "agrees"), "an installed package has no tests to compare with"


# --- who claims what ----------------------------------------------------------------------------------------------------------------


def item(*arguments: str, **parameters: object) -> SimpleNamespace:
    marks = [SimpleNamespace(args=arguments)]
    return SimpleNamespace(nodeid="tests/x.py::test", iter_markers=lambda name: marks, callspec=SimpleNamespace(params=parameters))


def test_a_test_claims_the_recipes_it_names_or_is_called_with() -> None:
    assert claims_of(item("agrees", "clip", "llava")) == {("clip", "agrees"), ("llava", "agrees")}
    assert claims_of(item("learns", name="show-o", seed=3)) == {("show-o", "learns")}
    assert claims_of(item("learns", recipe=load_recipe("vqgan"))) == {("vqgan", "learns")}


@pytest.mark.parametrize(
    ("claimed", "said"),
    [(item("leans", name="show-o"), "learns"), (item("learns", name="show-oo"), "show-oo"), (item("learns"), "no recipe")],
)
def test_a_claim_that_means_nothing_is_an_error(claimed: SimpleNamespace, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        claims_of(claimed)
    assert said in f"{caught.value.message} {caught.value.hint}"


def reported(*reports: tuple[str, str, bool]) -> bool | None:
    """The result of one rung, of the (when, outcome, xfail) that pytest reported of its one test."""
    recorder = Recorder({("lm", "learns")})
    recorder.claims = {"t": {("lm", "learns")}}
    for when, outcome, expected in reports:
        report = SimpleNamespace(nodeid="t", when=when, failed=outcome == "failed", skipped=outcome == "skipped")
        if expected:
            report.wasxfail = "not reached"
        recorder.pytest_runtest_logreport(report)
    return recorder.results()["lm", "learns"][0]


def test_only_a_test_that_ran_and_passed_is_true() -> None:
    passed = [("setup", "passed", False), ("call", "passed", False)]
    assert reported(*passed, ("teardown", "passed", False)) is True
    assert reported(*passed, ("teardown", "failed", False)) is False
    assert reported(("setup", "passed", False), ("call", "failed", False)) is False
    assert reported(("setup", "failed", False)) is False
    assert reported(("setup", "skipped", False)) is None
    assert reported(("setup", "passed", False), ("call", "skipped", False)) is None
    assert reported(("setup", "passed", False), ("call", "skipped", True)) is False, "tried and not reached"
    assert reported() is None


def test_every_test_of_a_rung_must_pass() -> None:
    recorder = Recorder(set())
    recorder.claims = {test: {("lm", "agrees")} for test in "abc"}
    for outcomes, expected in [("ppp", True), ("pfp", False), ("psp", None), ("psf", False)]:
        recorder.outcomes = {test: {"p": "passed", "f": "failed", "s": "skipped"}[o] for test, o in zip("abc", outcomes, strict=True)}
        assert recorder.results() == {("lm", "agrees"): (expected, ["a", "b", "c"])}


MADE_UP = """
import pytest

@pytest.mark.rung("learns")
@pytest.mark.parametrize("name", ["show-o", "clip"])
def test_learns(name):
    assert name == "show-o"

@pytest.mark.rung("agrees", "lm", "llava")
def test_agrees():
    pass

@pytest.mark.rung("agrees", "llava")
def test_cannot_be_run_here():
    pytest.skip("no such library")

@pytest.mark.rung("works", "vqgan")
@pytest.mark.xfail(strict=True)
def test_not_reached():
    assert False

def test_of_something_else():
    open({touched!r}, "a").write("x")
"""
MAKE = "import sys; from pathlib import Path; from stages.ladder import make_ladder; sys.exit(make_ladder(tests=Path({tests!r}), out=Path({out!r})))"


def test_the_ladder_is_made_by_running_the_tests_that_are_needed(tmp_path: Path) -> None:
    """Results are recorded; a second run repeats only what is not on record or no longer holds."""
    (tmp_path / "made").mkdir()
    touched, out = tmp_path / "touched", tmp_path / "ladder.json"
    (tmp_path / "made" / "test_made_up.py").write_text(MADE_UP.replace("{touched!r}", repr(str(touched))))
    code = MAKE.format(tests=str(tmp_path / "made"), out=str(out))
    first = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ladder.ROOT)
    assert first.returncode == 1, first.stdout + first.stderr
    made = {name: {rung: entry["passed"] for rung, entry in record["rungs"].items()} for name, record in read_ladder(out).items()}
    assert sorted(made) == NAMES
    assert {name: rungs for name, rungs in made.items() if rungs} == {
        "show-o": {"learns": True},
        "clip": {"learns": False},
        "lm": {"agrees": True},
        "vqgan": {"works": False},
    }
    assert not touched.exists(), "tests that prove no rung are not run"
    entry = read_ladder(out)["lm"]["rungs"]["agrees"]
    assert entry["tests"][0].endswith("test_made_up.py::test_agrees") and is_fresh(entry, recipe_names()["lm"], "agrees")

    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ladder.ROOT)
    assert "1 passed" in again.stdout and "skipped" in again.stdout, "of five claims only that of llava is still open: " + again.stdout
    assert read_ladder(out)["lm"]["rungs"]["agrees"] == entry


def test_without_its_tests_the_ladder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_a(): pass\n")
    with pytest.raises(UsageError, match="no test proves a rung"):
        ladder.make_ladder(tests=tmp_path, out=tmp_path / "ladder.json")
    assert not (tmp_path / "ladder.json").exists()


# --- the README ---------------------------------------------------------------------------------------------------------------------


def test_the_readme_shows_what_is_on_record_between_its_markers(records: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# before\n<!-- systems -->\nold\n<!-- /systems -->\nafter\n")
    assert readme_is_stale(readme)
    write_readme(readme)
    text = readme.read_text()
    assert text.startswith("# before\n<!-- systems -->\n\n| system |") and text.endswith("<!-- /systems -->\nafter\n")
    line = next(line for line in text.splitlines() if "`show-o`" in line)
    assert line.endswith("| – | – | yes | – | – |") and "1.45 B (1.45 B published)" in line
    assert next(line for line in text.splitlines() if "`clip`" in line).endswith("| – | – | no | – | – |")
    assert not readme_is_stale(readme)
    held = json.loads(records.read_text())
    held["clip"]["rungs"]["learns"]["passed"] = True
    records.write_text(json.dumps(held))
    assert readme_is_stale(readme)


def test_stale_results_leave_the_record_before_a_readme_is_written(records: Path) -> None:
    held = json.loads(records.read_text())
    held["show-o"]["rungs"]["learns"]["hash"] = "of another time"
    records.write_text(json.dumps(held))
    assert drop_stale() == ["show-o: learns"]
    assert read_ladder()["show-o"]["rungs"] == {} and read_ladder()["clip"]["rungs"]["learns"]["passed"] is False
    assert row("show-o", checked=False)["rungs"]["learns"] is None


def test_a_readme_without_a_place_for_the_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# nothing here\n")
    with pytest.raises(UsageError, match="no table of systems"):
        write_readme(tmp_path / "README.md")


def test_the_readme_of_this_project_is_up_to_date() -> None:
    """`make ladder`, or `make docs`, writes it."""
    if not (ladder.ROOT / "README.md").is_file():
        pytest.skip("installed without its README")
    assert not readme_is_stale(ladder.ROOT / "README.md")


def test_the_table_is_one_line_a_recipe_of_equal_cells(records: Path) -> None:
    head, rule, *lines = markdown(table()).splitlines()
    assert len(lines) == len(NAMES)
    assert {line.count("|") for line in (head, rule, *lines)} == {head.count("|")}
