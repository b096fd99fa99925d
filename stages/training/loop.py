"""fit: the one training loop. Autoencoders, contrastive towers, connectors and unified networks all go through it.

It owns the optimizers, learning rate, clipping, moving average, the non-finite guard, logging, saving and resuming. It is a
generator of `Progress`: what a callback framework would hook is the body of the caller's `for`.

    for progress in fit(step, trainee, batches, phase, run, options, ...):
        if progress.due: validate and log

Several ranks go through it in step: each has its part of a batch, and what could part them (a bad number, a signal, the clock) is agreed on.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Generator, Tensor, nn

from stages import ranks, stop
from stages.errors import GuardError, UsageError
from stages.files import append_line
from stages.options import RunOptions
from stages.recipe import Phase
from stages.run import Run
from stages.training.ema import EMA
from stages.training.optim import build_optimizer, learning_rate
from stages.training.parallel import Engine, StepResult, whole
from stages.training.seeds import stream_seed
from stages.training.state import load_state, newest_state, read_facts, save_state

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", covariant=True)

SAVE_EVERY_SECONDS = (5.0, 300.0)  # at least, at most; in between as often as costs SAVE_SHARE of the time
SAVE_SHARE, MAX_SAVE_SHARE = 0.01, 0.1  # where even the longest pause costs more than the second, it is made longer
LOG_EVERY_SECONDS = 2.0
VALIDATIONS = 8  # a run looks at its validation data this often, evenly spaced
BAD_STEPS_IN_A_ROW = 3


class Batches(Protocol[ItemIn]):
    """A source of batches that can be told where to continue."""

    position: int

    def next_batch(self) -> ItemIn: ...


@dataclass(frozen=True)
class Progress:
    """One finished step. `due`: time to validate. `last`: the phase's last step, or the last of this launch."""

    step: int
    steps: int
    due: bool
    last: bool


@dataclass
class Trainee(Generic[Item]):
    """What learns: all modules whose weights belong to the state, for each optimizer the parameters it moves, and how ranks share them."""

    modules: nn.Module
    learning: dict[str, list[tuple[str, nn.Parameter]]]
    engine: Engine | None = None


@dataclass
class Ledger:
    """Counts over all phases of a stage, kept in the training state."""

    phase: int = 0
    step: int = 0  # in the phase
    total_step: int = 0
    samples: int = 0
    tokens: int = 0
    position: int = 0
    seconds: float = 0.0
    flops: float = 0.0


def deterministic() -> None:
    """The same bits on every run of one machine; without filling fresh tensors, which would cost more than the rest."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module property, unknown to its stubs


def resolve_device(name: str) -> torch.device:
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}", hint="--device cpu always works") from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it (CUDA, AMX), else fp32; on CPUs without AMX bf16 is slower than fp32."""
    dtypes = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    if name != "auto":
        if name not in dtypes:
            raise UsageError(f"--dtype {name}: expected auto, fp32 or bf16")
        return dtypes[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = Path("/proc/cpuinfo")
    amx = flags.exists() and "amx_bf16" in flags.read_text(encoding="utf-8", errors="replace")
    return torch.bfloat16 if amx else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def resume_ledger(run: Run, options: RunOptions, dtype: torch.dtype) -> tuple[Ledger, Path | None]:
    """Where the newest training state stands, or a fresh ledger. Thread count and dtype change the bits, so they must agree."""
    folder = newest_state(run.out) if run.resuming else None
    if folder is None:
        run.cut_metrics(0)
        return Ledger(), None
    facts = read_facts(folder)
    for name, now in (("threads", torch.get_num_threads()), ("dtype", str(dtype)), ("ranks", ranks.size())):
        if facts.get(name) != now:
            run.say(
                f"warning: this run was made with {name} = {facts.get(name)}, it continues with {now}; the result will differ in the last bits"
            )
    ledger = Ledger(**{key: facts[key] for key in Ledger.__dataclass_fields__ if key in facts})
    run.cut_metrics(ledger.total_step)
    return ledger, folder


@stop.deferred_throughout
def fit(
    step: Callable[[Any, Generator], StepResult],
    trainee: Trainee[Any],
    batches: Batches[Any],
    phase: Phase,
    run: Run,
    options: RunOptions,
    ledger: Ledger,
    *,
    resume_from: Path | None = None,
    started: float | None = None,
    dtype: torch.dtype = torch.float32,
    ema_sink: Callable[[EMA], None] | None = None,
    all_steps: int | None = None,
) -> Iterator[Progress]:
    """Train one phase to its last step, or to where --max-steps, --max-minutes or a signal stops it.

    step: batch, generator of this step → StepResult; all its randomness comes from that generator, which depends on (seed,
    phase, step) alone. `ledger` carries the counts and is updated in place. Raises GuardError after three steps in a row whose
    loss or gradient is not finite (no optimizer ever moves on such a step). A stop (`stages.stop`) waits for the end of the step, or for
    its batch at most, and for the state to be saved.
    """
    started = time.monotonic() if started is None else started
    engine = trainee.engine or Engine(trainee.modules)
    engine.learn()
    optimizers: dict[str, torch.optim.Optimizer] = {name: build_optimizer(phase, named) for name, named in trainee.learning.items()}
    ema = EMA(trainee.learning["main"], phase.ema_decay) if phase.ema_decay is not None else None
    if resume_from is not None:
        load_state(resume_from, trainee.modules, optimizers, ema)
    if ema is not None and ema_sink is not None:
        ema_sink(ema)
    batches.position = ledger.position
    total = all_steps or phase.steps
    offset = ledger.total_step - ledger.step
    spacing = max(1, phase.steps // VALIDATIONS)
    meter = _Meter(run)
    last_save, pause = time.monotonic(), SAVE_EVERY_SECONDS[0]
    seconds_before, bad_in_a_row, saved = ledger.seconds, 0, ledger.total_step

    def save() -> None:
        nonlocal last_save, pause, saved
        started = time.monotonic()
        made_with = {"threads": torch.get_num_threads(), "dtype": str(dtype), "ranks": ranks.size()}
        facts = {**vars(ledger), **made_with, "phase_name": phase.name}
        save_state(run.out, trainee.modules, optimizers, ema, facts)
        last_save, saved = time.monotonic(), ledger.total_step
        least, most = SAVE_EVERY_SECONDS
        cost = last_save - started
        pause = max(least, min(cost / SAVE_SHARE, most), cost / MAX_SAVE_SHARE - cost)

    while ledger.step < phase.steps:
        if options.max_steps is not None and ledger.total_step >= options.max_steps:
            return  # an earlier launch or an earlier phase came this far
        own = [ranks.rank()] if ranks.rank() else []  # every rank draws noise of its own, the first what it draws alone
        generator = torch.Generator().manual_seed(stream_seed(options.seed, phase.name, "noise", ledger.step, *own))
        try:
            batch = batches.next_batch()
        except stop.Asked:
            if ledger.total_step > saved:
                run.status(step=ledger.total_step)
                save()
            stop.now("the state is saved" if saved else "")
        rate = learning_rate(phase, ledger.step)
        result = engine.step(partial(step, batch, generator), trainee.learning)
        norm = _update(result, optimizers, trainee.learning, engine, rate, phase.grad_clip)
        if norm is None:
            bad_in_a_row += 1
            _record_bad(run, ledger.total_step + 1, result)
            if bad_in_a_row >= BAD_STEPS_IN_A_ROW:
                raise GuardError(
                    f"step {ledger.total_step + 1}: the loss or its gradient is not finite, {bad_in_a_row} steps in a row; no weight was moved by them",
                    hint=f"the samples are listed in {run.meta / 'bad_batches.jsonl'}; a lower lr often helps",
                )
        else:
            bad_in_a_row = 0
            if ema is not None:
                ema.update(trainee.learning["main"])
        ledger.step, ledger.total_step = ledger.step + 1, ledger.total_step + 1
        out_of_time = options.max_minutes is not None and time.monotonic() - started >= 60 * options.max_minutes
        out_of_steps = options.max_steps is not None and ledger.total_step >= options.max_steps
        save_due = time.monotonic() - last_save > pause
        numbers = numbers_of(result)
        agreed = ranks.summed(
            torch.tensor(
                [result.samples, result.tokens, result.flops, out_of_time, save_due, stop.asked() is not None, *numbers.values()],
                dtype=torch.float64,
            )
        ).tolist()
        samples, tokens = map(int, agreed[:2])
        out_of_time, save_due, stopping = map(bool, agreed[3:6])
        numbers = {name: total / ranks.size() for name, total in zip(numbers, agreed[6:], strict=True)}
        ledger.samples, ledger.tokens, ledger.flops = ledger.samples + samples, ledger.tokens + tokens, ledger.flops + agreed[2]
        ledger.position, ledger.seconds = batches.position, seconds_before + time.monotonic() - started
        meter.add(numbers if norm is None else {**numbers, "grad_norm": norm}, samples, tokens)
        last = ledger.step == phase.steps or out_of_time or out_of_steps or stopping
        if meter.due or last:
            meter.write(ledger, phase, rate, total)
        due = ledger.step % spacing == 0 or ledger.step == phase.steps
        if last or save_due:
            save()
        if stopping:
            stop.now("the state is saved")
        yield Progress(ledger.step, phase.steps, due, last)
        if out_of_time or out_of_steps:
            return
    assert offset >= 0


def numbers_of(result: StepResult) -> dict[str, float]:
    """What one rank has for the log; every rank has the same names."""
    losses = {"loss" if name == "main" else f"loss/{name}": loss for name, loss in result.losses.items()}
    return {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in {**losses, **result.log}.items()}


def _update(
    result: StepResult,
    optimizers: Mapping[str, torch.optim.Optimizer],
    learning: Mapping[str, list[tuple[str, nn.Parameter]]],
    engine: Engine,
    rate: float,
    clip: float,
) -> float | None:
    """Backward, clip, step, for each optimizer; the gradient norm of `main`, or None (and nothing moved) if anything was not finite."""
    norms: dict[str, Tensor] = {}
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    bad = sum(not bool(torch.isfinite(loss)) for loss in result.losses.values())
    if ranks.summed(torch.tensor(bad)):
        return None
    for name, loss in result.losses.items():
        engine.backward(loss, [parameter for _, parameter in learning[name]])
    for name in result.losses:
        norms[name] = whole(nn.utils.clip_grad_norm_([parameter for _, parameter in learning[name]], clip, foreach=True))
        if not bool(torch.isfinite(norms[name])):
            return None
    for name in result.losses:
        for group in optimizers[name].param_groups:
            group["lr"] = group["base_lr"] * rate
        optimizers[name].step()
    return float(norms["main"])


def _record_bad(run: Run, step: int, result: StepResult) -> None:
    values = {name: float(loss.detach()) for name, loss in result.losses.items()}
    everywhere = ranks.gathered((values, result.keys))
    values = {name: sum(theirs[name] for theirs, _ in everywhere) / len(everywhere) for name in values}
    keys = [key for _, theirs in everywhere for key in theirs]
    if run.rank != 0:
        return
    append_line(run.meta / "bad_batches.jsonl", json.dumps({"step": step, "losses": {k: repr(v) for k, v in values.items()}, "keys": keys}))
    run.say(f"step {step}: a loss or gradient is not finite ({values}); this step moved nothing")


class _Meter:
    """Means over the steps since the last line of metrics.jsonl."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.tokens = self.samples = 0
        self.start = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self.start >= LOG_EVERY_SECONDS

    def add(self, numbers: Mapping[str, float], samples: int, tokens: int) -> None:
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples

    def write(self, ledger: Ledger, phase: Phase, rate: float, total: int) -> None:
        seconds = max(1e-9, time.monotonic() - self.start)
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        lr = phase.lr if isinstance(phase.lr, float) else phase.lr["default"]
        speed = {"tokens_per_second": round(self.tokens / seconds)} if self.tokens else {}
        spent = {"flops": ledger.flops} if ledger.flops else {}
        self.run.log(
            step=ledger.total_step,
            phase=phase.name,
            samples=ledger.samples,
            tokens=ledger.tokens,
            **spent,
            lr=lr * rate,
            seconds=round(ledger.seconds, 2),
            samples_per_second=round(self.samples / seconds, 1),
            **speed,
            **means,
        )
        shown = ", ".join(f"{name} {value:.3g}" for name, value in means.items() if name.startswith("loss"))
        self.run.status(step=ledger.total_step, of=total, message=f"{shown}, {self.samples / seconds:.0f} samples/s")
        self._reset()
