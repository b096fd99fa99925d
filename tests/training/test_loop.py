"""The training loop on a straight line: what a step does, what a bad step does not do, where a run stops and goes on."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from stages import stop
from stages.errors import GuardError, Preempted, UsageError
from stages.options import RunOptions
from stages.recipe import Phase
from stages.run import Run
from stages.training.ema import EMA
from stages.training.loop import Ledger, Progress, StepResult, Trainee, fit, resolve_device, resolve_dtype, resume_ledger
from stages.training.state import newest_state


@dataclass
class Numbers:
    """Batches 0, 1, 2, …"""

    position: int = 0

    def next_batch(self) -> int:
        self.position += 1
        return self.position - 1


def phase_of(steps: int = 6, **keys: Any) -> Phase:
    return Phase(**{"name": "p", "stage": "train-unified", "steps": steps, "lr": 0.1, "grad_clip": 1e9, **keys})


def line() -> nn.Linear:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(3, 2) / 10)
        model.bias.fill_(0.5)
    return model


def squared(model: nn.Module) -> Callable[[int, Generator], StepResult]:
    """A loss that depends on the batch and on the step's own generator."""

    def step(batch: int, generator: Generator) -> StepResult:
        x = torch.randn(4, 2, generator=generator) + batch
        return StepResult({"main": model(x).square().mean()}, {"batch": batch}, samples=4, tokens=10, keys=(f"k{batch}",))

    return step


class Training:
    """One launch of a run in `out`: fit with everything a stage would give it."""

    def __init__(
        self, out: Path, phase: Phase, model: nn.Module | None = None, step: Any = None, learning: Any = None, **options: Any
    ) -> None:
        self.out, self.phase, self.options = out, phase, RunOptions(quiet=True, **options)
        self.model = model if model is not None else line()
        self.step = step or squared(self.model)
        self.learning = learning or {"main": list(self.model.named_parameters())}
        self.averages: list[EMA] = []
        self.progress: list[Progress] = []
        self.batches = Numbers()

    def launch(self, on_progress: Callable[[Run, Progress], None] = lambda run, progress: None) -> Ledger:
        with Run(
            self.out, stage="train-unified", options=self.options, kind="checkpoint", resolved_recipe=f"steps = {self.phase.steps}"
        ) as run:
            ledger, state = resume_ledger(run, self.options, torch.float32)
            for progress in fit(
                self.step,
                Trainee(self.model, self.learning),
                self.batches,
                self.phase,
                run,
                self.options,
                ledger,
                resume_from=state,
                ema_sink=self.averages.append,
            ):
                self.progress.append(progress)
                on_progress(run, progress)
            run.finish("done" if ledger.step == self.phase.steps else "stopped")
        return ledger


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


# steps


def test_a_step_is_one_step_of_adamw_at_the_scheduled_rate(tmp_path: Path) -> None:
    training = Training(tmp_path, phase_of(1, lr=0.4, warmup_steps=4))
    before = weights(training.model)
    training.launch()
    moved = training.model.weight.detach() - before["weight"]  # type: ignore[operator]
    torch.testing.assert_close(
        moved.abs(), torch.full((3, 2), 0.1), atol=1e-4, rtol=1e-4
    )  # Adam's first step is lr · sign, lr is a quarter here


def test_gradients_are_clipped_and_the_norm_before_clipping_is_logged(tmp_path: Path) -> None:
    """Adam forgets the scale of a gradient, so the clipped gradient is read off directly."""
    seen = []

    def step(batch: int, generator: Generator) -> StepResult:
        return StepResult({"main": 30 * training.model.weight.sum()}, samples=1)  # type: ignore[operator, union-attr]

    training = Training(tmp_path, phase_of(2, grad_clip=0.5))
    training.step, training.learning = step, {"main": [("weight", training.model.weight)]}
    training.launch(lambda run, progress: seen.append(training.model.weight.grad.norm()))  # type: ignore[union-attr,operator]
    assert [float(norm) for norm in seen] == pytest.approx([0.5, 0.5], rel=1e-4)
    assert metrics(tmp_path)[-1]["grad_norm"] == pytest.approx(30 * 6**0.5, rel=1e-5)


def test_the_randomness_of_a_step_depends_on_seed_phase_and_step_alone(tmp_path: Path) -> None:
    def numbers(name: str, phase: Phase, seed: int) -> list[float]:
        drawn: list[float] = []

        def step(batch: int, generator: Generator) -> StepResult:
            drawn.append(float(torch.rand((), generator=generator)))
            return StepResult({"main": training.model(torch.ones(1, 2)).sum()})

        training = Training(tmp_path / name, phase, seed=seed)
        training.step = step
        training.launch()
        return drawn

    first = numbers("a", phase_of(4), 0)
    assert len(set(first)) == 4
    assert numbers("b", phase_of(6), 0)[:4] == first
    assert not set(numbers("c", phase_of(4), 1)) & set(first)
    assert not set(numbers("d", phase_of(4, name="q"), 0)) & set(first)


def test_two_losses_move_their_own_parameters_only(tmp_path: Path) -> None:
    """Autoencoder and discriminator: a loss of one leaves no gradient in the other, though both see both."""
    model = nn.ModuleDict({"main": line(), "critic": line()})
    gradients: list[list[bool]] = []

    def step(batch: int, generator: Generator) -> StepResult:
        def product() -> Tensor:
            return (model["main"](torch.ones(1, 2)) * model["critic"](torch.ones(1, 2))).sum()

        return StepResult({"main": product(), "critic": -product()})

    learning = {name: list(model[name].named_parameters()) for name in ("main", "critic")}
    expected = torch.autograd.grad(step(0, Generator()).losses["main"], model["main"].weight)[0]  # type: ignore[arg-type]
    training = Training(tmp_path, phase_of(1), model, step, learning)
    training.launch(
        lambda run, progress: gradients.append([torch.equal(model["main"].weight.grad, expected), bool(model["critic"].weight.grad.any())])
    )  # type: ignore[arg-type,union-attr,operator]
    assert gradients == [[True, True]]


def test_the_average_of_the_weights_follows_every_good_step(tmp_path: Path) -> None:
    training = Training(tmp_path, phase_of(5, ema_decay=0.5))
    expected = weights(training.model)
    count = 0

    def follow(run: Run, progress: Progress) -> None:
        nonlocal count
        decay = min(0.5, (1 + count) / (10 + count))
        for name, value in weights(training.model).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
        count += 1

    training.launch(follow)
    for name, value in training.averages[0].weights().items():
        torch.testing.assert_close(value, expected[name])


def test_metrics_are_means_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    ledger = Training(tmp_path, phase_of(4)).launch()
    (line_,) = metrics(tmp_path)
    assert (line_["step"], line_["samples"], line_["tokens"], line_["batch"]) == (4, 16, 40, 1.5)
    assert (ledger.step, ledger.samples, ledger.tokens, ledger.position) == (4, 16, 40, 4)
    assert line_["lr"] == pytest.approx(0.1)


def test_validation_is_due_at_even_distances_and_at_the_end(tmp_path: Path) -> None:
    training = Training(tmp_path, phase_of(20))
    training.launch()
    assert [progress.step for progress in training.progress if progress.due] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [progress.step for progress in training.progress if progress.last] == [20]


# the guard


def breaking(model: nn.Module, bad: set[int], value: float = float("nan")) -> Callable[[int, Generator], StepResult]:
    good = squared(model)

    def step(batch: int, generator: Generator) -> StepResult:
        result = good(batch, generator)
        return StepResult({"main": result.losses["main"] * value}, keys=result.keys) if batch in bad else result

    return step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_three_bad_steps_in_a_row_stop_the_run_with_exit_4_and_move_nothing(tmp_path: Path, value: float) -> None:
    model = line()
    training = Training(tmp_path, phase_of(9), model, breaking(model, {2, 3, 4}, value))
    at_two: list[dict[str, Tensor]] = []
    with pytest.raises(GuardError, match="step 5: the loss or its gradient is not finite, 3 steps in a row") as caught:
        training.launch(lambda run, progress: at_two.append(weights(model)))
    assert caught.value.exit_code == 4
    assert equal(weights(model), at_two[1])
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 4
    bad = [json.loads(text) for text in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["keys"]) for entry in bad] == [(3, ["k2"]), (4, ["k3"]), (5, ["k4"])]


def test_a_single_bad_step_is_skipped_and_training_goes_on(tmp_path: Path) -> None:
    model = line()
    training = Training(tmp_path, phase_of(6, ema_decay=0.9), model, breaking(model, {1, 2, 4}))
    seen: list[dict[str, Tensor]] = []
    assert training.launch(lambda run, progress: seen.append(weights(model))).step == 6
    assert [equal(a, b) for a, b in pairwise(seen)] == [True, True, False, True, False]
    assert training.averages[0].updates == 3


def test_a_finite_loss_with_an_infinite_gradient_moves_nothing(tmp_path: Path) -> None:
    model = line()

    def step(batch: int, generator: Generator) -> StepResult:
        return StepResult(
            {"main": (model.weight - model.weight.detach()).sum().abs().sqrt() + model.bias.sum()}
        )  # 0 at a point without slope

    before = weights(model)
    with pytest.raises(GuardError):
        Training(tmp_path, phase_of(9), model, step).launch()
    assert equal(weights(model), before)


# stopping and going on


def straight(out: Path, **keys: Any) -> Training:
    training = Training(out, phase_of(10, lr_schedule="cosine", warmup_steps=2, **keys))
    training.launch()
    return training


def test_stopping_and_going_on_gives_the_same_bits_as_going_straight(tmp_path: Path) -> None:
    expected = straight(tmp_path / "straight", ema_decay=0.8)
    phase = expected.phase
    first = Training(tmp_path / "broken", phase, max_steps=5)
    assert first.launch().step == 5
    assert json.loads((tmp_path / "broken" / "status.json").read_text())["state"] == "stopped"
    with torch.no_grad():
        fresh = nn.Linear(2, 3)  # other weights: all of them must come from the state
    second = Training(tmp_path / "broken", phase, fresh)
    assert second.launch().step == 10
    assert [progress.step for progress in second.progress] == [6, 7, 8, 9, 10]
    assert equal(weights(second.model), weights(expected.model))
    assert equal(second.averages[0].weights(), expected.averages[0].weights())
    assert second.batches.position == 10


def test_a_launch_that_may_not_go_further_takes_no_step(tmp_path: Path) -> None:
    """--max-steps 5, twice: the second launch finds the run where it may go no further."""
    phase = phase_of(10)
    first = Training(tmp_path, phase, max_steps=5)
    first.launch()
    again = Training(tmp_path, phase, max_steps=5)
    assert again.launch().step == 5


def test_metrics_written_after_the_last_state_are_cut_when_a_run_goes_on(tmp_path: Path) -> None:
    phase = phase_of(10)
    Training(tmp_path, phase, max_steps=4).launch()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    Training(tmp_path, phase).launch()
    assert [entry["step"] for entry in metrics(tmp_path)] == [4, 10]


def test_time_runs_out_at_a_whole_step(tmp_path: Path) -> None:
    ledger = Training(tmp_path, phase_of(10), max_minutes=0.0).launch()
    assert ledger.step == 1
    assert newest_state(tmp_path) is not None


def test_a_signal_saves_the_state_and_ends_with_75(tmp_path: Path) -> None:
    phase = phase_of(10)
    expected = Training(tmp_path / "straight", phase)
    expected.launch()
    preempted = Training(tmp_path / "run", phase)

    def at_three(run: Run, progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted) as caught:
        preempted.launch(at_three)
    assert caught.value.exit_code == 75
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
    again = Training(tmp_path / "run", phase)
    again.launch()
    assert again.progress[0].step > 3
    assert equal(weights(again.model), weights(expected.model))


@pytest.mark.parametrize("first", [0, 3])
def test_a_stop_while_a_batch_is_made_saves_the_steps_before_it(tmp_path: Path, first: int) -> None:
    phase = phase_of(6)
    expected = Training(tmp_path / "straight", phase)
    expected.launch()
    stopped = Training(tmp_path / "run", phase)
    make = stopped.batches.next_batch

    def next_batch() -> int:
        if stopped.batches.position == first:
            signal.raise_signal(signal.SIGHUP)
            stop.poll()
        return make()

    stopped.batches.next_batch = next_batch  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="SIGHUP"):
        stopped.launch()
    state = newest_state(tmp_path / "run")
    assert (int(state.name.removeprefix("step-")) if state else 0) == first
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == first
    again = Training(tmp_path / "run", phase)
    again.launch()
    assert equal(weights(again.model), weights(expected.model))


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when states are saved, nor when status.json is renewed, nor how long --max-minutes is."""
    clock, seen = time.time(), []
    monkeypatch.setattr(time, "time", lambda: clock)
    training = Training(tmp_path, phase_of(20), max_minutes=60.0)

    def jumping(run: Run, progress: Progress) -> None:
        nonlocal clock
        clock += jump
        seen.append(newest_state(tmp_path))
        run.status(step=progress.step)

    assert training.launch(jumping).step == 20
    assert [state for state in seen if state] == seen[-1:]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_a_slow_disk_is_given_a_tenth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that takes ten minutes is not asked for every five; and what is promised still holds."""
    clock, saves, renewals = 0.0, [], []
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    original = os.fsync

    def slow(descriptor: int) -> None:
        nonlocal clock
        clock += 60.0
        original(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    training = Training(tmp_path, phase_of(400))
    steps = 0.0

    def on_progress(run: Run, progress: Progress) -> None:
        nonlocal clock, steps
        clock, steps = clock + 300.0, steps + 300.0
        saves.append(newest_state(tmp_path))
        renewals.append((tmp_path / "status.json").stat().st_ino)

    training.launch(on_progress)
    assert 3 < len(set(saves)) < 40
    assert 3 < len(set(renewals)) < 60
    assert steps > 0.75 * clock


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_in_a_state_leaves_the_state_before_it_and_the_run_goes_on(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = phase_of(6)
    expected = Training(tmp_path / "straight", phase)
    expected.launch()
    out = tmp_path / "run"
    Training(out, phase, max_steps=2).launch()
    flushed = 0
    original = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal flushed
        of_state = ".partial" in os.readlink(f"/proc/self/fd/{descriptor}")
        flushed += of_state
        if of_state and flushed == 2:
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        Training(out, phase).launch()
    monkeypatch.setattr(os, "fsync", original)
    assert caught.value.errno == number
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000002"]
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    again = Training(out, phase)
    again.launch()
    assert again.progress[0].step == 3
    assert equal(weights(again.model), weights(expected.model))


# where and in which numbers


def test_an_unknown_device_or_dtype_is_the_users_mistake() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device warp"):
        resolve_device("warp")
    with pytest.raises(UsageError, match="--dtype fp17: expected auto, fp32 or bf16"):
        resolve_dtype("fp17", torch.device("cpu"))
    assert resolve_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.fixture(autouse=True)
def _torch_alone() -> None:
    torch.manual_seed(0)
