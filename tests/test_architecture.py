"""The layout, defended: who may import whom, and the habits that keep a recipe data and a run reproducible."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("mmgen_cli", "stages") for path in (ROOT / package).rglob("*.py"))
RECIPES = sorted((ROOT / "stages" / "recipes").rglob("*.toml"))
FOLDERS = ("training", "metrics", "data", "sequence", "parts", "report", "drawing", "tools")
BASICS = {  # what everybody may import
    "stages.errors",
    "stages.escape",
    "stages.options",
    "stages.files",
    "stages.ranks",
    "stages.documents",
    "stages.stop",
    "stages.ahead",
    "stages.written",
    "stages.inputs",
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Modules of this project a file imports, anywhere in it; types needed only by the type checker do not count."""
    tree = parsed(path)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in ("stages", "mmgen_cli"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "stages":
                yield from (f"stages.{alias.name}" for alias in node.names)
            elif (node.module or "").split(".")[0] in ("stages", "mmgen_cli"):
                yield str(node.module)


def layer_of(module: str) -> str:
    """ "parts" for stages.parts.quantizers.vq, "stage" for stages/*.py, "cli" for mmgen_cli."""
    steps = module.split(".")
    if steps[0] == "mmgen_cli":
        return "cli"
    return steps[1] if len(steps) > 1 and steps[1] in FOLDERS else "stage"


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 30
    assert ROOT / "stages" / "run.py" in SOURCES


def test_nothing_below_the_command_line_imports_it() -> None:
    guilty = [
        name_of(path) for path in SOURCES if layer_of(name_of(path)) != "cli" for module in imports_of(path) if layer_of(module) == "cli"
    ]
    assert guilty == []


def test_parts_know_neither_recipes_nor_stages_nor_data() -> None:
    """A part is a module with a config. Of a sequence it knows the types, and who may attend to whom."""
    allowed = BASICS | {"stages.sequence.segment", "stages.sequence.masks"}
    for path in SOURCES:
        if layer_of(name_of(path)) == "parts":
            assert {module for module in imports_of(path) if layer_of(module) != "parts"} - allowed == set(), path


def test_folders_never_import_a_stage() -> None:
    """Only the recipe, the model and the run folder are shared; a stage is a story nobody else reads from."""
    shared = BASICS | {"stages.recipe", "stages.model", "stages.run", "stages.records", "stages.progress", "stages.hub", "stages.anatomy"}
    for path in SOURCES:
        if layer_of(name_of(path)) in FOLDERS:
            stages = {module for module in imports_of(path) if layer_of(module) == "stage"} - shared - {"stages"}
            assert stages == set(), path


@pytest.mark.parametrize("layer", ["sequence", "metrics"])
def test_the_heart_and_the_metrics_do_not_know_how_models_are_trained(layer: str) -> None:
    for path in SOURCES:
        if layer_of(name_of(path)) == layer:
            assert "training" not in {layer_of(module) for module in imports_of(path)}, path


def test_no_module_names_a_device_by_calling_cuda() -> None:
    for path in SOURCES:
        calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        assert [call.lineno for call in calls if call.func.attr == "cuda"] == [], path  # type: ignore[attr-defined]


def test_nothing_is_called_cfg() -> None:
    """It means "config" to half the field and "classifier-free guidance" to the other half."""
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            name = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr", ast.keyword: "arg"}.get(type(node))
            assert name is None or getattr(node, name) != "cfg", f"{path}:{getattr(node, 'lineno', 0)}"


def test_no_code_knows_a_recipe_by_name() -> None:
    """A recipe's name is printed, never compared: the only strings that equal one are parts' kinds and the examples in help texts."""
    names = {path.stem for path in RECIPES}
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Compare | ast.Match):
                strings = {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)}
                assert strings & names == set(), f"{path}:{node.lineno}"
            if isinstance(node, ast.Compare):
                compared = [side for side in (node.left, *node.comparators) if isinstance(side, ast.Attribute) and side.attr == "name"]
                owners = {ast.unparse(side.value) for side in compared}
                assert "recipe" not in owners, f"{path}:{node.lineno}"


def test_every_random_number_comes_from_a_generator() -> None:
    """Seeding a global generator hides where randomness enters, and breaks resuming. Inside fork_rng it is put back afterwards."""
    for path in SOURCES:
        tree = parsed(path)
        forked = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and id(node) not in forked:
                call = ast.unparse(node.func)
                assert call not in ("torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed"), f"{path}:{node.lineno}"


def test_recipes_are_data() -> None:
    assert sorted((ROOT / "stages" / "recipes").rglob("*.py")) == []


def test_no_data_is_unpickled() -> None:
    """Loading a pickle runs code. torch.load and numpy.load may be used only in their safe forms."""
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                call, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert call not in ("pickle.load", "pickle.loads", "yaml.load"), f"{path}:{node.lineno}"
                assert not call.endswith(".extractall"), f"{path}:{node.lineno}"
                if call == "torch.load":
                    assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
                if call in ("np.load", "numpy.load"):
                    assert keywords.get("allow_pickle") == "False", f"{path}:{node.lineno}"


def test_every_file_opens_with_what_it_does() -> None:
    for path in SOURCES:
        if path.read_text(encoding="utf-8").strip():
            assert ast.get_docstring(parsed(path)), path


def test_the_command_line_loads_without_torch() -> None:
    code = "import mmgen_cli.app, sys; print([name for name in ('torch', 'numpy', 'PIL', 'pydantic', 'rich') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (answer.stdout, answer.stderr) == ("[]\n", "")
