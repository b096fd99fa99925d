"""The shared options, each defined once: its flag, its type, its help. A command lists the ones that have an effect on it.

Flags say where and how to run. What is computed is in the recipe, and `--set` reaches it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from stages.errors import UsageError

MAX_SEED = 2**63 - 1  # what torch and numpy both take
MAX_COUNT = 10**9  # of samples or steps
MAX_MINUTES = 10.0**7  # nineteen years
MAX_WORKERS = 1024
MAX_SAMPLES = 10_000  # per prompt: those of 64 prompts are in memory together


def recipe_names(incomplete: str) -> list[str]:
    """For completion: the names of the shipped recipes, without reading them."""
    import stages

    return sorted(path.stem for path in (Path(stages.__file__).parent / "recipes").rglob("*.toml") if path.stem.startswith(incomplete))


# what to work on
Shards = Annotated[
    str,
    typer.Argument(
        metavar="SHARDS",
        help="A folder, a brace pattern, a URL, hf://datasets/..., several joined by :: (to train, also 3*A::1*B), or - for stdin.",
    ),
]
OptionalShards = Annotated[
    str | None, typer.Argument(metavar="SHARDS", help="Of a checkpoint: the prompts and their truth. Of samples: the truth they lack.")
]
Out = Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder to write. The same command again resumes it.")]
OutOrPipe = Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder to write, or - to stream a tar to stdout.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file to write.")]

# which model
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="A shipped recipe (see `mmgen recipes`) or a TOML file.", autocompletion=recipe_names
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe, as in --set phases.joint.steps=200. Repeatable."),
]
Size = Annotated[
    Literal["tiny", "small", "paper"] | None,
    typer.Option("--size", help="tiny: seconds on a CPU; small: minutes to an hour (the default); paper: as published."),
]
Init = Annotated[
    list[str] | None, typer.Option("--init", metavar="PART=DIR|hf://ID", help="Start a part of the recipe from weights. Repeatable.")
]
Tokenizers = Annotated[
    list[str], typer.Option("--tokenizer", metavar="DIR", help="A checkpoint that encodes a field, hf://org/name included. Repeatable.")
]
OtherTokenizers = Annotated[
    list[str] | None,
    typer.Option("--tokenizer", metavar="DIR", help="Use this tokenizer instead of the one that came with the shards. Repeatable."),
]

# how to run
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=MAX_SEED, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[Literal["auto", "fp32", "bf16"], typer.Option("--dtype", help="Precision of the computation.")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, max=MAX_COUNT, help="Use only so many samples of the input.", show_default=False),
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", metavar="N", min=1, max=MAX_COUNT, help="Stop after so many steps; the same command continues.")
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        "--max-minutes",
        metavar="MINUTES",
        min=0.0,
        max=MAX_MINUTES,
        help="Stop after so many minutes; the same command continues.",
    ),
]
Parallel = Annotated[
    Literal["ddp", "fsdp"],
    typer.Option("--parallel", help="How ranks under torchrun share the network: ddp, each has all of it; fsdp, each has a part."),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", metavar="N", min=0, max=MAX_WORKERS, help="Processes of each rank that read ahead; worth it for large pictures."
    ),
]
OnBadSample = Annotated[
    Literal["fail", "skip", "quarantine"], typer.Option("--on-bad-sample", help="What to do with a sample that cannot be read.")
]
MaxBadFraction = Annotated[
    float,
    typer.Option(
        "--max-bad-fraction",
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Give up with exit code 3 when more than this is bad.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again: delete what mmgen wrote in --out, and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Push = Annotated[
    str | None, typer.Option("--push", metavar="hf://ORG/NAME", help="Upload the finished checkpoint to the Hugging Face Hub.")
]

# how to tell
Json = Annotated[bool, typer.Option("--json", help="Print the result (or the error) as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr; errors only.")]

# particular to one or two commands
Validation = Annotated[str | None, typer.Option("--val", metavar="SHARDS", help="Validate on these instead of the val split of SHARDS.")]
Check = Annotated[
    int, typer.Option("--check", metavar="N", min=0, max=MAX_COUNT, help="Decode so many samples again and report how close they are.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help="A task of the recipe. Repeatable. Default: all whose context the prompts have."),
]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="One prompt, instead of PROMPT-SHARDS.")]
Image = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", exists=True, dir_okay=False, help="The picture that goes with --prompt.")
]
NumSamples = Annotated[int, typer.Option("--num-samples", metavar="N", min=1, max=MAX_SAMPLES, help="Samples per prompt.")]
SaveFiles = Annotated[bool, typer.Option("--save-files", help="Also write every output as an ordinary file.")]
Tools = Annotated[
    Path | None,
    typer.Option(
        "--tools", metavar="FILE", exists=True, dir_okay=False, help="A tools.toml: carry out the calls the model writes (docs/tools.md)."
    ),
]
Reference = Annotated[
    str | None, typer.Option("--reference", metavar="SHARDS", help="Real samples, for metrics that compare distributions.")
]
FieldMap = Annotated[
    list[str] | None, typer.Option("--map", metavar="NAME=FIELD", help="Read NAME from FIELD, as in --map sample.image=image. Repeatable.")
]
Draw = Annotated[
    Path | None, typer.Option("--draw", metavar="FILE", help="Draw the recipe as SVG: sequence, mask, experts, what is frozen.")
]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Show this sample in full.")]
Index = Annotated[bool, typer.Option("--index", help="Also write .mmgen/shardindex.json anew, where nothing is wrong.")]


def pairs(values: Sequence[str] | None, flag: str) -> dict[str, str]:
    """`NAME=VALUE` as typed after a repeatable flag → {NAME: VALUE}. Raises UsageError for anything else, and for a name given twice."""
    table: dict[str, str] = {}
    for value in values or []:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise UsageError(f"{flag} {value}: expected NAME=VALUE", hint=f"for example {flag} left=right")
        if name in table:
            raise UsageError(f"{flag} {value}: '{name}' was already given as {table[name]}")
        table[name] = rest
    return table
