"""The study of unified designs: every arm is a recipe that trains, as large where a token passes as the others, and verdicts are as said."""

import importlib.util
import math
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from worlds import planner_of, sample_of

from stages.anatomy import active_size
from stages.flops import FlopCounter
from stages.metrics.paired import Difference
from stages.model import meta_model
from stages.recipe import Recipe, load_recipe
from stages.sequence.pack import pack

STUDY = Path(__file__).parent.parent / "examples" / "04-unified"


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_unified", STUDY / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """arm → its recipe, from the commands that make would run."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    work = tmp_path_factory.mktemp("work")
    told = subprocess.run(
        ["make", "-n", "-C", str(STUDY), "plan", f"WORK={work}", "LEVEL=1", "CELL=4"], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in told.splitlines():
        words = shlex.split(line, comments=True) if " train-unified " in line else []
        if words:
            sets = [value for flag, value in pairwise(words) if flag == "--set"]
            found[Path(words[-1]).stem] = load_recipe(STUDY / "unified.toml", sets=sets)
    return found


def test_all_axes_are_arms(arms: dict[str, Recipe], compare: ModuleType) -> None:
    wanted = {arm for axis in compare.AXES.values() for arm in axis.arms} | {"base"}
    wanted |= {arm for against in compare.PROMOTION.values() for arm in against.values()}
    assert wanted == arms.keys()


def test_a_token_passes_as_many_weights_in_every_trunk(arms: dict[str, Recipe]) -> None:
    trunk = {arm: active_size(recipe) for arm, recipe in arms.items() if arm in ("base", "moe", "modality", "role")}
    router = 3 * 96 * 4
    assert trunk["modality"] == trunk["role"] == trunk["base"] == trunk["moe"] - router


def test_every_arm_plans_and_is_counted(arms: dict[str, Recipe]) -> None:
    """A tower and longer sequences cost what they cost; routing costs next to nothing."""
    cost = {}
    for arm, recipe in arms.items():
        planner = planner_of(recipe)
        planner.encoders = dict(meta_model(recipe).encoders.items())
        sample = sample_of(1, grid=(85,) if arm == "next-scale" else (8, 8))
        sample.fields["image"] = np.zeros((32, 32, 3), "uint8")
        sample.fields["image.latents"] = np.zeros((8, 8, 8), "float32")
        batch = pack([planner.plan(sample, task, None) for task, share in recipe.phases[0].tasks.items() if share])
        cost[arm] = sum(FlopCounter(meta_model(recipe), recipe.phases[0]).of(batch).values())
    assert cost["modality"] == cost["role"] == cost["base"]
    assert cost["moe"] == pytest.approx(cost["base"], rel=0.01)
    assert cost["base"] < cost["decoupled"] < cost["concatenated"]
    assert cost["reads"] + cost["draws"] == pytest.approx(cost["base"])


def test_verdicts(compare: ModuleType) -> None:
    def found(*means: float) -> list[Difference]:
        return [Difference(mean, 0.1, 0.01) for mean in means]

    real, not_real = [0.01, 0.01], [0.01, 0.5]
    assert compare.verdict(found(1, 1), real) == "mutual"
    assert compare.verdict(found(1, -1), real) == "trade"
    assert compare.verdict(found(1, -1), not_real) == "one-way"
    assert compare.verdict(found(-1, 1), not_real) == compare.verdict(found(-1, -1), real) == "interference"
    assert compare.verdict(found(1, 1), [0.5, 0.5]) == "undecided"
    assert compare.verdict([None, *found(1)], [None, 0.01]) == "–"


def test_tables_are_paired_by_seed_and_corrected(compare: ModuleType) -> None:
    """Arms whose difference is the same at every seed are told apart, however far seeds are from each other."""

    def run(arm: str, seed: int, score: float) -> dict[str, object]:
        drawn = {"scenes": score / 2, "readable": 1.0, "objects": score}
        numbers = {"arm": arm, "seed": seed, "u": score, "g": score, "b": score, "drawn": drawn}
        return numbers | {"steps": 10, "flops": 1e12, "parameters": 1e6, "minutes": 1.0}

    seeds = range(5)
    runs = [run("base", s, 0.1 + 0.1 * s) for s in seeds] + [run("masked", s, 0.13 + 0.1 * s + 0.001 * (s % 2)) for s in seeds]
    table = compare.score_table(compare.by_arm(runs), compare.AXES["objective"])
    masked = next(line for line in table.splitlines() if "`masked`" in line)
    assert masked.count("**+0.030 ± 0.001 (p < 0.001)**") == 3
    assert "| 0.300 ± 0.196 |" in table
    assert compare.beyond_chance(0.75, 0.5) == 0.5 and compare.beyond_chance(0.4, 0.5) == 0.0
    assert math.isclose(compare.t_quantile(4), 2.776, abs_tol=1e-3)
