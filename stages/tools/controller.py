"""A model that writes tool calls, and the tools that answer them.

What the model writes decides how it is asked. A task that writes `plan` gives the whole plan at once (HuggingGPT): its lines are carried out
in order, and one that goes wrong takes along only those that need its result. A task that writes `call`, record by record of a list `steps`,
is a dialogue (Visual ChatGPT): the model sees the history, writes a call, sees what came of it, until it writes `done` or a call goes wrong.

A call is the model's to get wrong: what is wrong with it becomes part of the sample, never an error of the run. Calls of the same step and
tool are asked together. The random numbers of a call depend on (seed, key of the prompt, step) alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.data.sample import Sample
from stages.data.shards import Shards
from stages.errors import DataError, UsageError, nearest
from stages.sequence.segment import Role
from stages.tools.calls import DONE, CallError, lines_of, read_call
from stages.tools.desk import Desk
from stages.tools.toolbox import Thing, Tool, Toolbox

if TYPE_CHECKING:
    from stages.recipe import Recipe
    from stages.sample import Writer

PLAN, CALL, STEPS, HISTORY = "plan", "call", "steps", "history"
MAX_CALLS = 8  # of one plan


def writes_calls(recipe: "Recipe", task: str) -> str:
    """`plan` or `call`, where that is the last thing a task writes; else ""."""
    written = [segment.fields[-1] for segment in recipe.tasks[task].flat() if segment.role == Role.TARGET and segment.fields]
    return written[-1] if written and written[-1] in (PLAN, CALL) else ""


def planning_task(recipe: "Recipe", asked: Sequence[str]) -> str:
    """The task of a controller that writes plans: the one asked for, or the only one there is. UsageError where there is none, or several."""
    found = [task for task in recipe.tasks if writes_calls(recipe, task)]
    if not found:
        raise UsageError(
            f"--tools: '{recipe.name}' has no task that writes a '{PLAN}' or a '{CALL}'", hint="train a recipe such as hugginggpt"
        )
    for task in asked:
        if task not in found:
            raise UsageError(f"--tools: the task '{task}' of '{recipe.name}' writes no calls", hint=nearest(task, found))
    if len(asked or found) > 1:
        raise UsageError(f"--tools: one task at a time, found {', '.join(asked or found)}", hint="name it with --task")
    return (asked or found)[0]


class Controller:
    """A `Writer` that plans, and one for the checkpoint of every tool."""

    def __init__(self, writer: "Writer", box: Toolbox, writers: Mapping[str, "Writer"]) -> None:
        self.writer, self.tools, self.writers = writer, box.tools, writers
        self.task = planning_task(writer.recipe, writer.asked)

    def answer(self, group: Sequence[Sample], num_samples: int = 1) -> Iterator[Sample]:
        """Each prompt with its plan, the record of its calls, and what they gave, `num_samples` times."""
        desks = [Desk(self.writer.with_contents(entry), number) for entry in group for number in range(num_samples)]
        if writes_calls(self.writer.recipe, self.task) == PLAN:
            self._plan(desks)
        else:
            self._converse(desks)
        originals = [entry for entry in group for _ in range(num_samples)]
        for entry, desk in zip(originals, desks, strict=True):
            yield self.writer.beside(entry, desk.fields(self.tools), desk.number, num_samples)

    def _plan(self, desks: Sequence[Desk]) -> None:
        """Whole plans, carried out line by line."""
        written = self.writer.ask([(desk.prompt, desk.number) for desk in desks], self.task)
        for desk, fields in zip(desks, written, strict=True):
            desk.plan = lines_of(fields[PLAN])
            if not desk.plan:
                desk.refuse("", "expected a plan, found nothing")
        for step in range(MAX_CALLS):
            self._carry_out([(desk, desk.plan[step]) for desk in desks if step < len(desk.plan)])
        for desk in desks:
            if len(desk.plan) > MAX_CALLS:
                desk.refuse(desk.plan[MAX_CALLS], f"expected at most {MAX_CALLS} calls, found {len(desk.plan)}")

    def _converse(self, desks: Sequence[Desk]) -> None:
        """A call, what came of it, the next call."""
        talking = list(desks)
        for turn in range(MAX_CALLS):
            calling = self._next_calls(talking, turn)
            self._carry_out(calling)
            talking = [desk for desk, _ in calling if desk.records[-1]["ok"]]
        for desk, line in self._next_calls(talking, MAX_CALLS):
            desk.refuse(line, f"expected '{DONE}' after {MAX_CALLS} calls, found another")
        for desk in desks:
            if not desk.records:
                desk.refuse(DONE, f"expected a call, found '{DONE}' before any")

    def _next_calls(self, talking: Sequence[Desk], turn: int) -> list[tuple[Desk, str]]:
        """What the model writes to each history, without those it is done with."""
        asked = [(at_turn(desk, turn), desk.number) for desk in talking]
        written = [fields[CALL] for fields in self.writer.ask(asked, self.task, record=0)] if asked else []
        calling = [(desk, line) for desk, line in zip(talking, written, strict=True) if line != DONE]
        for desk, line in calling:
            desk.plan.append(reread(desk, line))
        return calling

    def _carry_out(self, calls: Sequence[tuple[Desk, str]]) -> None:
        """One call of each of some plans."""
        ready = []
        for desk, line in calls:
            try:
                call = read_call(line)
                tool, arguments = desk.resolve(call, self.tools)
                prompt = Sample(f"{desk.prompt.key}-step{desk.steps + 1}", tool.prompt(arguments), f"step {desk.steps + 1}")
                ready.append((desk, call, tool, arguments, self.writers[tool.name].with_contents(prompt, [tool.task])))
            except CallError as error:
                desk.refuse(line, str(error))
            except DataError as error:  # a picture the tool cannot take
                desk.refuse(line, f"{tool.name}: {error.message}", tool.name)
        for name in dict.fromkeys(tool.name for _, _, tool, _, _ in ready):
            own = [entry for entry in ready if entry[2].name == name]
            results = self._use(own[0][2], [(prompt, desk.number) for desk, _, _, _, prompt in own])
            for (desk, call, tool, arguments, _), result in zip(own, results, strict=True):
                desk.keep(call, tool, arguments, result)

    def _use(self, tool: Tool, prompts: Sequence[tuple[Sample, int]]) -> list[Thing]:
        """What a tool gives for some prompts."""
        return [fields[tool.writes] for fields in self.writers[tool.name].ask(prompts, tool.task, record=0 if tool.each else None)]


def at_turn(desk: Desk, turn: int) -> Sample:
    """The prompt with its history in the place of the record that is asked for."""
    fields: dict[str, Any] = {**desk.prompt.fields, STEPS: [{HISTORY: desk.history}]}
    return Sample(f"{desk.prompt.key}-turn{turn + 1}", fields, desk.prompt.source)


def reread(desk: Desk, line: str) -> str:
    """A call of a dialogue as a whole plan would write it; what is no call stays what it is."""
    try:
        return desk.referring(read_call(line))
    except CallError:
        return line


def tally(samples: Shards) -> str:
    """How many of the recorded calls were carried out, and in how many samples all were."""
    records = [
        found.fields["sample.tools"] for i in range(len(samples)) if (found := samples.read_or_skip(i, ["sample.tools"])) is not None
    ]
    calls = [record["ok"] for record_list in records for record in record_list]
    whole = sum(all(record["ok"] for record in record_list) for record_list in records)
    return f"{sum(calls):,} of {len(calls):,} calls carried out, all of them in {whole:,} of {len(records):,} samples"
