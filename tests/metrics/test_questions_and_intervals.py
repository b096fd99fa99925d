"""Question accuracy with its chance, and the two intervals."""

import numpy as np
import pytest

from stages.errors import DataError
from stages.metrics.intervals import bootstrap_mean, bootstrap_ratio, bootstrap_share, wilson
from stages.metrics.question_accuracy import QuestionAccuracy
from stages.metrics.score import Score, Setting


def asked(*entries: tuple[str, str, str]) -> dict:
    return {"sample.qa": [{"question": "?", "type": kind, "answer": answer, "truth": truth} for kind, answer, truth in entries]}


def score(samples: list[dict], truths: list[dict] | None = None) -> dict[str, Score]:
    metric = QuestionAccuracy(Setting())
    seen, expected = [metric.look(sample) for sample in samples], [metric.expect(sample) for sample in truths or samples]
    return {score.category: score for score in metric.scores(seen, expected)}


def test_accuracy_is_per_type_and_over_all_questions():
    samples = [asked(("colour", "Red.", "red"), ("count", "2", "3")), asked(("colour", " blue ", "blue"), ("colour", "red", "green"))]
    scores = score(samples)
    assert scores["colour"].value == pytest.approx(2 / 3)
    assert (scores["count"].value, scores["count"].n, scores["count"].samples) == (0, 1, 1)
    assert (scores["all"].value, scores["all"].n, scores["all"].samples) == (0.5, 4, 2)


def test_a_constant_answerer_scores_exactly_the_printed_chance():
    truths = ["yes"] * 7 + ["no"] * 5
    scores = score([asked(("existence", "yes", truth)) for truth in truths])
    assert scores["existence"].value == scores["existence"].chance == pytest.approx(7 / 12)


def test_the_chance_of_all_types_is_the_best_constant_answer_to_each():
    scores = score([asked(("a", "", "x"), ("b", "", "1")), asked(("a", "", "x"), ("b", "", "2")), asked(("a", "", "y"), ("b", "", "3"))])
    assert scores["all"].chance == pytest.approx((2 + 1) / 6)


def test_another_pictures_truths_meet_answers_of_their_own_type():
    one, two = asked(("colour", "red", "red"), ("count", "2", "2")), asked(("count", "3", "3"), ("colour", "red", "red"))
    scores = score([one, two], [two, one])
    assert (scores["colour"].value, scores["count"].value) == (1, 0)


def test_a_question_without_its_truth_is_bad_data():
    with pytest.raises(DataError, match="lacks truth"):
        QuestionAccuracy(Setting()).look({"sample.qa": [{"question": "?", "answer": "1", "type": "count"}]})


def test_wilson_matches_the_textbook_and_has_width_at_the_ends():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 20) == (0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(20, 20)[0] == pytest.approx(1 - 0.1611, abs=1e-4)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_the_bootstrap_of_a_mean_has_the_normal_width():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_mean(values, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_the_bootstrap_draws_samples_not_objects():
    """Ten objects of a picture that are right or wrong together carry the information of one."""
    right = np.repeat([0, 1], 50)
    together = bootstrap_ratio(right * 10, np.full(100, 10), seed=0)
    assert together == pytest.approx(bootstrap_mean(right, seed=0))
    assert bootstrap_ratio(np.array([1]), np.array([1]), seed=0) is None


def test_all_or_nothing_right_is_not_certainty():
    wholes = np.array([3, 1, 0, 4])
    assert bootstrap_share(wholes * 0, wholes, seed=0) == wilson(0, 3)
    assert bootstrap_share(wholes, wholes, seed=0) == wilson(3, 3)
    some = np.array([1, 1, 0, 2])
    assert bootstrap_share(some, wholes, seed=0) == bootstrap_ratio(some, wholes, seed=0)
