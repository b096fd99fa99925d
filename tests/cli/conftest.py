"""A runner that goes through the real door, and stages that record how they were called."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mmgen_cli.app import app

Invoke = Callable[..., Result]


@dataclass
class Recorder:
    """A stage that is not run: keeps its arguments, then raises `error` or writes `status` as a run would."""

    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    error: BaseException | None = None
    prints: str = ""
    stream: bytes = b""

    def __call__(self, *arguments: Any, **keywords: Any) -> Path:
        self.arguments, self.keywords, self.calls = arguments, keywords, self.calls + 1
        if self.prints:
            print(self.prints)
        if self.error is not None:
            raise self.error
        out = next(value for value in reversed(arguments) if isinstance(value, Path))
        if str(out) == "-":
            sys.stdout.buffer.write(self.stream)
        else:
            out.mkdir(parents=True, exist_ok=True)
            status = {"state": "stopped", "exit_code": 0, "stage": "x", "step": 3, "of": 7, "message": "after --max-steps 3"}
            (out / "status.json").write_text(json.dumps(status))
        return out


STAGES = {  # module → function
    "stages.import_data": "import_data",
    "stages.pretrain_tokenizer": "pretrain_tokenizer",
    "stages.tokenize_shards": "tokenize_shards",
    "stages.align": "align",
    "stages.train_unified": "train_unified",
    "stages.sample": "sample",
    "stages.evaluate": "evaluate",
    "stages.report": "report",
}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Every stage replaced by a recorder, by the name of its function; recipes are stand-ins that remember how they were asked for."""
    recorders = {}
    for module, function in STAGES.items():
        fake = ModuleType(module)
        recorders[function] = Recorder()
        setattr(fake, function, recorders[function])
        monkeypatch.setitem(sys.modules, module, fake)
    recipe = ModuleType("stages.recipe")
    recipe.load_recipe = lambda name, **keywords: SimpleNamespace(name=name, **keywords)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stages.recipe", recipe)
    return recorders


@pytest.fixture
def invoke() -> Invoke:
    """`invoke("tokenize", "data", ...)` → what the command line answered."""

    def run(*arguments: str | Path, **settings: Any) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)

    return run
