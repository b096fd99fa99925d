"""Commands hand what was typed to one stage, and print one result: the path, or an object with --json."""

import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from mmgen_cli import door
from stages.options import RunOptions

Invoke = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_training_gets_recipe_shards_out_and_every_option(invoke: Invoke, stages: dict[str, Any]) -> None:
    typed = """train-unified codes --recipe show-o --size tiny --set phases.joint.steps=9 --init backbones.lm=runs/lm --init ports.see=hf://a/b
        --tokenizer runs/vq --val held --out runs/x --seed 3 --device cpu --dtype fp32 --limit 40 --max-steps 8 --max-minutes 1.5
        --on-bad-sample fail --max-bad-fraction 0.2 --overwrite --quiet"""
    answer = invoke(*typed.split())
    assert (answer.exit_code, answer.stdout) == (0, "runs/x\n")
    recipe, shards, out, options = stages["train_unified"].arguments
    assert vars(recipe) == {"name": "show-o", "size": "tiny", "sets": ["phases.joint.steps=9"]}
    assert (shards, out) == ("codes", Path("runs/x"))
    assert options == RunOptions(
        seed=3,
        device="cpu",
        dtype="fp32",
        limit=40,
        max_steps=8,
        max_minutes=1.5,
        overwrite=True,
        on_bad_sample="fail",
        max_bad_fraction=0.2,
        quiet=True,
        recipe="show-o",
        command=("mmgen", *typed.split()),
    )
    assert stages["train_unified"].keywords == {
        "init": {"backbones.lm": "runs/lm", "ports.see": "hf://a/b"},
        "tokenizers": [Path("runs/vq")],
        "val": "held",
    }


@pytest.mark.parametrize(
    ("typed", "stage"),
    [
        ("pretrain-tokenizer data --recipe r --out o", "pretrain_tokenizer"),
        ("align data --recipe r --out o", "align"),
        ("train-unified data --recipe r --out o", "train_unified"),
        ("tokenize data --tokenizer t --out o", "tokenize_shards"),
        ("sample m data --out o", "sample"),
        ("eval data --out o", "evaluate"),
    ],
)
def test_what_is_not_typed_is_the_default_of_run_options(invoke: Invoke, stages: dict[str, Any], typed: str, stage: str) -> None:
    assert invoke(*typed.split()).exit_code == 0
    options = next(value for value in stages[stage].arguments if isinstance(value, RunOptions))
    assert options == RunOptions(command=("mmgen", *typed.split()), recipe="r" if "--recipe" in typed else None)


def test_tokenizers_keep_their_order(invoke: Invoke, stages: dict[str, Any]) -> None:
    invoke("tokenize", "data", "--tokenizer", "b", "--tokenizer", "a", "--check", "5", "--out", "o")
    assert stages["tokenize_shards"].arguments[:2] == ("data", [Path("b"), Path("a")])
    assert stages["tokenize_shards"].keywords == {"check": 5}


def test_sample_takes_one_prompt_or_shards(invoke: Invoke, stages: dict[str, Any]) -> None:
    Path("cat.png").write_bytes(b"")
    invoke(
        "sample", "m", "--prompt", "what is it?", "--image", "cat.png", "--task", "qa", "--num-samples", "2", "--save-files", "--out", "o"
    )
    assert stages["sample"].arguments[:3] == (Path("m"), None, Path("o"))
    expected = {
        "tasks": ["qa"],
        "sets": [],
        "prompt": "what is it?",
        "image": Path("cat.png"),
        "save_files": True,
        "num_samples": 2,
        "tools": None,
    }
    assert stages["sample"].keywords == expected
    invoke("sample", "m", "codes/val", "--set", "sample.steps=3", "--out", "o")
    assert stages["sample"].arguments[1] == "codes/val"
    assert stages["sample"].keywords["sets"] == ["sample.steps=3"]


def test_eval_takes_reference_and_field_map(invoke: Invoke, stages: dict[str, Any]) -> None:
    invoke("eval", "made", "truth", "--reference", "real", "--map", "sample.image=image", "--out", "o")
    assert stages["evaluate"].arguments[:3] == ("made", "truth", Path("o"))
    assert stages["evaluate"].keywords == {"reference": "real", "field_map": {"sample.image": "image"}}


def test_report_takes_any_number_of_folders(invoke: Invoke, stages: dict[str, Any]) -> None:
    Path("a").mkdir()
    Path("b").mkdir()
    invoke("report", "a", "b", "--out", "page.html")
    assert stages["report"].arguments == ([Path("a"), Path("b")], Path("page.html"))


def test_json_says_how_the_run_ended(invoke: Invoke, stages: dict[str, Any]) -> None:
    answer = invoke("tokenize", "data", "--tokenizer", "t", "--out", "o", "--json")
    assert json.loads(answer.stdout) == {
        "out": "o",
        "status": "stopped",
        "exit_code": 0,
        "stage": "x",
        "step": 3,
        "of": 7,
        "message": "after --max-steps 3",
    }


def test_a_finished_checkpoint_is_pushed(invoke: Invoke, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr("stages.hub.push", lambda folder, spec: pushed.append((folder, spec)) or "https://hub/me/x")
    answer = invoke("align", "data", "--recipe", "r", "--out", "o", "--push", "hf://me/x", "--json")
    assert pushed == [(Path("o"), "hf://me/x")]
    assert json.loads(answer.stdout)["pushed"] == "https://hub/me/x"


# streaming


def test_a_streamed_tar_is_alone_on_stdout(invoke: Invoke, stages: dict[str, Any]) -> None:
    stages["tokenize_shards"].prints = "a library says hello"
    stages["tokenize_shards"].stream = b"\x00tar\xff"
    answer = invoke("tokenize", "-", "--tokenizer", "t", "--out", "-", input=b"")
    assert (answer.exit_code, answer.stdout_bytes) == (0, b"\x00tar\xff")
    assert answer.stderr == "a library says hello\n"
    assert stages["tokenize_shards"].arguments[2] == Path("-")


def test_not_even_a_library_in_c_can_write_into_a_streamed_tar() -> None:
    code = """
        import os, sys
        from mmgen_cli.door import stdout_for
        with stdout_for("-", as_json=False):
            os.write(1, b"printf from C\\n")
            print("print from Python")
            sys.stdout.buffer.write(b"tar")
        print("afterwards")
    """
    answer = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == "tarafterwards\n"
    assert sorted(answer.stderr.splitlines()) == ["print from Python", "printf from C"]


def test_a_terminal_is_neither_fed_a_tar_nor_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(door.UsageError, match="would write a tar to this terminal"), door.stdout_for("-", as_json=False):
        pass
    with pytest.raises(door.UsageError, match="stdin is this terminal"):
        door.check_stdin("-")
    door.check_stdin("data")


def test_save_files_needs_a_folder(invoke: Invoke, stages: dict[str, Any]) -> None:
    answer = invoke("sample", "m", "data", "--save-files", "--out", "-")
    assert answer.exit_code == 2
    assert stages["sample"].calls == 0
