"""The door with real stages behind it: data comes in, is looked at, is streamed, is not overwritten by mistake."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Invoke = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
SCENES = ("import", "scenes", "--level", "0", "--count", "7")


@pytest.fixture
def data(invoke: Invoke, tmp_path: Path) -> Path:
    assert invoke(*SCENES, "--out", tmp_path / "data", "--quiet").exit_code == 0
    return tmp_path / "data"


def tars(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_import_prints_the_folder_and_says_what_it_kept(invoke: Invoke, tmp_path: Path) -> None:
    answer = invoke(*SCENES, "--out", tmp_path / "data")
    assert (answer.exit_code, answer.stdout) == (0, f"{tmp_path / 'data'}\n")
    assert answer.stderr == "import: done, kept 135, skipped 0\n"  # 7, and at least 64 for val and for heldout
    assert list(tars(tmp_path / "data")) == ["heldout/data-000000.tar", "train/data-000000.tar", "val/data-000000.tar"]


def test_the_same_import_again_is_complete(invoke: Invoke, data: Path) -> None:
    before = tars(data)
    answer = invoke(*SCENES, "--out", data, "--json")
    assert json.loads(answer.stdout)["status"] == "done"
    assert answer.stderr == f"{data} is already complete; nothing to do\n"
    assert tars(data) == before


def test_another_import_is_refused_until_it_may_overwrite(invoke: Invoke, data: Path) -> None:
    before = tars(data)
    other = ("import", "scenes", "--level", "0", "--count", "9", "--out", data)
    answer = invoke(*other)
    assert answer.exit_code == 2
    assert answer.stderr.startswith(f"error: --out {data} holds another run:\n  count: there 7, here 9\nhint: ")
    assert tars(data) == before
    assert invoke(*other, "--overwrite").exit_code == 0
    assert tars(data) != before


def test_inspect_shows_shards_and_one_sample(invoke: Invoke, data: Path) -> None:
    answer = invoke("inspect", data / "train")
    assert answer.exit_code == 0
    assert answer.stdout.startswith(f"{data / 'train'}: 7 samples in 1 tars")
    key = json.loads(invoke("inspect", data / "train", "--json").stdout)["first"]["key"]
    assert invoke("inspect", data, "--key", key).stdout.startswith(f"sample '{key}' in ")
    assert invoke("inspect", data, "--key", "nobody").exit_code == 2


def test_verify_exits_with_3_and_names_the_tar_that_was_cut(invoke: Invoke, data: Path) -> None:
    answer = invoke("verify", data, "--json")
    assert answer.exit_code == 0
    told = json.loads(answer.stdout)
    assert (told["ok"], told["samples"], told["findings"]) == (True, 135, [])
    tar = data / "val" / "data-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])
    answer = invoke("verify", data)
    assert answer.exit_code == 3
    assert str(tar) in answer.stdout


def test_verify_and_inspect_read_a_stream(data: Path) -> None:
    tar = next((data / "val").glob("*.tar")).read_bytes()

    def through(command: str, stream: bytes) -> tuple[int, str]:
        answer = subprocess.run([sys.executable, "-m", "mmgen_cli", command, "-"], cwd=ROOT, capture_output=True, input=stream)
        return answer.returncode, answer.stdout.decode()

    assert through("verify", tar)[0] == 0
    assert through("inspect", tar)[1].startswith("-: 64 samples in 1 tars")
    code, told = through("verify", tar[:-3000])
    assert code == 3
    assert "[damaged]" in told
    code, told = through("verify", b"")
    assert (code, "standard input is empty" in told) == (3, True)


def test_import_streams_one_clean_tar() -> None:
    answer = subprocess.run([sys.executable, "-m", "mmgen_cli", *SCENES, "--out", "-"], cwd=ROOT, capture_output=True)
    assert answer.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(answer.stdout)) as tar:
        assert sum(name.endswith(".image.png") for name in tar.getnames()) == 7
    assert answer.stderr.decode() == "import: done, kept 7, skipped 0\n"


def test_a_foreign_folder_is_left_alone(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    answer = invoke(*SCENES, "--out", tmp_path, "--overwrite")
    assert answer.exit_code == 2
    assert "is not a run of mmgen: it holds thesis.tex" in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_recipes_prints_the_file_or_what_it_resolves_to(invoke: Invoke) -> None:
    path = next((ROOT / "stages" / "recipes").rglob("vqgan.toml"))
    assert invoke("recipes", "vqgan").stdout == path.read_text()
    resolved = invoke("recipes", "vqgan", "--size", "tiny").stdout
    assert 'size = "tiny"' in resolved
    assert "[sizes" not in resolved
    answer = invoke("recipes", "vqgn")
    assert (answer.exit_code, answer.stderr.splitlines()[1]) == (2, "hint: did you mean 'vqgan'? (`mmgen recipes` lists them)")
