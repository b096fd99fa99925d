"""Requests and their plans: each plan is carried out by perfect tools, and the dialogue says the same one call at a time."""

import pytest

from stages.data.importers import IMPORTERS
from stages.data.scenes import Scene, described_scene, parse_caption, render, scene_sample
from stages.data.scenes.plans import REQUESTS, carry_out, results
from stages.data.scenes.render import Nuisance
from stages.errors import UsageError
from stages.metrics.score import Setting
from stages.metrics.tool_calls import ToolCalls
from stages.tools.calls import DONE, by_reference, read_call, read_plan

SAMPLES = [scene_sample(level, 5, split, i, plans=2) for level in (0, 1, 3) for split in ("train", "heldout") for i in range(25)]


def test_every_plan_can_be_carried_out_and_no_request_of_words_alone_has_two() -> None:
    plans: dict[str, set[str]] = {}
    orders = set()
    for sample in SAMPLES:
        scene, calls = Scene.from_json(sample.fields["scene"]), read_plan(sample.fields["plan"])
        assert carry_out(calls, scene) is not None
        orders.add("-".join(call.tool for call in calls))
        plans.setdefault(sample.fields["request"], set()).add(sample.fields["plan"])
    assert orders == {name for table in REQUESTS for name in table} - {"look"}
    assert {request for request, found in plans.items() if len(found) > 1} == {"what is this?"}  # only the picture tells


def test_a_plan_means_what_its_words_say() -> None:
    scene = Scene.from_json(scene_sample(1, 0, "train", 3).fields["scene"])
    drawn, edited, told = results(
        read_plan(
            'draw(caption="a large red circle top left")\nedit(image=<step-1>, instruction="make the object small")\n'
            'answer(image=<step-2>, question="what size is the circle?")'
        ),
        scene,
    )  # type: ignore[misc]
    assert drawn == described_scene(parse_caption("a large red circle top left"), 1)
    assert edited == described_scene(parse_caption("a small red circle top left"), 1)
    assert told == "small"
    assert carry_out(read_plan('answer(image=<step-1>, question="how many objects?")'), scene) is None
    assert carry_out(read_plan('draw(caption="something")'), scene) is None


def test_a_dialogue_says_the_plan_one_call_at_a_time() -> None:
    for sample in SAMPLES:
        *turns, last = sample.fields["steps"]
        assert last["call"] == DONE
        calls = read_plan(sample.fields["plan"])
        found = results(calls, Scene.from_json(sample.fields["scene"]))
        assert found is not None
        texts = {result: f"step-{number}" for number, result in enumerate(found, 1) if isinstance(result, str)}
        assert [by_reference(read_call(turn["call"]), texts) for turn in turns] == calls
        for number, turn in enumerate([*turns, last]):
            assert len(turn["history"].split("\n")) == number + 1  # the given file, then a line a call


def test_plans_come_beside_what_a_sample_is_without_them() -> None:
    bare, full = scene_sample(1, 2, "val", 7), scene_sample(1, 2, "val", 7, plans=1)
    assert full.fields.keys() - bare.fields.keys() == {"request", "plan", "steps"}
    assert all((full.fields[name] == value).all() if name in ("image", "source", "result") else full.fields[name] == value
               for name, value in bare.fields.items())  # fmt: skip
    one = [scene_sample(1, 2, "val", i, plans=1).fields["plan"] for i in range(20)]
    assert all(len(read_plan(plan)) == 1 for plan in one)
    with pytest.raises(UsageError, match="--plans 3: the requests here need 1 or 2 calls"):
        IMPORTERS["scenes"](plans=3)


def made_by(sample: object, plan: str, *, right: bool) -> dict[str, object]:
    """A sample as `sample --tools` writes it with perfect tools, or with tools that do nothing right."""
    fields = sample.fields  # type: ignore[attr-defined]
    scene = Scene.from_json(fields["scene"])
    result = carry_out(read_plan(fields["plan"]), scene) if right else Scene(scene.level)
    pictured = isinstance(result, Scene)
    record = {"call": plan, "tool": "", "ok": True, "error": "", "kind": "picture" if pictured else "text"}
    record["result"] = "1_draw.png" if pictured else result
    picture = render(result, Nuisance(0.9)) if isinstance(result, Scene) else fields["image"]
    return {"__key__": "k", **fields, "sample.plan": plan, "sample.tools": [record], "sample.picture": picture}


def scores_of(samples: list[dict[str, object]]) -> dict[str, float]:
    metric = ToolCalls(Setting())
    assert all(ToolCalls.applies(fields, Setting()) for fields in samples)
    found = metric.scores([metric.look(fields) for fields in samples], [metric.expect(fields) for fields in samples])
    return {score.category: score.value for score in found}


def test_perfect_plans_and_tools_score_one_and_every_mistake_costs_where_it_should() -> None:
    some = SAMPLES[:40]
    perfect = scores_of([made_by(sample, sample.fields["plan"], right=True) for sample in some])
    assert set(perfect.values()) == {1.0}
    assert {"exact", "tools", "arguments", "parsed", "executed", "result"} <= set(perfect)
    tools = scores_of([made_by(sample, sample.fields["plan"], right=False) for sample in some])
    assert (tools["exact"], tools["result"]) == (1.0, 0.0)
    broken = scores_of([made_by(sample, sample.fields["plan"][:-1], right=False) for sample in some])
    assert (broken["exact"], broken["tools"], broken["arguments"], broken["parsed"]) == (0.0, 0.0, 0.0, 0.0)
    changed = [sample.fields["plan"].replace("<image>", "<step-9>") for sample in some]
    wrong = scores_of([made_by(sample, plan, right=True) for sample, plan in zip(some, changed, strict=True)])
    reading = sum("<image>" in sample.fields["plan"] for sample in some)
    assert wrong["tools"] == 1.0 and wrong["exact"] == pytest.approx(1 - reading / len(some)) and 0 < wrong["arguments"] < 1


def test_calls_of_a_dialogue_are_held_against_their_truth() -> None:
    fields = SAMPLES[0].fields
    steps = [{"history": turn["history"], "call": turn["call"], "truth": turn["call"]} for turn in fields["steps"]]
    assert scores_of([{"__key__": "k", **fields, "sample.steps": steps}])["exact"] == 1.0
    early = [{**steps[0], "call": DONE}, *steps[1:]]
    assert scores_of([{"__key__": "k", **fields, "sample.steps": early}])["exact"] == 0.0
