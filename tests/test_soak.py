"""Minutes of kill -9 and SIGTERM at random moments, the same command again and again, and the bytes of a run nobody touched."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHES = 60  # more than any soak needs


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, "-m", "mmgen_cli", *map(str, arguments)],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def mmgen(*arguments: object) -> None:
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def soak(rng: random.Random, *arguments: object) -> dict[str, int]:
    """Start the command until it is done, ending each launch at a random moment; how often it was killed, preempted, done."""
    endings = {"killed": 0, "preempted": 0, "done": 0}
    for _ in range(LAUNCHES):
        process = start(*arguments)
        try:
            _, errors = process.communicate(timeout=rng.uniform(3.0, 14.0))
        except subprocess.TimeoutExpired:
            hard = rng.random() < 0.7
            os.killpg(process.pid, signal.SIGKILL if hard else signal.SIGTERM)
            _, errors = process.communicate()
            if hard:
                endings["killed"] += 1
                continue
        if process.returncode == 75:
            endings["preempted"] += 1
            continue
        assert process.returncode == 0, errors.decode()
        endings["done"] += 1
        return endings
    raise AssertionError(f"not done after {LAUNCHES} launches: {endings}")


def results(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in out.rglob("*") if path.suffix in (".tar", ".safetensors") and "state" not in path.parts
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_for_a_minute_and_more(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    began = time.monotonic()
    data, pixels, words = tmp_path / "data", tmp_path / "pixels", tmp_path / "words"
    mmgen("import", "scenes", "--level", 0, "--count", 3000, "--out", data)
    mmgen("pretrain-tokenizer", data, "--recipe", "vqgan", "--size", "tiny", "--max-steps", 40, "--out", pixels)
    mmgen("pretrain-tokenizer", data, "--recipe", "text-bpe", "--size", "tiny", "--out", words)
    tokens = ["tokenize", data, "--tokenizer", pixels, "--tokenizer", words, "--out"]
    mmgen(*tokens, tmp_path / "straight" / "tokens")
    soak(rng, *tokens, tmp_path / "soaked" / "tokens")
    assert results(tmp_path / "soaked" / "tokens") == results(tmp_path / "straight" / "tokens")
    train = [
        "train-unified",
        tmp_path / "straight" / "tokens",
        "--recipe",
        "show-o",
        "--size",
        "tiny",
        "--set",
        "phases.joint.steps=400",
        "--out",
    ]
    mmgen(*train, tmp_path / "straight" / "model")
    endings = soak(rng, *train, tmp_path / "soaked" / "model")
    assert endings["killed"] + endings["preempted"] >= 2
    assert results(tmp_path / "soaked" / "model") == results(tmp_path / "straight" / "model")
    assert time.monotonic() - began > 60
