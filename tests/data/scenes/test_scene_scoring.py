"""The benchmark judged before it judges: the oracle scores 1, shuffled prompts near 0, and each category fails for its own reason."""

import pytest

from stages.data.scenes import CATEGORIES, LEVELS, Scene, SceneObject, categories, compare, judge
from stages.data.scenes.world import draw_scene, generator_for


def scene(*objects: str) -> Scene:
    return Scene(1, tuple(SceneObject(*text.split(" ", 4)) for text in objects))


def drawn(level: int, count: int) -> list[Scene]:
    return [draw_scene(LEVELS[level], "val", generator_for("scoring", level, i)) for i in range(count)]


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_the_oracle_scores_one_everywhere(level: int) -> None:
    applied = set()
    for truth in drawn(level, 150):
        result = compare(truth, truth)
        assert result.exact
        assert result.right == result.anywhere == result.meant == result.drawn
        assert all(score.right and score.found for score in result.objects)
        for name in categories(truth):
            applied.add(name)
            assert judge(name, truth, truth)
    assert applied == set(CATEGORIES)


def test_shuffled_prompts_score_near_nothing() -> None:
    """An object is right by accident where a cell is filled (5/8) with one of 60 states; colours and shapes of a scene agree, hence a little more."""
    meant = drawn(1, 600)
    results = [compare(a, b) for a, b in zip(meant, meant[1:] + meant[:1], strict=True)]
    assert sum(result.right for result in results) / sum(result.meant for result in results) < 0.03
    assert sum(result.exact for result in results) < 3


def test_objects_are_compared_attribute_by_attribute_and_in_place() -> None:
    meant = scene("large plain red circle top left", "small plain blue ring top right", "small plain green cross bottom left")
    made = scene("large plain red circle top left", "large plain blue square top right", "small plain green cross bottom right")
    result = compare(meant, made)
    first, second, third = result.objects
    assert first.right
    assert (second.found, second.size, second.colour, second.shape, second.texture, second.right) == (True, False, True, False, True, False)
    assert (third.found, third.colour, third.right) == (False, False, False)
    assert (result.meant, result.drawn, result.right, result.anywhere, result.exact) == (3, 3, 1, 2, False)


def test_drawing_too_much_is_not_exact() -> None:
    meant = scene("large plain red circle top left")
    result = compare(meant, scene("large plain red circle top left", "large plain red circle top right"))
    assert (result.right, result.meant, result.drawn, result.anywhere, result.exact) == (1, 1, 2, 1, False)


ONE = scene("large plain red circle top left")
TWO = scene("large plain red circle top left", "small plain blue ring top right")
THREE = scene("large plain red circle top left", "small plain red circle top right", "small plain blue circle bottom left")


@pytest.mark.parametrize(
    ("category", "meant", "right", "wrong"),
    [
        ("one-object", ONE, scene("small plain green circle bottom left"), scene("large plain red ring top left")),
        ("colours", ONE, scene("small plain red circle bottom left"), scene("large plain green circle top left")),
        ("two-objects", TWO, scene("small plain green circle bottom left", "large plain cyan ring top left"), ONE),
        ("counting", THREE, scene(*(f"small plain cyan circle {place}" for place in ("top left", "top right", "bottom right"))), ONE),
        (
            "position",
            TWO,
            scene("large plain cyan circle bottom left", "large plain cyan ring bottom right"),
            scene("small plain blue ring top left", "large plain red circle top right"),
        ),
        (
            "colour-attribution",
            TWO,
            scene("large plain blue ring bottom left", "small plain red circle top left"),
            scene("large plain blue circle top left", "small plain red ring top right"),
        ),
    ],
)
def test_a_category_judges_what_it_is_about_and_nothing_else(category: str, meant: Scene, right: Scene, wrong: Scene) -> None:
    assert category in categories(meant)
    assert judge(category, meant, right)
    assert not judge(category, meant, wrong)
    assert not judge(category, meant, Scene(1))


def test_categories_say_which_prompts_they_are_about() -> None:
    assert categories(ONE) == ["one-object", "colours"]
    assert categories(TWO) == ["two-objects", "position", "colour-attribution"]
    assert categories(THREE) == ["counting"]
    assert categories(scene("large plain red circle top left", "small plain red ring top right")) == ["two-objects", "position"]
    assert categories(Scene(1)) == []
