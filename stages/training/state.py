"""Training state: everything a resume needs to continue to the same bits, and nothing else ever reads.

state/step-00001000/ holds tensors (model.safetensors, optimizer.safetensors, ema.safetensors) and state.json, written under a
temporary name and renamed, so that a folder with its final name is whole. The newest two are kept. No pickle anywhere.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import DataError
from stages.files import replace_folder, write_atomic
from stages.training.checkpoint import load_strict, read_weights, save_weights
from stages.training.ema import EMA

KEPT = 2


def newest_state(out: Path) -> Path | None:
    """The latest whole state folder of a run."""
    whole = [path for path in (out / "state").glob("step-*") if path.suffix == "" and (path / "state.json").is_file()]
    return max(whole, default=None)


def save_state(out: Path, modules: nn.Module, optimizers: dict[str, torch.optim.Optimizer], ema: EMA | None, facts: dict[str, Any]) -> Path:
    """Write state/step-N for facts["total_step"] = N."""
    final = out / "state" / f"step-{facts['total_step']:08d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(partial / "model.safetensors", modules.state_dict())
    moments: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        for number, values in optimizer.state_dict()["state"].items():
            moments |= {f"{name}.{number}.{key}": torch.as_tensor(value) for key, value in values.items()}
    save_weights(partial / "optimizer.safetensors", moments)
    if ema is not None:
        save_weights(partial / "ema.safetensors", ema.average)
    write_atomic(partial / "state.json", json.dumps({**facts, "ema_updates": ema.updates if ema else 0}, indent=2) + "\n")
    replace_folder(partial, final)
    for old in sorted(path for path in (out / "state").glob("step-*") if path.is_dir() and path != final)[: -(KEPT - 1) or None]:
        shutil.rmtree(old)
    return final


def load_state(folder: Path, modules: nn.Module, optimizers: dict[str, torch.optim.Optimizer], ema: EMA | None) -> dict[str, Any]:
    """Put weights, moments and average back; returns the facts."""
    facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    load_strict(modules, read_weights(folder / "model.safetensors"), str(folder / "model.safetensors"))
    moments = read_weights(folder / "optimizer.safetensors")
    for name, optimizer in optimizers.items():
        table = optimizer.state_dict()
        table["state"] = {}
        for key, value in moments.items():
            owner, number, kind = key.split(".", 2)
            if owner == name:
                table["state"].setdefault(int(number), {})[kind] = value
        optimizer.load_state_dict(table)
    if ema is not None:
        average = read_weights(folder / "ema.safetensors")
        if set(average) != set(ema.average):
            raise DataError(f"{folder / 'ema.safetensors'}: averages of other parameters than the ones that learn")
        ema.average, ema.updates = average, facts["ema_updates"]
    return facts
