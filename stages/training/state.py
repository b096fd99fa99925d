"""Training state: everything a resume needs to continue to the same bits, and nothing else ever reads.

state/step-00001000/ holds tensors and state.json, written under a temporary name and renamed: a folder with its final name is whole.
The newest two are kept. The tensors are written by torch's distributed checkpointing, each rank its own part, as safetensors (no pickle
anywhere), so that a run may go on with another number of ranks, or with its weights in other shards.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stages import ranks
from stages.documents import Document, Int, read_object
from stages.errors import DataError
from stages.files import make_scratch, remove_tree, replace_folder, write_atomic
from stages.training.ema import EMA

KEPT = 2


class Facts(Document):
    """What state.json says."""

    phase: Int = 0
    step: Int = 0
    total_step: Int = 0
    threads: Int | None = None
    dtype: str | None = None
    ranks: Int | None = None
    phase_name: str = ""
    ema_updates: Int = 0
    samples: Int = 0
    tokens: Int = 0
    position: Int = 0
    seconds: float = 0.0
    flops: float = 0.0


Optimizers = Mapping[str, torch.optim.Optimizer]


def newest_state(out: Path) -> Path | None:
    """The latest whole state folder of a run."""
    whole = [path for path in (out / "state").glob("step-*") if path.suffix == "" and (path / "state.json").is_file()]
    return max(whole, default=None)


def save_state(out: Path, modules: nn.Module, optimizers: Optimizers, ema: EMA | None, facts: Mapping[str, Any]) -> Path:
    """Write state/step-N for facts["total_step"] = N. Every rank calls it."""
    final = out / "state" / f"step-{facts['total_step']:08d}"
    partial = final.with_suffix(".partial")
    if ranks.rank() == 0:
        make_scratch(partial)
    ranks.wait()
    tensors = {f"model.{name}": value for name, value in modules.state_dict().items()}
    for name, optimizer in optimizers.items():
        for number, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{number}.{kind}": torch.as_tensor(value) for kind, value in values.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.average.items()}
    try:
        with _quietly(), _own_error():
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True), no_dist=ranks.size() == 1)
        if ranks.rank() == 0:
            write_atomic(partial / "state.json", json.dumps({**facts, "ema_updates": ema.updates if ema else 0}, indent=2) + "\n")
            replace_folder(partial, final)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # makes room on a full disk; the states before it stay
        raise
    if ranks.rank() == 0:
        for old in sorted(path for path in (out / "state").glob("step-*") if path.is_dir() and path != final)[: -(KEPT - 1) or None]:
            remove_tree(old)
    ranks.wait()
    return final


def read_facts(folder: Path) -> dict[str, Any]:
    """state.json: the counts of a run, and what its bits depend on. Raises DataError."""
    return read_object(folder / "state.json", Facts, hint=f"remove {folder}: the run goes on from the state before")


def load_state(folder: Path, modules: nn.Module, optimizers: Optimizers, ema: EMA | None) -> dict[str, Any]:
    """Put weights, moments and average back, in whatever shards they now are; returns the facts. Every rank calls it.

    Raises DataError for tensors that are damaged, missing, of another shape, or of other parameters than those that learn.
    """
    facts = read_facts(folder)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        entries = reader.read_metadata().state_dict_metadata
        there = {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    except Exception as error:
        raise DataError(
            f"{folder}: cannot be read as safetensors ({error})", hint="remove it: the run goes on from the state before"
        ) from None
    tensors = {f"model.{name}": value for name, value in modules.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.average.items()}
    moments: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in optimizers}
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for key in there:
            found = re.fullmatch(rf"optimizer\.{re.escape(name)}\.(\d{{1,9}})\.(\w+)", key)
            if found and int(found[1]) < len(parameters):  # others are unexpected
                value = torch.zeros(()) if found[2] == "step" else torch.zeros_like(parameters[int(found[1])])
                moments[name].setdefault(int(found[1]), {})[found[2]] = tensors[key] = value
    _check(folder, there, {name: tuple(value.shape) for name, value in tensors.items()})
    try:
        with _quietly(), _own_error():
            dcp.load(tensors, storage_reader=reader, no_dist=ranks.size() == 1)
    except Exception as error:
        raise DataError(f"{folder}: cannot be read ({error})", hint="remove it: the run goes on from the state before") from None
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments[name]})
    if ema is not None:
        ema.updates = facts.get("ema_updates", 0)
    return facts


def _check(folder: Path, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    reshaped = sorted(f"{name} {there[name]}, expected {here[name]}" for name in set(here) & set(there) if here[name] != there[name])
    if missing or unexpected or reshaped:
        named = ", ".join([*reshaped, *missing, *unexpected][:6])
        raise DataError(f"{folder}: {len(missing)} tensors missing, {len(unexpected)} unexpected, {len(reshaped)} reshaped: {named}")


@contextmanager
def _own_error() -> Iterator[None]:
    """What really went wrong on some rank, and not torch's account of it (which no `except Exception` would catch)."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class _quietly(warnings.catch_warnings):
    """torch remarks on every save without a process group, which is what one rank is."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", module="torch.distributed")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
