"""Minutes of SIGKILL, SIGTERM, SIGINT, SIGHUP and SIGSTOP at random moments, the same command again and again, and the bytes of a run nobody touched."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LAUNCHES = 60  # more than any soak needs
LONGEST = 60.0  # seconds from a signal to the end, on a machine that does other things
ENDS = {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


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


def soak(rng: random.Random, out: Path, *arguments: object, most_workers: int = 0) -> Counter[str]:
    """Start the command until it is done, each launch signalled at a random moment; how often each signal was sent, and each ending seen.

    A signal goes to the process or to its group. SIGSTOP lasts a second, for one process of the group; then another signal comes.
    """
    seen: Counter[str] = Counter()
    for _ in range(LAUNCHES):
        workers, before = rng.randint(0, most_workers), told(out)
        process = start(*arguments, out, *(["--workers", workers] if workers else []))
        sent = None
        while process.poll() is None and sent != signal.SIGKILL:
            try:
                process.communicate(timeout=rng.uniform(3.0, 14.0) if sent is None else LONGEST)
            except subprocess.TimeoutExpired:
                assert sent is None, f"{sent.name} and {LONGEST} seconds later it still runs"
                if rng.random() < 0.25:
                    stopped = rng.choice(group_of(process.pid))
                    os.kill(stopped, signal.SIGSTOP)
                    time.sleep(1.0)
                    with suppress(ProcessLookupError):
                        os.kill(stopped, signal.SIGCONT)
                    seen["SIGSTOP"] += 1
                    continue
                sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
                rng.choice([os.kill, os.killpg])(process.pid, sent)
                seen[sent.name] += 1
        _, errors = process.communicate()
        deadline = time.monotonic() + 5
        while group_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert group_of(process.pid) == [], "it left processes behind"
        if sent == signal.SIGKILL:
            continue
        assert b"Traceback" not in errors, errors.decode()
        if process.returncode == 0:
            seen["done"] += 1
            return seen
        assert sent is not None, errors.decode()
        assert process.returncode == ENDS[sent], errors.decode()
        if (status := told(out)) == before or status["state"] == "done":
            continue  # it had not begun, or had ended
        assert (status["exit_code"], sent.name in status["message"]) == (ENDS[sent], True)
    raise AssertionError(f"not done after {LAUNCHES} launches: {seen}")


def told(out: Path) -> dict[str, Any]:
    """What status.json says, and when it was written."""
    path = next((path for path in (out / "status.json", out / ".mmgen" / "status.json") if path.exists()), None)
    return {**json.loads(path.read_text()), "when": path.stat().st_mtime_ns} if path else {}


def group_of(leader: int) -> list[int]:
    """The living processes of a group, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


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
    seen = soak(rng, tmp_path / "soaked" / "tokens", *tokens)
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
    seen += soak(rng, tmp_path / "soaked" / "model", *train, most_workers=2)
    print(dict(seen))
    assert seen.total() - seen["done"] >= 2
    assert results(tmp_path / "soaked" / "model") == results(tmp_path / "straight" / "model")
    assert time.monotonic() - began > 60
