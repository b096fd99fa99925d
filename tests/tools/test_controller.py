"""A controller and its tools, all real and tiny: what the model writes is carried out, and what it gets wrong stands in the sample."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import World, make_world, mixed_recipe, recipe_from, sample_of

from stages.data.sample import Sample
from stages.data.shards import open_shards
from stages.errors import UsageError
from stages.evaluate import evaluate
from stages.options import RunOptions
from stages.sample import sample
from stages.tools.calls import Call, CallError, Reference, read_call
from stages.tools.desk import NO_PICTURE, Desk
from stages.tools.toolbox import open_tools
from stages.train_unified import train_unified

QUIET = RunOptions(quiet=True, dtype="fp32")
PICTURE = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
CONTROLLER = """
size = "tiny"
[paper]
arxiv = "0000.00000"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = 300
[backbones.lm]
kind = "transformer"
width = 48
depth = 2
heads = 4
[ports.text]
content = "token-ids"
tokenizer = "bpe"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "next-token" }
[tasks.plan]
segments = [{ port = "text", text = "<bos>{request}\\n" }, { port = "text", text = "{plan}<eos>", role = "target" }]
[tasks.step]
segments = [
  { port = "text", text = "<bos>{request}\\n" },
  { each = "steps", segments = [
    { port = "text", text = "{history}\\n", mask = "isolated-causal" },
    { port = "text", text = "{call}<eos>", role = "target", mask = "isolated-causal", merge = true },
  ] },
]
[[phases]]
name = "plans"
stage = "train-unified"
tasks = { plan = 1.0, step = 1.0 }
mix = "every-step"
steps = 220
batch_size = 8
lr = 6e-3
warmup_steps = 10
lr_schedule = "cosine"
[sample.text]
sampler = "autoregressive"
temperature = 0.0
max_tokens = 100
"""
DRAW, ASK = 'draw(caption="two stars")', 'answer(image="1_draw.png", question="how many?")'
PLANS = {  # request -> the plan and the dialogue this model has learned, right or wrong
    "count": (
        'draw(caption="two stars")\nanswer(image=<step-1>, question="how many?")',
        [("image.png", DRAW), (f"image.png\n{DRAW} -> 1_draw.png", ASK)],
    ),
    "paint": ('paint(caption="two stars")', [("image.png", DRAW), (f"image.png\n{DRAW} -> 1_draw.png", "done")]),
    "cut": ('draw(caption="two stars', [("image.png", 'paint(caption="two stars")')]),
    "later": ('answer(image=<step-2>, question="how many?")\ndraw(caption="two stars")', [("image.png", "done")]),
}
TOOLS = """
[tools.draw]
description = "draws what a caption says"
model = "tool"
task = "draw"
reads = { caption = "caption" }
writes = "image"
[tools.answer]
model = "tool"
task = "answer"
reads = { image = "image", question = "question" }
writes = "answer"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained controller, a tool after one step, which draws and says nonsense, and tools.toml."""
    folder = tmp_path_factory.mktemp("home")
    mixed = make_world(folder / "mixed", mixed_recipe(), [sample_of(number, image=PICTURE) for number in range(4)])
    train_unified(mixed_recipe(), str(mixed.shards), folder / "tool", RunOptions(quiet=True, dtype="fp32", max_steps=1))
    recipe = recipe_from(CONTROLLER)
    train_unified(recipe, str(requests(folder).shards), folder / "controller", QUIET)
    (folder / "tools.toml").write_text(TOOLS, encoding="utf-8")
    return folder


def requests(folder: Path) -> World:
    samples = [
        Sample(request, {"image": PICTURE, "request": request, "plan": plan, "steps": [{"history": h, "call": c} for h, c in turns]})
        for request, (plan, turns) in PLANS.items()
    ]
    return make_world(folder / "requests", recipe_from(CONTROLLER), samples)


def run(home: Path, out: Path, task: str, **keys: Any) -> dict[str, dict[str, Any]]:
    """Each request's fields after the calls of its plan were carried out."""
    made = sample(home / "controller", str(home / "requests" / "shards"), out, QUIET, tasks=[task], tools=home / "tools.toml", **keys)
    return {entry.key: entry.fields for entry in open_shards(str(made))}


def told(fields: dict[str, Any]) -> list[tuple[str, bool, str]]:
    return [(record["tool"], record["ok"], record["error"]) for record in fields["sample.tools"]]


@pytest.mark.parametrize("name", ["tool", "controller", "."])
def test_what_the_tools_are_made_of_is_not_replaced_by_its_answers(name: str, home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    options = RunOptions(quiet=True, dtype="fp32", overwrite=True)
    with pytest.raises(UsageError, match="an input of this run"):
        sample(home / "controller", str(home / "requests" / "shards"), home / name, options, tasks=["plan"], tools=home / "tools.toml")
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_whole_plans_are_carried_out_and_their_mistakes_recorded(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "out", "plan")
    assert {request: fields["sample.plan"] for request, fields in found.items()} == {request: plan for request, (plan, _) in PLANS.items()}
    assert told(found["count"]) == [("draw", True, ""), ("answer", True, "")]
    assert told(found["paint"]) == [("", False, "there is no tool 'paint'; choose one of: answer, draw")]
    assert told(found["cut"]) == [("", False, r'draw: caption: expected a closing quote, found the end of the line after "\"two stars"')]
    missing = "answer: image: expected a picture, found <step-2>, which is not there; there is <image>"
    assert told(found["later"]) == [("", False, missing), ("draw", True, "")]
    drawn, counted = found["count"]["sample.tools"]
    assert (drawn["kind"], drawn["result"], counted["kind"]) == ("picture", "1_draw.png", "text")
    assert found["count"]["sample.text"] == counted["result"]
    assert found["count"]["sample.picture"].shape == found["later"]["sample.picture"].shape == PICTURE.shape
    assert not np.array_equal(found["count"]["sample.picture"], PICTURE)
    np.testing.assert_array_equal(found["cut"]["sample.picture"], NO_PICTURE)
    assert (found["cut"]["sample.text"], found["later"]["sample.text"]) == ("", "")


def test_what_a_tool_gives_is_what_its_checkpoint_gives_when_asked_directly(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "out", "plan")["count"]
    prompt = make_world(tmp_path / "prompt", mixed_recipe(), [Sample("count-step1", {"caption": "two stars"})])
    made = sample(home / "tool", str(prompt.shards), tmp_path / "direct", QUIET, tasks=["draw"])
    np.testing.assert_array_equal(open_shards(str(made))[0].fields["sample.image"], found["sample.picture"])


def test_a_dialogue_sees_what_came_of_a_call_before_it_writes_the_next(home: Path, tmp_path: Path) -> None:
    found = run(home, tmp_path / "out", "step")
    assert [record["call"] for record in found["paint"]["sample.tools"]] == [DRAW]  # and then it was done
    assert [record["call"] for record in found["count"]["sample.tools"]][:2] == [DRAW, ASK]
    assert found["count"]["sample.plan"].startswith(PLANS["count"][0])  # the file is told as the step that made it
    assert told(found["count"])[:2] == [("draw", True, ""), ("answer", True, "")]
    assert told(found["cut"]) == [("", False, "there is no tool 'paint'; choose one of: answer, draw")]  # which ends it
    assert told(found["later"]) == [("", False, "expected a call, found 'done' before any")]


def test_the_run_counts_its_calls_and_knows_its_tools(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "out", "plan", num_samples=2)
    status = json.loads((tmp_path / "out" / ".mmgen" / "status.json").read_text())
    assert status["message"] == "8 samples, 6 of 12 calls carried out, all of them in 2 of 8 samples"
    record = json.loads((tmp_path / "out" / ".mmgen" / "run.json").read_text())
    assert [entry["role"] for entry in record["inputs"][2:]] == ["tool draw", "tool answer"]
    before = (home / "tools.toml").read_text()
    (home / "tools.toml").write_text(before.replace('"tool"', '"tool/../tool"', 1), encoding="utf-8")
    try:
        with pytest.raises(UsageError, match=r"holds another run:\n.*tools"):
            run(home, tmp_path / "out", "plan", num_samples=2)
    finally:
        (home / "tools.toml").write_text(before, encoding="utf-8")


def test_bad_calls_are_wrong_in_the_score(home: Path, tmp_path: Path) -> None:
    right = {**PLANS, "paint": (PLANS["count"][0], []), "cut": ('draw(caption="two stars")', [])}  # what it should have learned
    truth = [Sample(request, {"image": PICTURE, "request": request, "plan": plan}) for request, (plan, _) in right.items()]
    prompts = str(make_world(tmp_path / "truth", recipe_from(CONTROLLER), truth).shards)
    sample(home / "controller", prompts, tmp_path / "out", QUIET, tasks=["plan"], tools=home / "tools.toml")
    evaluate(str(tmp_path / "out"), None, tmp_path / "scores", QUIET)
    rows = json.loads((tmp_path / "scores" / "results.json").read_text())["results"]
    scores = {row["category"]: row["value"] for row in rows if row["metric"] == "tool-calls" and row["control"] is None}
    assert {key: scores[key] for key in ("exact", "parsed", "executed")} == {"exact": 0.5, "parsed": 0.75, "executed": 0.25}
    assert next(row["chance"] for row in rows if row["category"] == "exact") == 0.5  # two of the four truths are the same


def test_one_request_from_the_command_line(home: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"tasks": ["plan"], "prompt": "count", "tools": home / "tools.toml"}
    (found,) = open_shards(str(sample(home / "controller", None, tmp_path / "out", QUIET, **keys)))
    assert told(found.fields) == [("draw", True, ""), ("answer", True, "")]


def test_a_model_that_is_no_controller_and_a_task_that_writes_no_calls_are_mistakes_of_the_command(home: Path, tmp_path: Path) -> None:
    prompts = str(home / "requests" / "shards")
    with pytest.raises(UsageError, match="has no task that writes a 'plan' or a 'call'"):
        sample(home / "tool", prompts, tmp_path / "a", QUIET, tools=home / "tools.toml")
    with pytest.raises(UsageError, match="one task at a time, found plan, step") as caught:
        sample(home / "controller", prompts, tmp_path / "b", QUIET, tools=home / "tools.toml")
    assert "--task" in caught.value.hint
    with pytest.raises(UsageError, match="the task 'plans' of 'test' writes no calls") as caught:
        sample(home / "controller", prompts, tmp_path / "c", QUIET, tasks=["plans"], tools=home / "tools.toml")
    assert caught.value.hint == "did you mean 'plan'?"


BROKEN = {  # what is written instead of what, and what is said
    "a table": ("[tools.draw]", "[tool.draw]", r"tools\.toml: tool: there is no such key", "every tool is a table [tools.NAME]"),
    "a key": ('task = "draw"', 'tasks = "draw"', r"tools\.draw\.tasks: there is no such key|tools\.draw\.task: Field required", None),
    "a type": ('task = "draw"', "task = 3", r"tools\.draw\.task: .*string.*\(found 3\)", ""),
    "a model": ('model = "tool"', 'model = "tooll"', r"tools\.draw\.model: .*tooll: no such folder", None),
    "a task": ('task = "draw"', 'task = "drow"', r"tools\.draw\.task: 'test' has no task 'drow'", "did you mean 'draw'?"),
    "a field": ('"caption" }', '"captoin" }', r"tools\.draw\.reads\.caption: .* reads no field 'captoin'", "did you mean 'caption'?"),
    "what it needs": (', question = "question"', "", r"tools\.answer\.reads: the task 'answer' of 'test' also needs question", ""),
    "what it writes": ('writes = "image"', 'writes = "picture"', r"tools\.draw\.writes: .* writes 'image', found 'picture'", ""),
    "a name": ("[tools.draw]", "[tools.Draw]", r"'Draw' is no name of a tool", None),
    "no TOML": ("[tools.draw]", "[tools.draw", r"tools\.toml: this is not TOML", ""),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_in_the_file_of_tools_names_file_and_key(home: Path, mistake: str) -> None:
    old, new, message, hint = BROKEN[mistake]
    file = home / "broken-tools.toml"
    assert old in TOOLS
    file.write_text(TOOLS.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        open_tools(file)
    assert caught.value.message.startswith(str(file))
    assert hint is None or caught.value.hint == hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('drwa(caption="x")', "there is no tool 'drwa'; did you mean 'draw'?"),
        ('draw(captoin="x")', "draw: there is no argument 'captoin'; did you mean 'caption'?"),
        ("draw()", "draw: expected caption, a text, found no such argument"),
        ("draw(caption=<image>)", "draw: caption: expected a text, found <image>, a picture"),
        ("answer(image=<step-1>, question=<step-1>)", "answer: image: expected a picture, found <step-1>, a text"),
        ('answer(image="a cat", question="?")', 'answer: image: expected a picture, found the text "a cat"; there is <image>'),
        ('answer(image=<step-9>, question="?")', "answer: image: expected a picture, found <step-9>, which is not there; there is <image>"),
        (
            'answer(image=<caption>, question="?")',
            "answer: image: expected a picture, found <caption>, which is not there; there is <image>",
        ),
        ("draw(caption=<step-2>)", "draw: caption: expected a text, found <step-2>, a call that went wrong"),
    ],
)
def test_a_call_that_cannot_be_carried_out_says_why(home: Path, line: str, message: str) -> None:
    tools = open_tools(home / "tools.toml").tools
    desk = Desk(Sample("a", {"image": PICTURE, "caption": "the truth is no tool's business"}), 0)
    desk.keep(Call("answer", {"image": Reference("image")}), tools["answer"], {"image": PICTURE}, "two")
    desk.refuse("nonsense", "it is nonsense")
    with pytest.raises(CallError) as caught:
        desk.resolve(read_call(line), tools)
    assert str(caught.value) == message
