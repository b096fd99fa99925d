"""Every sentence has one exact meaning: what is said is true, full captions name one scene, and what is no sentence has none."""

from itertools import combinations, product

import pytest

from stages.data.scenes import LEVELS, Scene, SceneObject, apply_instruction, described_scene, parse_caption, satisfied, scene_sample
from stages.data.scenes.language import caption, paraphrases
from stages.data.scenes.world import SPLITS, generator_for


def scene(*objects: str, level: int = 1) -> Scene:
    """`scene("large plain red circle top left")`"""
    return Scene(level, tuple(SceneObject(*text.split(" ", 4)) for text in objects))


PAIR = scene("large plain red circle top left", "small plain blue square bottom right")


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_every_caption_is_true_and_full_ones_have_exactly_one_meaning(level: int) -> None:
    for split, index in product(SPLITS, range(60 if level < 4 else 15)):
        fields = scene_sample(level, 1, split, index).fields
        truth = Scene.from_json(fields["scene"])
        assert described_scene(parse_caption(fields["caption"]), level) == truth
        for text in paraphrases(truth, generator_for(level, split, index)):
            assert described_scene(parse_caption(text), level) == truth
        for text in fields["captions"]:
            assert satisfied(parse_caption(text), truth), text


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_every_instruction_has_the_result_it_came_with(level: int) -> None:
    for split, index in product(SPLITS, range(40 if level < 4 else 10)):
        fields = scene_sample(level, 2, split, index).fields
        before, after = (Scene.from_json(fields[name]) for name in ("scene", "result.scene"))
        assert apply_instruction(fields["instruction"], before) == after
        changed = {o.place for o in set(before.objects) ^ set(after.objects)}
        assert len(changed) == (2 if fields["instruction"].startswith("move") else 1)


def test_a_full_caption_is_true_of_its_scene_and_of_no_other() -> None:
    states = [None, *(f"large plain {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square"))]
    cells = list(product(states, LEVELS[0].places))
    worlds = {
        scene(*(f"{state} {place}" for state, place in chosen if state), level=0)
        for chosen in combinations(cells, 2)
        if chosen[0][1] != chosen[1][1]
    }
    assert len(worlds) > 100
    for one in worlds:
        meaning = parse_caption(caption(one))
        assert [other for other in worlds if satisfied(meaning, other)] == [one]


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a red circle top left, a blue square bottom right", True),
        ("bottom right a small blue square and top left a circle", True),
        ("A picture of a large red circle  top left and a blue square.", True),
        ("a red circle, a blue square", True),
        ("a red circle top left", False),  # a listing is complete
        ("there is a red circle top left", True),
        ("there is a red circle top right", False),
        ("two objects", True),
        ("three objects", False),
        ("a circle and an object", None),
        ("a circle and a object", True),
        ("there are two objects", True),
        ("there is exactly one circle", True),
        ("there are exactly two circles", False),
        ("there is no ring", True),
        ("there is no circle", False),
        ("there is a circle left of a square", True),
        ("there is a circle above a square", True),
        ("there is a square left of a circle", False),
        ("there is a circle below a circle", False),
        ("there are a circle and a square of the same colour", False),
        ("there are a circle and a square of the same texture", True),
        ("nothing", False),
        ("a red circle top left, a red circle top left", False),
    ],
)
def test_what_a_sentence_says_about_a_large_red_circle_and_a_small_blue_square(text: str, truth: bool | None) -> None:
    meaning = parse_caption(text)
    assert (None if meaning is None else satisfied(meaning, PAIR)) == truth


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "red circle",
        "a red circle top left,",
        "a circle red",
        "two circle",
        "a circles",
        "top left a circle top left",
        "a red red circle",
        "a red blue circle",
        "there is",
        "there is no",
        "exactly two circles",
        "the red circle",
        "a red circle top left; a square",
        "a ring top",
    ],
)
def test_what_is_no_sentence_has_no_meaning_and_is_wrong(text: str) -> None:
    assert parse_caption(text) is None
    assert not satisfied(parse_caption(text), PAIR)


def test_a_listing_needs_a_different_object_for_each_phrase() -> None:
    """The matching has to reassign: the only circle that is large is also the only one that is red."""
    both = scene("large plain red circle top left", "small plain blue circle top right")
    assert satisfied(parse_caption("a circle, a red circle"), both)
    assert satisfied(parse_caption("a large circle, a circle"), both)
    assert not satisfied(parse_caption("a large circle, a red circle"), both)
    assert satisfied(parse_caption("a red circle and a object"), both)


@pytest.mark.parametrize("text", ["nothing", "a picture of nothing"])
def test_the_empty_scene_can_be_said(text: str) -> None:
    assert described_scene(parse_caption(text), 1) == Scene(1)
    assert caption(Scene(1)) == "nothing"


def test_a_sentence_that_leaves_something_open_describes_no_scene() -> None:
    assert described_scene(parse_caption("a red circle top left"), 0) is not None
    assert described_scene(parse_caption("a red circle top left"), 1) is None  # of which size?
    assert described_scene(parse_caption("a large red circle"), 1) is None
    assert described_scene(parse_caption("there is a large red circle top left"), 1) is None
    assert described_scene(parse_caption("a large red ring top left"), 0) is None  # there are no rings at level 0


@pytest.mark.parametrize(
    ("instruction", "after"),
    [
        ("remove the circle", ["small plain blue square bottom right"]),
        ("remove the large object", ["small plain blue square bottom right"]),
        ("make the circle green", ["large plain green circle top left", "small plain blue square bottom right"]),
        ("make the square a ring", None),
        ("make the small square large", ["large plain red circle top left", "large plain blue square bottom right"]),
        ("move the circle to top right", ["large plain red circle top right", "small plain blue square bottom right"]),
        (
            "add a small cyan ring top right",
            ["large plain red circle top left", "small plain cyan ring top right", "small plain blue square bottom right"],
        ),
        ("move the circle to bottom right", "refused"),
        ("add a small cyan ring top left", "refused"),
        ("remove the object", "refused"),
        ("remove the ring", "refused"),
        ("make the circle red", "refused"),
        ("make the circle top right", "refused"),
        ("paint it black", "refused"),
    ],
)
def test_what_an_instruction_does(instruction: str, after: list[str] | str | None) -> None:
    expected = ["large plain red circle top left", "small plain blue ring bottom right"] if after is None else after
    assert apply_instruction(instruction, PAIR) == (None if expected == "refused" else scene(*expected))
