"""draw: a recipe as a picture, made by the code that runs it.

For each task a small example goes through the real planner, packer, objectives and mask rule; drawn are its segments, who may attend to
whom, which expert each token passes, what is predicted from where, and which parts a phase trains or leaves frozen. So a drawing cannot
say anything that the code does not do.
"""

from pathlib import Path

from stages.drawing.figure import draw_recipe
from stages.errors import UsageError
from stages.files import replace_own
from stages.recipe import Recipe

MARKER = "<!-- drawn by mmgen recipes -->"  # by which a drawing is known that may be drawn again


def draw(recipe: Recipe, out: Path) -> Path:
    """Write the drawing of a recipe as an SVG file; returns its path. UsageError for another suffix than .svg, and where
    another file has the name."""
    if out.suffix.lower() != ".svg":
        raise UsageError(f"--draw {out}: drawings are SVG", hint=f"--draw {out.with_suffix('.svg')}")
    replace_own(out, f"{MARKER}\n{draw_svg(recipe)}\n", MARKER)
    return out


def draw_svg(recipe: Recipe) -> str:
    """The drawing as an <svg> element, ready to stand in a page: its style and ids touch nothing else there."""
    return draw_recipe(recipe)
