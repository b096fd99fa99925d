"""pretrain-tokenizer: what turns a field into tokens is learned here: a text tokenizer, or an image autoencoder.

A recipe with an autoencoder trains it through `fit`, on the pictures of the port its reconstruction objective reads, a
discriminator playing against it if the recipe says so. At the end its held-out reconstructions are measured (PSNR; codebook usage
and perplexity, or the scale of its latents), and the checkpoint gets the autoencoder alone: a discriminator is of no use to
anybody but a resume. A recipe with nothing but a text tokenizer learns that from the text fields of the shards.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from stages import ranks, stop
from stages.ahead import aside
from stages.data.sample import Sample
from stages.data.shards import Shards, open_shards
from stages.data.stream import spool_folder
from stages.errors import DataError, GuardError, RecipeError, nearest
from stages.metrics.codebook import perplexity, usage
from stages.metrics.psnr import psnr
from stages.model import check_memory, count_parameters, on_meta, set_trainable
from stages.options import RunOptions
from stages.parts.autoencoders import Autoencoder
from stages.parts.autoencoders.kl_cnn import KLAutoencoder
from stages.parts.objectives.reconstruction import Reconstruct, ReconstructionConfig
from stages.parts.quantizers import Quantizer
from stages.parts.tokenizers import TextTokenizer, texts_of
from stages.parts.views.square import to_pixels
from stages.recipe import Phase, Port, Recipe
from stages.run import Run
from stages.training.checkpoint import checkpoint_names, save_checkpoint
from stages.training.ema import EMA
from stages.training.loop import Progress, StepResult, Trainee, autocast, deterministic, fit, resolve_device, resolve_dtype, resume_ledger
from stages.training.order import Order
from stages.training.released import Start, adopt_tokenizer, fill, open_starts, with_released_scale
from stages.training.stream import not_shared
from stages.travelling import with_vocabularies

IN_MEMORY = 1024**3  # bytes of decoded pictures that are kept; beyond, they are decoded again every epoch
NUM_VALIDATION = 1024  # pictures that are reconstructed for the reported numbers
NUM_QUICK = 128  # and for those along the way
NUM_SCALE = 4096  # pictures the scale of continuous latents is measured on
DEAD_PERPLEXITY = 1.5  # below, nearly all codes are the same one
BATCH = 64  # pictures at once when nothing is learned


@ranks.joined()
def pretrain_tokenizer(
    recipe: Recipe, shards: str, out: Path, options: RunOptions, val: str | None = None, init: Mapping[str, str] | None = None
) -> Path:
    """Train the recipe's one autoencoder, or its one text tokenizer if it has no other part. Returns the checkpoint folder.

    init: address → checkpoint or released weights that the autoencoder, or a part of it, starts from (`stages/training/released.py`).
    val: shards to validate on; default is the split `val` beside `train`, if there is one.
    """
    data = open_shards(
        shards,
        split="train",
        on_bad_sample=options.on_bad_sample,
        max_bad_fraction=options.max_bad_fraction,
        spool=spool_folder(out, [*(init or {}).values(), val]),
        mixing=True,
    )
    validation = _open_validation(shards, val)
    inputs = [{"path": shards, "fingerprint": data.fingerprint, "provenance": data.provenance}]
    starts: list[Start] = []
    words: TextTokenizer | None = None
    if recipe.autoencoders:
        starts = open_starts({**recipe.init_from, **(init or {})})
        recipe = with_released_scale(recipe, starts)
        inputs += [start.as_input() for start in starts]
    elif init:
        words, adopted = adopt_tokenizer(recipe, init)
        recipe = with_vocabularies(recipe, {next(iter(recipe.tokenizers)): words})
        inputs.append(adopted)
    reads = [*(start.path for start in starts), val]
    with Run(
        out,
        stage="pretrain-tokenizer",
        options=options,
        kind="checkpoint",
        resolved_recipe=recipe.to_toml(),
        inputs=inputs,
        reads=reads,
        writes=checkpoint_names(),
    ) as run:
        if run.complete:
            return out
        if recipe.autoencoders:
            _train_autoencoder(recipe, data, validation, run, options, starts)
        else:
            _train_text_tokenizer(recipe, data, validation, run, options, words)
    return out


def _open_validation(shards: str, val: str | None) -> Shards | None:
    if val is not None:
        return open_shards(val, split="val")
    if shards == "-" or not (Path(shards) / "val").is_dir():
        return None
    return open_shards(shards, split="val")


# --- text -------------------------------------------------------------------------------------------------------------------------


def _train_text_tokenizer(
    recipe: Recipe, data: Shards, validation: Shards | None, run: Run, options: RunOptions, released: TextTokenizer | None = None
) -> None:
    """Learn the vocabulary, or keep a released one as it is; measure it on held-out texts."""
    if len(recipe.tokenizers) != 1:
        raise RecipeError(
            f"recipe '{recipe.name}': pretrain-tokenizer trains one autoencoder or one text tokenizer, this recipe has neither alone",
            hint="a recipe for it has one table [autoencoders.NAME] or [tokenizers.NAME]",
        )
    (config,) = recipe.tokenizers.values()
    fields = [field for field in config.fields if field in data.fields]
    if not fields:
        raise DataError(
            f"the text tokenizer learns from {', '.join(config.fields)}, and these shards have none of them",
            hint=f"their fields are {', '.join(data.fields)}; see tokenizers.{next(iter(recipe.tokenizers))}.fields",
        )
    count = 0

    def texts() -> Iterator[str]:
        nonlocal count
        for sample in _samples(data, fields, options.limit):
            count += 1
            for field in fields:
                yield from texts_of(sample.fields[field])

    read = list(texts())
    tokenizer = released or aside(partial(config.train, read))
    numbers: dict[str, float | int] = {"vocab_size": tokenizer.vocab_size, "samples": count}
    if validation is not None:
        held_out = [text for sample in _samples(validation, fields, NUM_VALIDATION) for f in fields for text in texts_of(sample.fields[f])]
        ids = tokenizer.encode_batch(held_out)
        numbers["bytes_per_token"] = sum(len(text.encode()) for text in held_out) / max(1, sum(map(len, ids)))
    run.log(**numbers)
    if run.rank == 0:
        save_checkpoint(run.out, recipe, {}, facts=numbers)
        tokenizer.save(run.out)
    run.say(data.write_bad_samples(run.meta))
    origin = f"{', '.join(fields)} of {count:,} samples" if released is None else "the release"
    run.finish(message=f"{tokenizer.vocab_size} entries from {origin}")


def _samples(shards: Shards, fields: list[str], limit: int | None) -> Iterator[Sample]:
    for i in range(min(len(shards), limit or len(shards))):
        sample = shards.read_or_skip(i, fields)
        if sample is not None:
            yield sample


# --- pictures ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What of the recipe this stage needs: the autoencoder and the objective by name, and which fields its port reads."""

    autoencoder: str
    objective: str
    config: ReconstructionConfig
    port: Port
    fields: list[str]


def plan_autoencoder(recipe: Recipe) -> Plan:
    """The one reconstruction of the recipe. RecipeError says what is missing."""
    phases = recipe.phases_for("pretrain-tokenizer")
    found = {name: config for name, config in recipe.objectives.items() if isinstance(config, ReconstructionConfig)}
    if len(recipe.autoencoders) != 1 or len(found) != 1:
        raise RecipeError(
            f"recipe '{recipe.name}': expected one autoencoder and one objective of kind 'reconstruction', "
            f"found {len(recipe.autoencoders)} and {len(found)}"
        )
    ((objective, config),) = found.items()
    (autoencoder,) = recipe.autoencoders
    if config.port not in recipe.ports:
        raise RecipeError(f"objectives.{objective}.port: there is no port '{config.port}'", hint=nearest(config.port, recipe.ports))
    port = recipe.ports[config.port]
    if port.autoencoder != autoencoder:
        raise RecipeError(f"ports.{config.port}.autoencoder: expected '{autoencoder}', which is to be trained, found '{port.autoencoder}'")
    tasks = {name: recipe.tasks[name] for phase in phases for name in phase.tasks}
    fields = {segment.field: None for task in tasks.values() for segment in task.flat() if segment.port == config.port and segment.field}
    if not fields or not any(objective in task.objectives for task in tasks.values()):
        raise RecipeError(
            f"recipe '{recipe.name}': no task of its phases has both the objective '{objective}' and a segment of port '{config.port}'"
        )
    for phase in phases:
        if phase.batch_size is None:
            raise RecipeError(f"phases.{phase.name}.batch_size: pictures are counted by samples, write how many")
    return Plan(autoencoder, objective, config, port, list(fields))


class Learner(nn.Module):
    """The autoencoder and its objective, so that the names of the weights are the recipe's addresses."""

    def __init__(self, recipe: Recipe, plan: Plan, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # convolutions start as torch starts them
            address, config = f"autoencoders.{plan.autoencoder}", recipe.autoencoders[plan.autoencoder]
            check_memory(on_meta(config.build, address=address), address)
            torch.manual_seed(seed)
            self.autoencoders = nn.ModuleDict({plan.autoencoder: recipe.autoencoders[plan.autoencoder].build()})
            self.objectives = nn.ModuleDict({plan.objective: plan.config.build()})

    @property
    def autoencoder(self) -> Autoencoder:
        (module,) = self.autoencoders.values()
        assert isinstance(module, Autoencoder)
        return module

    @property
    def objective(self) -> Reconstruct:
        (module,) = self.objectives.values()
        assert isinstance(module, Reconstruct)
        return module


@dataclass(frozen=True)
class PictureBatch:
    pixels: Tensor  # uint8 (b, H, W, 3)
    keys: tuple[str, ...]


class Pictures:
    """Batches of pictures in an order that depends on (data, seed, phase) alone; `position` counts the pictures given out.

    shared: of several ranks each takes its equal stretch of every batch.
    """

    def __init__(self, shards: Shards, plan: Plan, phase: Phase, seed: int, limit: int | None = None, *, shared: bool = False) -> None:
        self.shards, self.plan, self.phase, self.seed = shards, plan, phase, seed
        self.rank, self.ranks = (ranks.rank(), ranks.size()) if shared else (0, 1)
        self.position = 0
        self.fields = [field for field in plan.fields if field in shards.fields]
        if not self.fields:
            raise DataError(
                f"the autoencoder learns from {', '.join(plan.fields)}, which these shards lack",
                hint=f"their fields are {', '.join(shards.fields)}",
            )
        self.places = [(i, field) for numbers, _ in shards.mixture for i in numbers[: limit or len(numbers)] for field in self.fields]
        self.shape: tuple[int, ...] | None = None
        first = next((picture for number in range(len(self.places)) if (picture := self._decode(number)) is not None), None)
        if first is None:
            raise DataError(f"{shards.spec}: every sample is bad, the first: {shards.bad[0]}")
        self.pixels: np.ndarray | None = None
        if first.nbytes * len(self.places) <= IN_MEMORY:
            self._decode_all(first)
        samples = [i for i, _ in self.places]
        bounds = [(bisect_left(samples, numbers.start), bisect_left(samples, numbers.stop), weight) for numbers, weight in shards.mixture]
        self._sets = [(range(start, stop), weight) for start, stop, weight in bounds if stop > start]
        self._order = Order(self._sets, seed, phase.name)

    def begin(self, phase: Phase) -> None:
        """From here on give batches of this phase, in its own order."""
        self.phase, self._order = phase, Order(self._sets, self.seed, phase.name)

    def _decode_all(self, first: np.ndarray) -> None:
        pixels = np.empty((len(self.places), *first.shape), np.uint8)
        kept: list[tuple[int, str]] = []
        for number in range(len(self.places)):
            picture = self._decode(number)
            if picture is not None:
                pixels[len(kept)] = picture
                kept.append(self.places[number])
        self.places, self.pixels = kept, pixels[: len(kept)]

    def _decode(self, number: int) -> np.ndarray | None:
        """One picture as the port views it, None if its sample is bad. DataError if it is no picture or of another size than the first."""
        i, field = self.places[number]
        sample = self.shards.read_or_skip(i, [field])
        if sample is None:
            return None
        picture = sample.fields[field]
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
            raise DataError(f"{sample.source}: {sample.key}: field '{field}' is no picture")
        if self.plan.port.view is not None:
            picture = self.plan.port.view.apply(picture)
        self.shape = self.shape or picture.shape
        if picture.shape != self.shape:
            raise DataError(
                f"{sample.source}: {sample.key}: the picture is {picture.shape[0]} x {picture.shape[1]}, others are {self.shape[0]} x {self.shape[1]}",
                hint=f'give ports.{self.plan.config.port} a view, such as view = {{ kind = "square", size = {min(self.shape[:2])} }}',
            )
        return picture

    def __len__(self) -> int:
        return len(self.places)

    def take(self, numbers: list[int]) -> PictureBatch:
        """Pictures by number; bad ones are left out."""
        if self.pixels is not None:
            stack = self.pixels[numbers]
            good = numbers
        else:
            decoded = []
            for number in numbers:
                if self.ranks == 1:  # of several, all would have to stop at the same batch
                    stop.poll()
                if (picture := self._decode(number)) is not None:
                    decoded.append((number, picture))
            if not decoded:
                raise DataError(f"{self.shards.spec}: a whole batch of bad samples, the last: {self.shards.bad[-1]}")
            stack, good = np.stack([picture for _, picture in decoded]), [number for number, _ in decoded]
        return PictureBatch(torch.from_numpy(stack), tuple(self.shards.key(self.places[number][0]) for number in good))

    def next_batch(self) -> PictureBatch:
        assert self.phase.batch_size is not None
        if self.phase.batch_size % self.ranks:
            raise not_shared(self.phase, self.ranks)
        share = self.phase.batch_size // self.ranks
        start = self.position + self.rank * share
        numbers = [self._order.at(place)[1] for place in range(start, start + share)]
        self.position += self.phase.batch_size
        return self.take(numbers)

    def batches(self, count: int) -> Iterator[PictureBatch]:
        """The first `count` pictures, in order."""
        count = min(count, len(self))
        for start in range(0, count, BATCH):
            yield self.take(list(range(start, min(start + BATCH, count))))


def to_images(batch: PictureBatch, device: torch.device) -> Tensor:
    """float (b, 3, H, W) in [-1, 1]."""
    return batch.pixels.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _train_autoencoder(
    recipe: Recipe, data: Shards, validation: Shards | None, run: Run, options: RunOptions, starts: Sequence[Start] = ()
) -> None:
    started = time.monotonic()
    deterministic()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    plan, phases = plan_autoencoder(recipe), recipe.phases_for("pretrain-tokenizer")
    learner = Learner(recipe, plan, options.seed)
    for start in starts:
        run.say(fill(learner, start))
    learner.to(device)
    autoencoder = learner.autoencoder
    pictures = Pictures(data, plan, phases[0], options.seed, options.limit, shared=True)
    assert pictures.shape is not None
    grid = autoencoder.grid(*pictures.shape[:2])
    held_out = Pictures(validation, plan, phases[0], options.seed) if validation is not None else pictures
    run.say(
        f"{recipe.name} ({recipe.size}): {count_parameters(autoencoder):,} parameters, {len(pictures):,} pictures of "
        f"{pictures.shape[0]} x {pictures.shape[1]} as {grid[0]} x {grid[1]}, {device}, {str(dtype).removeprefix('torch.')}"
    )
    ledger, state = resume_ledger(run, options, dtype)
    all_steps = sum(phase.steps for phase in phases)
    averages: dict[str, Tensor] = {}
    stopped = False
    for number, phase in enumerate(phases):
        if number < ledger.phase:
            continue
        if number > ledger.phase:
            ledger.phase, ledger.step, ledger.position = number, 0, 0
        learner.train()
        learning: dict[str, list[tuple[str, nn.Parameter]]] = {"main": []}
        for name, parameter in set_trainable(learner, phase.trainable, phase.frozen):
            learning.setdefault("discriminator" if name.startswith("objectives.") else "main", []).append((name, parameter))

        def step(batch: PictureBatch, generator: Generator) -> StepResult:
            with autocast(device, dtype):
                found = learner.objective(autoencoder, to_images(batch, device), ledger.total_step, generator)
            losses = {"main": found.main}
            if found.discriminator is not None:
                losses["discriminator"] = found.discriminator
            log: dict[str, float | int | Tensor] = {f"loss/{name}": value for name, value in found.parts.items() if name not in losses}
            log |= {f"codebook/{name}": value for name, value in codebook_health(autoencoder).items()}
            return StepResult(losses, log, samples=len(batch.keys), keys=batch.keys)

        pictures.begin(phase)
        average: list[EMA] = []
        for progress in fit(
            step,
            Trainee[PictureBatch](learner, learning),
            pictures,
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
            check_codebook(recipe, plan.autoencoder, autoencoder, progress)
            if progress.due and not progress.last:
                quick = measure(autoencoder, held_out, NUM_QUICK, device)
                run.log(step=ledger.total_step, phase=phase.name, **{f"val/{name}": value for name, value in quick.items()})
        stopped = ledger.step < phase.steps
        state = None
        averages = dict(average[0].weights()) if average else {}
        if stopped:
            break

    learner.load_state_dict({**learner.state_dict(), **averages})
    data.note_left_out(ranks.gathered(data.left_out))
    if run.rank != 0:
        return
    run.say(data.write_bad_samples(run.meta))
    autoencoder.eval()
    if isinstance(autoencoder, KLAutoencoder):
        autoencoder.fit_latent_scale(to_images(batch, device) for batch in pictures.batches(NUM_SCALE))
    numbers = measure(autoencoder, held_out, NUM_VALIDATION, device)
    run.log(step=ledger.total_step, phase=phases[ledger.phase].name, **{f"val/{name}": value for name, value in numbers.items()})
    if ledger.total_step and not stopped and numbers.get("perplexity", DEAD_PERPLEXITY) < DEAD_PERPLEXITY:
        raise GuardError(
            f"the codebook died: {numbers['codes']:,} codes of held-out pictures have a perplexity of {numbers['perplexity']:.2f}",
            hint=f"autoencoders.{plan.autoencoder}.quantizer: revive = 0.03 moves unused codes, decay = 0.99 makes the codebook follow",
        )
    tensors = {name: value for name, value in learner.state_dict().items() if name.startswith("autoencoders.")}
    facts = {
        "picture_size": list(pictures.shape[:2]),
        "steps": ledger.total_step,
        "samples": ledger.samples,
        "seed": options.seed,
        "ema": bool(averages),
        **numbers,
    }
    save_checkpoint(run.out, recipe, tensors, facts=facts)
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items() if name != "codes")
    run.finish("stopped" if stopped else "done", f"{ledger.total_step} of {all_steps} steps; {shown}")


def codebook_health(autoencoder: Autoencoder) -> dict[str, float]:
    quantizer = getattr(autoencoder, "quantizer", None)
    return quantizer.health() if isinstance(quantizer, Quantizer) else {}


def check_codebook(recipe: Recipe, name: str, autoencoder: Autoencoder, progress: Progress) -> None:
    """Stop where the codebook has died, if the recipe says what dying is. Looked at when validation is due, a codebook needs time to spread."""
    least = getattr(getattr(recipe.autoencoders[name], "quantizer", None), "min_perplexity", 0.0)
    found = codebook_health(autoencoder).get("perplexity")
    if progress.due and found is not None and found < least:
        raise GuardError(
            f"step {progress.step}: the codebook has a perplexity of {found:.2f}, autoencoders.{name}.quantizer.min_perplexity is {least:g}",
            hint="revive = 0.03 moves more codes, decay = 0.99 makes the codebook follow",
        )


@torch.no_grad()
def measure(autoencoder: Autoencoder, pictures: Pictures, count: int, device: torch.device) -> Mapping[str, float | int]:
    """Reconstruction numbers of the first `count` pictures, without training noise.

    `psnr` in dB; with a codebook its usage and perplexity over `codes` codes; without, the standard deviation of the latents.
    """
    training = autoencoder.training
    autoencoder.eval()
    scores: list[float] = []
    size = autoencoder.codebook_size
    counts = np.zeros(size or 0, np.int64)
    total = squares = number = 0.0
    for batch in pictures.batches(count):
        images = to_images(batch, device)
        if size is not None:
            codes = autoencoder.encode_codes(images)
            counts += np.bincount(codes.flatten().cpu().numpy(), minlength=size)
            rebuilt = autoencoder.decode_codes(codes, autoencoder.grid(*images.shape[2:]))
        else:
            latents = autoencoder.encode(images)
            total, squares, number = total + float(latents.sum()), squares + float(latents.square().sum()), number + latents.numel()
            rebuilt = autoencoder.decode(latents)
        scores += [psnr(to_pixels(image), pixels.numpy()) for image, pixels in zip(rebuilt, batch.pixels, strict=True)]
    autoencoder.train(training)
    numbers: dict[str, float | int] = {"psnr": float(np.mean(scores)), "pictures": len(scores)}
    if size is not None:
        return {**numbers, "codebook_usage": usage(counts), "perplexity": perplexity(counts), "codes": int(counts.sum())}
    return {**numbers, "latent_std": float(np.sqrt(max(0.0, squares / number - (total / number) ** 2)))}
