"""train-unified: one network learns all tasks of a recipe. The story of a training run, top to bottom.

Shards give samples; a task of the recipe turns a sample into a sequence of typed segments; sequences are packed into a batch, a
table with one row per token; each port's objective hides or noises what is to be predicted; the network runs once; each port
judges its own rows. `fit` repeats that. Phases follow each other in file order, and a second run with the same --out continues
inside the right one. `align` tells the same story with the phases that belong to it.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from stages import ranks
from stages.data.shards import Shards, open_shards
from stages.data.stream import spool_folder
from stages.errors import UsageError
from stages.flops import FlopCounter
from stages.model import Model, PortLoss, auxiliary_weights, build_model, count_parameters, covers, set_trainable, shared_losses
from stages.options import RunOptions
from stages.recipe import Phase, Recipe, Stage
from stages.run import Run
from stages.sequence.plan import Planner
from stages.sequence.segment import Batch
from stages.training.checkpoint import checkpoint_names, fingerprint, open_checkpoint, save_checkpoint
from stages.training.ema import EMA
from stages.training.features import precompute_features
from stages.training.loop import StepResult, Trainee, autocast, deterministic, fit, resolve_device, resolve_dtype, resume_ledger
from stages.training.parallel import Engine, whole
from stages.training.released import fill, open_starts
from stages.training.stream import Stream, unused_tasks
from stages.training.validation import Validation
from stages.travelling import Travelling, find_tokenizers, load_travelling


def train_unified(
    recipe: Recipe,
    shards: str,
    out: Path,
    options: RunOptions,
    init: Mapping[str, str] | None = None,
    tokenizers: Sequence[Path] = (),
    val: str | None = None,
) -> Path:
    """Train one network on every task of the recipe. Returns the checkpoint folder."""
    return train_phases("train-unified", recipe, shards, out, options, init or {}, tokenizers, val)


@ranks.joined()
def train_phases(
    stage: Stage,
    recipe: Recipe,
    shards: str,
    out: Path,
    options: RunOptions,
    init: Mapping[str, str],
    tokenizers: Sequence[Path],
    val: str | None,
) -> Path:
    """Run all phases of one stage. init: address → checkpoint or released weights (a folder, hf://…) that the part starts from."""
    started = time.monotonic()
    deterministic()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    phases = recipe.phases_for(stage)
    data = open_shards(
        shards,
        split="train",
        on_bad_sample=options.on_bad_sample,
        max_bad_fraction=options.max_bad_fraction,
        spool=spool_folder(out, [*init.values(), *tokenizers, val]),
        mixing=True,
    )
    starts = open_starts(init if "model" in init else {**recipe.init_from, **init})
    filled = [start.filled for start in starts]
    came_along = [path for start in starts if start.released is None for path in open_checkpoint(start.path).tokenizers.values()]
    recipe, travelling = load_travelling(recipe, find_tokenizers(recipe, tokenizers, came_along, data.tokenizers))
    check_fingerprints(recipe, travelling, data)

    inputs = [{"path": shards, "fingerprint": data.fingerprint, "provenance": data.provenance}]
    inputs += [start.as_input() for start in starts]
    reads = [*(start.path for start in starts), *tokenizers, val]
    writes = checkpoint_names(travelling.folders)
    with Run(
        out, stage=stage, options=options, kind="checkpoint", resolved_recipe=recipe.to_toml(), inputs=inputs, reads=reads, writes=writes
    ) as run:
        if run.complete:
            return out
        model = build_model(recipe, options.seed)
        while starts:  # one after the other, so that no weight is held twice for long
            run.say(fill(model, starts.pop(0), travelling.text))
        copy_experts(model, filled)
        check_weights_come_from_somewhere(model, phases, filled)
        model.to(device)
        model.quantizers = travelling.quantizers(recipe)
        planner = Planner(recipe, travelling.text, dict(model.encoders.items()))
        planner.trust_ids({name: entry.get("tokenizer") for name, entry in data.fields.items()})
        validation_data = open_validation(shards, val)
        ledger, state = resume_ledger(run, options, dtype)
        all_steps = sum(phase.steps for phase in phases)
        run.say(
            f"{recipe.name} ({recipe.size}): {count_parameters(model):,} parameters, {len(data):,} samples, {all_steps:,} steps, {device}, {str(dtype).removeprefix('torch.')}"
        )
        engine = Engine(model, options.parallel)
        averages: dict[str, Tensor] = {}
        stopped = False
        for number, phase in enumerate(phases):
            if number < ledger.phase:
                continue
            if number > ledger.phase:
                ledger.phase, ledger.step, ledger.position = number, 0, 0
            learning = set_trainable(model, phase.trainable, phase.frozen)
            engine(partial(precompute_features, model, planner, [data, validation_data], phase))
            stream = Stream(data, planner, phase, seed=options.seed, limit=options.limit, shared=True, workers=options.workers)
            for task in unused_tasks(planner, phase.tasks, data):
                run.say(f"note: phase '{phase.name}' leaves out the task '{task}': these shards lack its fields")
            validation = Validation(validation_data, planner, phase, options.seed) if validation_data is not None else None
            average: list[EMA] = []
            step = training_step(model, phase, device, dtype)
            trainee = Trainee[Batch](model, {"main": learning}, engine)
            for progress in fit(
                step,
                trainee,
                stream,
                phase,
                run,
                options,
                ledger,
                resume_from=state,
                started=started,
                dtype=dtype,
                ema_sink=average.append,
                all_steps=all_steps,
            ):
                if progress.due and validation is not None:
                    validate(engine, model, validation, run, ledger.total_step, phase.name, device)
            stopped = ledger.step < phase.steps
            state = None
            averages = dict(average[0].weights()) if average else {}
            if stream.too_long:
                run.say(f"{stream.too_long} samples were longer than a batch and were left out")
            if stopped:
                break
        weights = {name: whole(value) for name, value in {**model.state_dict(), **averages}.items()}
        facts = {
            "steps": ledger.total_step,
            "samples": ledger.samples,
            "tokens": ledger.tokens,
            "flops": ledger.flops,
            "seed": options.seed,
            "ema": bool(averages),
            "grids": picture_grids(recipe, planner, data),
        }
        data.note_left_out(ranks.gathered(data.left_out))
        if run.rank == 0:
            run.say(data.write_bad_samples(run.meta))
            save_checkpoint(out, recipe, weights, tokenizers=travelling.folders, facts=facts)
        run.finish("stopped" if stopped else "done", f"{ledger.total_step} of {all_steps} steps, {ledger.samples:,} samples")
    return out


def training_step(model: Model, phase: Phase, device: torch.device, dtype: torch.dtype) -> Any:
    """The closure `fit` calls: corrupt, embed, run, judge; one weighted sum of the ports' losses."""
    model.train()
    set_trainable(model, phase.trainable, phase.frozen)  # puts frozen towers back into evaluation mode
    counter = FlopCounter(model, phase)

    def step(batch: Batch, generator: Generator) -> StepResult:
        with autocast(device, dtype):
            own = model.losses(batch.to(device), generator)
        losses, means = shared_losses(model.recipe, own)
        total = combine(model.recipe, losses, phase.reduce)
        log: dict[str, Any] = {f"loss/{name}": mean for name, mean in means.items()}
        log["padding"] = batch.padding
        flops = sum(counter.of(batch).values())
        return StepResult({"main": total}, log, samples=len(batch.keys), tokens=batch.num_tokens, flops=flops, keys=batch.keys)

    return step


def validate(engine: Engine, model: Model, validation: Validation, run: Run, step: int, phase: str, device: torch.device) -> None:
    """Log the held-out losses. What goes wrong there is said, and training goes on."""
    try:
        numbers = engine(partial(validation.losses, model, device))
    except Exception as error:
        run.say(f"warning: step {step}: validation failed, training goes on ({type(error).__name__}: {error})")
        return
    run.log(step=step, phase=phase, **numbers)


def combine(recipe: Recipe, losses: Mapping[str, PortLoss], reduce: str) -> Tensor:
    """The loss that is differentiated. own-tokens: each port by its own count (BAGEL); all-tokens: one count for all (Chameleon).
    What parts of the network ask for is always added by its own count."""
    auxiliary = {name: weight for name, weight in auxiliary_weights(recipe).items() if name in losses}
    weights = {name: recipe.ports[name].loss_weight if name in recipe.ports else 1.0 for name in losses} | auxiliary
    if reduce == "all-tokens":
        count = sum(loss.count for name, loss in losses.items() if name not in auxiliary) or 1
        counts = {name: losses[name].count if name in auxiliary else count for name in losses}
        return torch.stack([weights[name] * loss.total / (counts[name] or 1) for name, loss in losses.items()]).sum()
    return torch.stack([weights[name] * loss.mean for name, loss in losses.items()]).sum()


def copy_experts(model: Model, starts: Sequence[str]) -> None:
    """expert_init = "copy" once more after --init: the copies are of the weights that were loaded, not of fresh ones."""
    for name, network in model.recipe.backbones.items():
        if network.expert_init == "copy" and any(covers(address, f"backbones.{name}.experts.{network.experts[0]}") for address in starts):
            model.backbones[name].copy_expert(network.experts[0])  # type: ignore[operator]


def check_weights_come_from_somewhere(model: Model, phases: Sequence[Phase], starts: Sequence[str]) -> None:
    """A part that no phase trains and no checkpoint fills would stay at random: the field's quietest mistake."""
    for name, _ in model.named_parameters():
        trained = any(any(covers(a, name) for a in phase.trainable) and not any(covers(a, name) for a in phase.frozen) for phase in phases)
        if not trained and not any(covers(address, name) or name.startswith("ports.") for address in starts):
            part = ".".join(name.split(".")[:2])
            raise UsageError(
                f"'{part}' is frozen in every phase and starts from nothing ({name} would stay at random)",
                hint=f"--init {part}=DIR, a trained checkpoint",
            )


def check_fingerprints(recipe: Recipe, travelling: Travelling, data: Shards) -> None:
    """Codes of one codebook never train a model of another: every field says who wrote it."""
    for name, config in recipe.autoencoders.items():
        expected = fingerprint(travelling.folders[f"autoencoders.{name}"])
        for field, entry in data.fields.items():
            wrote = entry.get("tokenizer")
            if field.endswith(f".{config.store}") and wrote and wrote != expected:
                raise UsageError(
                    f"the field '{field}' was written by the tokenizer {wrote[:8]}, but autoencoders.{name} is {expected[:8]}",
                    hint="tokenize the shards again, or pass the --tokenizer that wrote them",
                )


def picture_grids(recipe: Recipe, planner: Planner, data: Shards) -> dict[str, list[int]]:
    """The shape of a picture's tokens for each port that draws, as the shards' field table says: what `sample` will draw."""
    grids: dict[str, list[int]] = {}
    for task in recipe.tasks.values():
        for segment in task.flat():
            port = recipe.ports[segment.port]
            shape = data.fields.get(planner.field_of(segment), {}).get("shape") if segment.field and port.autoencoder else None
            if port.objective is not None and shape and None not in shape:
                grids[segment.port] = list(shape) if port.is_ids else [side // port.patch_size for side in shape[-2:]]
            if port.objective is not None and port.encoder and port.view is not None:
                encoder: Any = planner.encoders[port.encoder]
                grids[segment.port] = [encoder.config.num_tokens(port.view.size, port.view.size)]
    return grids


def open_validation(shards: str, val: str | None) -> Shards | None:
    """--val, or the `val` split that stands beside `train`; none when there is neither."""
    if val is not None:
        return open_shards(val, split="val")
    if shards == "-" or not (Path(shards) / "val").is_dir():
        return None
    return open_shards(shards, split="val")
