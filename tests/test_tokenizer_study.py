"""The study of image tokenizers: every tokenizer is in it, every setting reaches a recipe, intervals are Student's."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

from stages.recipe import RECIPES, load_recipe

STUDY = Path(__file__).parent.parent / "examples" / "03-tokenizers"
MAKEFILE = (STUDY / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", STUDY / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(arm: str) -> list[str]:
    """What the Makefile sets for an arm, as `--set` takes it."""
    family = re.findall(r"\S+", re.findall(r"^FAMILY := (.*)$", MAKEFILE, re.MULTILINE)[0])
    line = re.findall(rf"^{re.escape(arm)}\.sets\s*:= (.*)$", MAKEFILE, re.MULTILINE)[0]
    line = re.sub(r"\$\(foreach set,\$\(FAMILY\),--set (\S+)\$\(set\)\)", lambda m: " ".join(f"--set {m[1]}{s}" for s in family), line)
    return re.findall(r"--set (\S+)", line)


def test_every_image_tokenizer_is_an_arm() -> None:
    arms = re.findall(r"^ARMS\s+\?= (.*)$", MAKEFILE, re.MULTILINE)[0].split()
    assert sorted(arms) == sorted(path.stem for path in (RECIPES / "tokenizers").glob("*.toml") if load_recipe(path.stem).autoencoders)


@pytest.mark.parametrize(
    ("arm", "codes"), [("vqgan", 256), ("fsq@64", 64), ("fsq@256", 256), ("fsq@1024", 1024), ("fsq@4096", 4096), ("fsq@16384", 16384)]
)
def test_what_an_arm_sets_gives_the_codes_it_is_named_for(arm: str, codes: int) -> None:
    (autoencoder,) = load_recipe(arm.split("@")[0], size="small", sets=settings(arm)).autoencoders.values()
    assert autoencoder.codebook_size == codes
    assert autoencoder.code_shape(32, 32) == (8, 8)


def test_intervals_over_seeds_are_students(compare: ModuleType) -> None:
    values = [17.9, 18.4, 18.0, 18.3]
    mean, half = compare.mean_and_half(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    assert mean == pytest.approx(18.15)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)
    assert compare.mean_and_half([18.0]) == (18.0, None)


def test_names_in_the_plot_do_not_cover_each_other(compare: ModuleType) -> None:
    taken: list[tuple[float, float, float, float]] = []
    for number in range(12):  # a dozen arms at nearly one place
        assert compare.label(f"tokenizer-{number}", 200.0, 180.0 + number, "#000000", taken, 420.0)
    assert len(taken) == 12
    apart = [a[2] < b[0] or a[0] > b[2] or a[3] < b[1] or a[1] > b[3] for i, a in enumerate(taken) for b in taken[:i]]
    assert all(apart)
