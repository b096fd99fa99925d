"""Learning rates, parameter groups and moving averages, by closed forms."""

import math

import pytest
import torch
from torch import nn

from stages.recipe import Phase
from stages.training.ema import EMA
from stages.training.optim import base_rate, build_optimizer, learning_rate


def phase(**keys: object) -> Phase:
    return Phase(**{"name": "p", "stage": "train-unified", "steps": 100, **keys})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("constant", 0, 0.1),
        ("constant", 9, 1.0),
        ("constant", 99, 1.0),
        ("cosine", 0, 0.1),
        ("cosine", 4, 0.5),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 99, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
        ("cosine", 100, 0.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 100, 0.0),
    ],
)
def test_the_learning_rate_warms_up_then_follows_its_schedule(schedule: str, step: int, factor: float) -> None:
    assert learning_rate(phase(warmup_steps=10, lr_schedule=schedule), step) == pytest.approx(factor, abs=1e-12)


def test_without_warmup_the_first_step_is_full() -> None:
    assert learning_rate(phase(lr_schedule="cosine"), 0) == 1.0


def test_a_parameter_takes_the_rate_of_the_longest_address_that_covers_it() -> None:
    table = phase(lr={"default": 1e-3, "backbones.lm": 1e-4, "backbones.lm.experts.image": 1e-5})
    assert base_rate(table, "ports.text.head.weight") == 1e-3
    assert base_rate(table, "backbones.lm.experts.text.layers.0.out.weight") == 1e-4
    assert base_rate(table, "backbones.lm.experts.image.layers.0.out.weight") == 1e-5
    assert base_rate(phase(lr=2e-4), "anything") == 2e-4


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    named = [
        ("a.weight", nn.Parameter(torch.ones(3, 2))),
        ("a.bias", nn.Parameter(torch.ones(3))),
        ("b.weight", nn.Parameter(torch.ones(2, 5))),
    ]
    optimizer = build_optimizer(phase(weight_decay=0.3, lr={"default": 1e-3, "b": 1e-4}, betas=(0.8, 0.9)), named)
    found = {(group["base_lr"], group["weight_decay"]): [len(group["params"]), group["betas"]] for group in optimizer.param_groups}
    assert found == {(1e-3, 0.3): [1, (0.8, 0.9)], (1e-3, 0.0): [1, (0.8, 0.9)], (1e-4, 0.3): [1, (0.8, 0.9)]}


def test_one_step_of_the_optimizer_is_adamw() -> None:
    """First step: weights shrink by lr · decay, then move by lr · sign(gradient)."""
    weight = nn.Parameter(torch.tensor([[2.0, -3.0]]))
    optimizer = build_optimizer(phase(lr=0.1, weight_decay=0.5), [("w", weight)])
    weight.grad = torch.tensor([[0.7, -0.2]])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.0 * 0.95 - 0.1, -3.0 * 0.95 + 0.1]]), atol=1e-6, rtol=1e-6)


# moving average


def test_the_average_of_a_constant_is_what_the_ramped_decays_leave_of_the_start() -> None:
    weight = nn.Parameter(torch.zeros(3))
    ema = EMA([("w", weight)], decay=0.6)
    with torch.no_grad():
        weight.fill_(1.0)
    left = 1.0
    for n in range(12):
        ema.update([("w", weight)])
        left *= min(0.6, (1 + n) / (10 + n))
        torch.testing.assert_close(ema.weights()["w"], torch.full((3,), 1 - left), atol=1e-6, rtol=1e-6)
    assert ema.updates == 12


def test_the_average_is_a_copy_in_float32() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA([("w", weight)], decay=0.9)
    with torch.no_grad():
        weight.fill_(5.0)
    assert ema.weights()["w"].dtype == torch.float32
    assert torch.equal(ema.weights()["w"], torch.ones(3))
