"""Questions have the answers they came with, and cannot be answered well without the picture."""

from collections import Counter, defaultdict
from functools import cache
from itertools import product

import pytest

from stages.data.scenes import LEVELS, Scene, SceneObject, answer, answer_vocabulary
from stages.data.scenes.questions import QUESTION_TYPES, questions
from stages.data.scenes.world import SPLITS, draw_scene, generator_for

Asked = list[tuple[Scene, dict[str, str]]]


@cache
def asked(level: int, split: str, count: int) -> Asked:
    pairs = []
    for i in range(count):
        rng = generator_for("questions", level, split, i)
        scene = draw_scene(LEVELS[level], split, rng)
        pairs += [(scene, entry) for entry in questions(scene, rng)]
    return pairs


@pytest.mark.parametrize(("level", "split"), product(range(len(LEVELS)), SPLITS))
def test_the_oracle_answers_every_question_as_it_came(level: int, split: str) -> None:
    for scene, entry in asked(level, split, 150):
        assert answer(entry["question"], scene) == entry["answer"], (entry, scene)
        assert entry["answer"] in answer_vocabulary(level)[entry["type"]]


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_every_scene_has_a_question_and_every_type_occurs(level: int) -> None:
    pairs = asked(level, "train", 150)
    assert {entry["type"] for _, entry in pairs} == answer_vocabulary(level).keys() <= QUESTION_TYPES.keys()
    assert len({scene for scene, _ in pairs}) > 100


# What a blind answerer may gain over guessing, in accuracy. Leaving combinations out makes some colours and shapes rarer than others, which
# is worth some points where they are compared; and few scenes have a shape or colour three times, so small counts are likelier.
MARGIN = defaultdict(lambda: 0.1, count=0.14)


@pytest.mark.parametrize("level", [0, 1])
def test_answering_blindly_is_near_chance(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Two answerers fitted on `train` and scored on `val`: one gives one answer a type, the other knows every question and never looks."""
    train, val = asked(level, "train", 2500), asked(level, "val", 1000)
    vocabulary = answer_vocabulary(level)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for _, entry in train:
        by_type[entry["type"]][entry["answer"]] += 1
        by_question[entry["question"]][entry["answer"]] += 1
    lines = []
    for kind, answers in vocabulary.items():
        about = [entry for _, entry in val if entry["type"] == kind]
        chance = 1 / len(answers)
        constant = by_type[kind].most_common(1)[0][0]
        always = sum(entry["answer"] == constant for entry in about) / len(about)
        known = [by_question[entry["question"]] or by_type[kind] for entry in about]
        blind = sum(seen.most_common(1)[0][0] == entry["answer"] for seen, entry in zip(known, about, strict=True)) / len(about)
        lines.append(f"level {level} {kind:<10} n {len(about):>5}  chance {chance:.3f}  constant {always:.3f}  blind {blind:.3f}")
        assert always < chance + MARGIN[kind], lines[-1]
        assert blind < chance + MARGIN[kind], lines[-1]
    with capsys.disabled():
        print("\n" + "\n".join(lines))


TRIO = Scene(
    1,
    (
        SceneObject("large", "plain", "red", "circle", "top left"),
        SceneObject("small", "plain", "red", "circle", "top right"),
        SceneObject("small", "plain", "blue", "ring", "bottom left"),
    ),
)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("is there a red circle?", "yes"),
        ("is there a blue circle?", "no"),
        ("Is there a small object?", "yes"),
        ("how many objects?", "three"),
        ("how many red objects?", "two"),
        ("how many squares?", "zero"),
        ("what colour is the ring?", "blue"),
        ("what shape is the object bottom left?", "ring"),
        ("what size is the object top left?", "large"),
        ("what colour is the circle?", None),  # which?
        ("what colour is the square?", None),  # there is none
        ("where is the large circle?", "top left"),
        ("is the ring below the large circle?", "yes"),
        ("is the ring left of the large circle?", "no"),  # the same column
        ("is the ring left of the small circle?", "yes"),
        ("are there more circles than rings?", "yes"),
        ("are there more blue objects than red objects?", "no"),
        ("why?", None),
    ],
)
def test_questions_about_two_red_circles_and_a_blue_ring(question: str, expected: str | None) -> None:
    assert answer(question, TRIO) == expected
