"""The eleven commands of `mmgen`: parse, load the recipe, call one stage, exit.

Nothing heavy is imported here: torch costs two seconds, and `--help` should cost none. Each command imports its stage when it runs.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmgen_cli import options as o
from mmgen_cli.door import Door, PlainCommand, check_push, check_stdin, give, give_checkpoint, print_json, run_options, stdout_for
from mmgen_cli.importing import ImportGroup
from mmgen_cli.plan import eval_plan, print_plan, sample_plan, tokenize_plan, training_plan
from mmgen_cli.tables import print_recipes
from stages.errors import DataError, UsageError
from stages.terminal import put

HELP = """Composable stages for multi-modal generative models: shards in, shards out.

Every stage reads and writes webdataset tars or a checkpoint folder, so any of them can be swapped for your own program. A recipe is
one TOML file that describes one system; `mmgen recipes` lists those that come with mmgen.
"""

EPILOG = """Exit codes:
  0    done, or stopped by --max-steps or --max-minutes
  1    a fault of mmgen, or a full disk
  2    a mistake in the command or the recipe
  3    bad data
  4    a guard stopped the run: a loss that is not finite, a dead codebook
  75   preempted (SIGTERM, SIGHUP, a lost rank): the same command continues
  130  interrupted (Ctrl-C)

Example:
  mmgen import scenes --count 2000 --out data
  mmgen pretrain-tokenizer data --recipe vqgan --size tiny --out runs/pixels
  mmgen pretrain-tokenizer data --recipe text-bpe --out runs/words
  mmgen tokenize data --tokenizer runs/pixels --tokenizer runs/words --out codes
  mmgen train-unified codes --recipe show-o --size tiny --out runs/show-o
  mmgen sample runs/show-o codes/val --out samples
  mmgen eval samples --out scores
  mmgen report runs/show-o scores --out report.html
"""

app = typer.Typer(cls=Door, help=HELP, epilog=EPILOG, rich_markup_mode=None, pretty_exceptions_enable=False, invoke_without_command=True)


def _told(short: str, example: str) -> dict[str, Any]:
    """How every command is declared: plain text, a line for the list of commands, an example at the end of its own help."""
    return {"cls": PlainCommand, "short_help": short, "epilog": f"Example:\n  {example}"}


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            put(f"mmgen {version('mmgen-cli')}")
        except PackageNotFoundError:  # run from a checkout that was never installed
            put("mmgen (not installed)")
        raise typer.Exit


@app.callback()
def mmgen(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        put(ctx.get_help())


app.add_typer(
    typer.Typer(
        cls=ImportGroup,
        help="Turn a public data set, a folder of files or the built-in world into shards.",
        short_help="A public data set, a folder or the built-in world to shards.",
        epilog="`mmgen import NAME --help` shows what one importer takes.\n\n"
        "Example:\n  mmgen import scenes --level 1 --count 1000 --out data",
        rich_markup_mode=None,
        no_args_is_help=True,
        subcommand_metavar="NAME [SOURCE] --out DIR",
    ),
    name="import",
)


@app.command(
    "pretrain-tokenizer",
    **_told(
        "Train an image autoencoder, a quantizer or a text tokenizer.",
        "mmgen pretrain-tokenizer data --recipe vqgan --size tiny --out runs/pixels",
    ),
)
def pretrain_tokenizer(
    ctx: typer.Context,
    shards: o.Shards,
    recipe: o.RecipeName,
    out: o.Out,
    set: o.Settings = None,
    size: o.Size = None,
    init: o.Init = None,
    val: o.Validation = None,
    max_steps: o.MaxSteps = None,
    max_minutes: o.MaxMinutes = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    on_bad_sample: o.OnBadSample = "skip",
    max_bad_fraction: o.MaxBadFraction = 0.01,
    push: o.Push = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train what turns a field into tokens: an image autoencoder, with or without a quantizer, or a text tokenizer."""
    check_stdin(shards)
    check_push(push)
    from stages.recipe import load_recipe

    loaded, starts = load_recipe(recipe, size=size, sets=set), o.pairs(init, "--init")
    if dry_run:
        print_plan(training_plan(loaded, "pretrain-tokenizer", shards, out), as_json=json)
        return
    from stages.pretrain_tokenizer import pretrain_tokenizer as stage

    give_checkpoint(stage(loaded, shards, Path(out), run_options(ctx), val=val, init=starts), push=push, as_json=json)


@app.command(
    "tokenize",
    **_told(
        "Shards to shards with codes, latents, features, token ids.",
        "mmgen tokenize data --tokenizer runs/pixels --tokenizer runs/words --out codes",
    ),
)
def tokenize(
    ctx: typer.Context,
    shards: o.Shards,
    tokenizer: o.Tokenizers,
    out: o.OutOrPipe,
    check: o.Check = 0,
    limit: o.Limit = None,
    device: o.Device = "auto",
    on_bad_sample: o.OnBadSample = "skip",
    max_bad_fraction: o.MaxBadFraction = 0.01,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Add codes, latents, features or token ids to every sample: each tokenizer runs once, here, and never again in training."""
    check_stdin(shards)
    from stages.hub import resolve

    tokenizers = [resolve(spec) for spec in tokenizer]
    if dry_run:
        print_plan(tokenize_plan(shards, tokenizers, out), as_json=json)
        return
    from stages.tokenize_shards import tokenize_shards

    with stdout_for(out, as_json=json):
        written = tokenize_shards(shards, tokenizers, Path(out), run_options(ctx), check=check)
    give(written, as_json=json)


@app.command(
    "align",
    **_told("Train what joins pretrained parts: towers, connectors.", "mmgen align data --recipe llava --size tiny --out runs/llava"),
)
def align(
    ctx: typer.Context,
    shards: o.Shards,
    recipe: o.RecipeName,
    out: o.Out,
    set: o.Settings = None,
    size: o.Size = None,
    init: o.Init = None,
    tokenizer: o.OtherTokenizers = None,
    val: o.Validation = None,
    max_steps: o.MaxSteps = None,
    max_minutes: o.MaxMinutes = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    parallel: o.Parallel = "ddp",
    workers: o.Workers = 0,
    on_bad_sample: o.OnBadSample = "skip",
    max_bad_fraction: o.MaxBadFraction = 0.01,
    push: o.Push = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train what joins pretrained parts: contrastive towers, connectors, the phases of an understanding model."""
    check_stdin(shards)
    check_push(push)
    from stages.hub import resolve
    from stages.recipe import load_recipe

    loaded = load_recipe(recipe, size=size, sets=set)
    starts, tokenizers = o.pairs(init, "--init"), [resolve(spec) for spec in tokenizer or []]
    if dry_run:
        print_plan(training_plan(loaded, "align", shards, out, tokenizers, starts), as_json=json)
        return
    from stages.align import align as stage

    give_checkpoint(
        stage(loaded, shards, Path(out), run_options(ctx), init=starts, tokenizers=tokenizers, val=val), push=push, as_json=json
    )


@app.command(
    "train-unified",
    **_told("Train one network on all tasks of a recipe.", "mmgen train-unified codes --recipe show-o --size tiny --out runs/show-o"),
)
def train_unified(
    ctx: typer.Context,
    shards: o.Shards,
    recipe: o.RecipeName,
    out: o.Out,
    set: o.Settings = None,
    size: o.Size = None,
    init: o.Init = None,
    tokenizer: o.OtherTokenizers = None,
    val: o.Validation = None,
    max_steps: o.MaxSteps = None,
    max_minutes: o.MaxMinutes = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    parallel: o.Parallel = "ddp",
    workers: o.Workers = 0,
    on_bad_sample: o.OnBadSample = "skip",
    max_bad_fraction: o.MaxBadFraction = 0.01,
    push: o.Push = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train one network on all tasks of a recipe; a recipe with one task gives a specialist."""
    check_stdin(shards)
    check_push(push)
    from stages.hub import resolve
    from stages.recipe import load_recipe

    loaded = load_recipe(recipe, size=size, sets=set)
    starts, tokenizers = o.pairs(init, "--init"), [resolve(spec) for spec in tokenizer or []]
    if dry_run:
        print_plan(training_plan(loaded, "train-unified", shards, out, tokenizers, starts), as_json=json)
        return
    from stages.train_unified import train_unified as stage

    give_checkpoint(
        stage(loaded, shards, Path(out), run_options(ctx), init=starts, tokenizers=tokenizers, val=val), push=push, as_json=json
    )


@app.command("sample", **_told("Ask a model; the answers are shards.", "mmgen sample runs/show-o codes/val --task draw --out samples"))
def sample(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or hf://org/name.")],
    prompts: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT-SHARDS", help="Shards whose fields are the prompts, or - for stdin.", show_default=False),
    ] = None,
    *,
    out: o.OutOrPipe,
    task: o.Tasks = None,
    prompt: o.Prompt = None,
    image: o.Image = None,
    num_samples: o.NumSamples = 1,
    tools: o.Tools = None,
    save_files: o.SaveFiles = False,
    set: o.Settings = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    on_bad_sample: o.OnBadSample = "skip",
    max_bad_fraction: o.MaxBadFraction = 0.01,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Ask a model: every prompt is answered, and the answers are shards that keep the prompt's key, fields and truth.

    Outputs are written as sample.FIELD (sample.image.png, sample.answer.txt), beside the prompt they answer.

    With --tools a model that writes tool calls is a controller: every call is checked and asked of the checkpoint that the file names for
    the tool. sample.plan is what was written, sample.tools the record of the calls, those that went wrong with the reason,
    sample.picture and sample.text the last that came of them.
    """
    if (prompts is None) == (prompt is None and image is None):
        raise UsageError("sample needs prompts: either PROMPT-SHARDS, or --prompt and --image", hint="`mmgen sample --help` has an example")
    if save_files and out == "-":
        raise UsageError("--save-files needs a folder to write to, and --out is -", hint="name a folder with --out")
    check_stdin(prompts)
    from stages.hub import resolve

    checkpoint = resolve(model)
    if dry_run:
        print_plan(sample_plan(checkpoint, prompts, out, task or [], tools), as_json=json)
        return
    from stages.sample import sample as stage

    with stdout_for(out, as_json=json):
        written = stage(
            checkpoint,
            prompts,
            Path(out),
            run_options(ctx),
            tasks=task or [],
            sets=set or [],
            prompt=prompt,
            image=image,
            save_files=save_files,
            num_samples=num_samples,
            tools=tools,
        )
    give(written, as_json=json)


@app.command("eval", **_told("Score samples or a model, whatever they come from.", "mmgen eval samples --reference data/val --out scores"))
def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="SAMPLES|MODEL", help="Samples from any source, or a checkpoint (which then needs SHARDS).")
    ],
    shards: o.OptionalShards = None,
    *,
    out: o.Out,
    reference: o.Reference = None,
    map: o.FieldMap = None,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score samples, or a model, with every metric their fields allow; writes results.json with an interval for every number."""
    if target == "-" or shards == "-":
        raise UsageError("eval reads its samples more than once, so it cannot take them from stdin", hint="write them to a folder first")
    fields = o.pairs(map, "--map")
    if dry_run:
        print_plan(eval_plan(target, shards, reference, out, fields), as_json=json)
        return
    from stages.evaluate import evaluate as stage

    give(stage(target, shards, Path(out), run_options(ctx), reference=reference, field_map=fields), as_json=json)


@app.command("report", **_told("One HTML page: curves, grids, tables, provenance.", "mmgen report runs/show-o scores --out report.html"))
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Run folders: checkpoints, samples, scores.", exists=True, file_okay=False)
    ],
    out: o.OutFile,
    json: o.Json = False,
) -> None:
    """Write one self-contained HTML page about some runs: curves, grids of samples, tables of scores, where everything came from."""
    from stages.report import report as stage

    give(stage(paths, out), as_json=json)


@app.command("recipes", **_told("List, print or draw the recipes.", "mmgen recipes show-o --size tiny --draw show-o.svg"))
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe, to copy and to change.", autocompletion=o.recipe_names)
    ] = None,
    draw: o.Draw = None,
    size: o.Size = None,
    set: o.Settings = None,
    json: o.Json = False,
) -> None:
    """List the recipes with what is proved about each, print one, or draw one.

    Without --size and --set the file itself is printed; with them, the recipe they resolve to.
    """
    if name is None:
        if draw is not None or size is not None or set:
            raise UsageError("--draw, --size and --set need the NAME of a recipe", hint="`mmgen recipes` lists them")
        from stages.ladder import table

        print_recipes(table(), as_json=json)
        return
    from stages.recipe import load_recipe, recipe_names

    recipe = load_recipe(name, size=size, sets=set)
    if draw is not None:
        from stages.draw import draw as stage

        give(stage(recipe, draw), as_json=json)
        return
    shipped = recipe_names().get(name, Path(name))
    text = recipe.to_toml() if size is not None or set else shipped.read_text(encoding="utf-8")
    print_json({"name": recipe.name, "family": recipe.family, "size": recipe.size, "recipe": text}) if json else put(text, end="")


@app.command("inspect", **_told("What is in these shards or this checkpoint.", "mmgen inspect data/train --key 000000"))
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Shards (- for stdin), or a checkpoint folder; hf://org/name included.")],
    key: o.Key = None,
    json: o.Json = False,
) -> None:
    """Show what is in these shards or this checkpoint, in one screen."""
    check_stdin(path)
    from stages.hub import is_model, resolve
    from stages.inspect_path import describe

    description = describe(str(resolve(path)) if is_model(path) else path, key)
    print_json(description.data) if json else put(description.text)


@app.command("verify", **_told("Check shards: every tar, every key, every field.", "mmgen verify data/train"))
def verify(shards: o.Shards, index: o.Index = False, json: o.Json = False) -> None:
    """Check that every tar is whole, every key unique and every field well-formed; exit code 3 if not."""
    check_stdin(shards)
    if shards == "-" and index:
        raise UsageError("--index writes beside the tars, and - is a stream", hint="write it to a folder first")
    from stages.verify import verify as stage

    result = stage(shards, index=index)
    print_json({"shards": shards, **result.to_dict()}) if json else put(result.text())
    if not result.ok:
        raise typer.Exit(DataError.exit_code)
