"""Training state: whole or absent, everything a resume needs, and nothing of another run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stages.errors import DataError
from stages.recipe import Phase
from stages.training.ema import EMA
from stages.training.optim import build_optimizer
from stages.training.state import load_state, newest_state, save_state

PHASE = Phase(name="p", stage="train-unified", steps=5, lr=0.1, weight_decay=0.1)


class Setup:
    """Two optimizers over one model, and an average; stepped a few times."""

    def __init__(self, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict({"main": nn.Linear(2, 3), "critic": nn.Linear(3, 1)})
        self.named = {name: list(part.named_parameters()) for name, part in self.model.items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {name: build_optimizer(PHASE, named) for name, named in self.named.items()}
        self.ema = EMA(self.named["main"], 0.9)
        for number in range(steps):
            self.step(number)

    def step(self, number: int) -> None:
        x = torch.full((4, 2), float(number))
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.model["critic"](self.model["main"](x)).square().sum().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.ema.update(self.named["main"])

    def save(self, out: Path, total_step: int) -> Path:
        return save_state(out, self.model, self.optimizers, self.ema, {"total_step": total_step})

    def numbers(self) -> dict[str, torch.Tensor]:
        """Weights, averages and moments by name."""
        values = {**self.model.state_dict(), **{f"average {name}": value for name, value in self.ema.average.items()}}
        for name, optimizer in self.optimizers.items():
            for number, moments in optimizer.state_dict()["state"].items():
                values |= {f"{name} {number} {kind}": torch.as_tensor(value) for kind, value in moments.items()}
        return values


def test_what_is_loaded_continues_to_the_same_bits(tmp_path: Path) -> None:
    straight = Setup(0, 3)
    folder = straight.save(tmp_path, 3)
    resumed = Setup(1, 1)
    facts = load_state(folder, resumed.model, resumed.optimizers, resumed.ema)
    assert facts["total_step"] == 3
    assert resumed.ema.updates == 3
    for number in (3, 4):
        straight.step(number)
        resumed.step(number)
    expected, found = straight.numbers(), resumed.numbers()
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_newest_two_states_are_kept(tmp_path: Path) -> None:
    setup = Setup(0, 1)
    for step in (1, 5, 20, 100):
        setup.save(tmp_path, step)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-00000020", "step-00000100"]
    newest = newest_state(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000100"


def test_half_written_states_are_not_states(tmp_path: Path) -> None:
    setup = Setup(0, 1)
    whole = setup.save(tmp_path, 4)
    partial = tmp_path / "state" / "step-00000009.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    (tmp_path / "state" / "step-00000012").mkdir()  # no state.json
    assert newest_state(tmp_path) == whole
    assert newest_state(tmp_path / "elsewhere") is None


def test_saving_again_replaces_the_state_of_that_step(tmp_path: Path) -> None:
    setup = Setup(0, 1)
    setup.save(tmp_path, 4)
    setup.step(7)
    folder = setup.save(tmp_path, 4)
    (file,) = folder.glob("*.safetensors")
    assert torch.equal(load_file(file)["model.main.weight"], setup.model["main"].weight)  # type: ignore[arg-type]


def test_a_state_holds_tensors_and_json_and_nothing_that_could_be_code(tmp_path: Path) -> None:
    folder = Setup(0, 1).save(tmp_path, 4)
    assert [path.name for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"] == ["state.json"]
    (file,) = folder.glob("*.safetensors")
    assert {name.split(".")[0] for name in load_file(file)} == {"model", "optimizer", "ema"}
    assert json.loads((folder / "state.json").read_text()) == {"total_step": 4, "ema_updates": 1}


def test_averages_of_other_parameters_are_refused(tmp_path: Path) -> None:
    setup = Setup(0, 1)
    folder = setup.save(tmp_path, 4)
    with pytest.raises(DataError, match=r"1 unexpected, 0 reshaped: ema\.bias"):
        load_state(folder, setup.model, setup.optimizers, EMA(setup.named["critic"][:1] + setup.named["main"][:1], 0.9))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = Setup(0, 1).save(tmp_path, 4)
    other = nn.ModuleDict({"main": nn.Linear(2, 4), "critic": nn.Linear(3, 1)})
    with pytest.raises(DataError, match=r"2 reshaped: model\.main\.bias \(3,\), expected \(4,\)"):
        load_state(folder, other, {}, None)
