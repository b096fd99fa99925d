"""`--dry-run`: what a command would do, printed and not done. Reads indexes and configs; loads no weights and writes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgen_cli.door import print_json, read_status
from stages.escape import lines_of
from stages.options import RunOptions
from stages.terminal import put

if TYPE_CHECKING:
    from stages.recipe import Recipe, Stage

Plan = dict[str, Any]


def import_plan(name: str, source: str | None, out: str, arguments: Mapping[str, Any], options: RunOptions) -> Plan:
    """What `import` would do: the importer and every argument it would get."""
    given = {"source": source} if source is not None else {}
    shared = {"seed": options.seed, "limit": options.limit}
    return {"stage": "import", "importer": name, **given, "arguments": {**arguments, **shared}, "out": out, "folder": _folder(out)}


def training_plan(
    recipe: "Recipe", stage: "Stage", shards: str, out: str, tokenizers: Sequence[Path] = (), init: Mapping[str, str] | None = None
) -> Plan:
    """What a training stage would do: resolved recipe, parts, shapes, parameter counts, tokens per sample, expected memory."""
    from stages.plan_run import plan_run

    return plan_run(recipe, stage, shards, tokenizers, init) | {"out": out, "folder": _folder(out)}


def tokenize_plan(shards: str, tokenizers: Sequence[Path], out: str) -> Plan:
    """What `tokenize` would do: which samples, which tokenizers."""
    return {
        "stage": "tokenize",
        "input": _input(shards),
        "tokenizers": [_checkpoint(folder) for folder in tokenizers],
        "out": out,
        "folder": _folder(out),
    }


def sample_plan(model: Path, prompts: str | None, out: str, tasks: Sequence[str], tools: Path | None = None) -> Plan:
    """What `sample` would do: which model, which prompts, which tasks, which tools."""
    return {
        "stage": "sample",
        "model": _checkpoint(model),
        "prompts": _input(prompts) if prompts else "one, from --prompt and --image",
        "tasks": list(tasks) or "all whose context the prompts have",
        **({"tools": _tools(tools)} if tools is not None else {}),
        "out": out,
        "folder": _folder(out),
    }


def eval_plan(target: str, shards: str | None, reference: str | None, out: str, field_map: Mapping[str, str]) -> Plan:
    """What `eval` would do: which samples, compared with what."""
    is_checkpoint = (Path(target) / "config.json").is_file()
    plan: Plan = {"stage": "eval", "target": _checkpoint(Path(target)) if is_checkpoint else _input(target)}
    for name, spec in (("shards", shards), ("reference", reference)):
        if spec is not None:
            plan[name] = _input(spec)
    return plan | {"map": dict(field_map), "out": out, "folder": _folder(out)}


def print_plan(plan: Plan, *, as_json: bool) -> None:
    """On stdout: one JSON object, or what a person can read: a table for a training stage, an indented list for the others."""
    if as_json:
        print_json(plan)
    elif "resolved_recipe" in plan:
        from stages.plan_run import plan_text

        put(plan_text(plan))
    else:
        put(lines_of(_lines(plan)))


def _lines(value: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            lines += [f"{indent}{key}:", *_lines(inner, indent + "  ")]
        elif isinstance(inner, list) and inner and all(isinstance(entry, Mapping) for entry in inner):
            for number, entry in enumerate(inner):
                lines += [f"{indent}{key} {number + 1}:", *_lines(entry, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {inner}")
    return lines


def _folder(out: str) -> str:
    """What is in --out now, and so what the command would do with it."""
    if out == "-":
        return "a tar on stdout"
    path = Path(out)
    if not path.exists() or not any(path.iterdir()):
        return "new"
    status = read_status(path)
    if not status:
        return "holds something that is not a run of mmgen: the command would refuse"
    where = f" at step {status['step']}" if status.get("step") else ""
    return f"holds a run of {status.get('stage')}, {status.get('state')}{where}: the same run continues, another one is refused"


def _input(spec: str) -> Plan | str:
    """Samples and fields of some shards, per split."""
    if spec == "-":
        return "a tar on stdin"
    from stages.data.shards import open_shards, split_folders

    splits = [(split or "all", open_shards(spec, split=split)) for split in split_folders(spec) or [None]]
    return {split: {"samples": len(shards), "fields": ", ".join(sorted(shards.fields))} for split, shards in splits}


def _tools(file: Path) -> Plan:
    """What can be called, and which checkpoint answers."""
    from stages.tools.toolbox import open_tools

    tools = open_tools(file).tools.values()
    return {tool.name: {"reads": dict(tool.kinds), "writes": tool.gives, "task": tool.task, **_checkpoint(tool.folder)} for tool in tools}


def _checkpoint(folder: Path) -> Plan:
    """Which checkpoint this is."""
    from stages.training.checkpoint import describe_checkpoint

    described = describe_checkpoint(folder)
    return {"folder": str(folder), **{key: described[key] for key in ("recipe", "size", "parameters", "fingerprint")}}
