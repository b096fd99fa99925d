"""A stop from outside: which signals count, what waits for a state to be saved, and what the command line makes of it."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import stop
from stages.errors import Preempted

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_comes_at_once_and_is_no_exception_that_others_catch(number: signal.Signals) -> None:
    assert not issubclass(Preempted, Exception)
    with pytest.raises(Preempted, match=number.name) as caught, stop.listening():
        signal.raise_signal(number)
    assert caught.value.exit_code == 75


def test_deferred_a_stop_waits_until_it_is_polled_or_the_block_ends() -> None:
    done = []

    def work() -> None:
        with stop.deferred(), stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("noted")
            with pytest.raises(stop.Asked):
                stop.poll()
            done.append("saved")
        done.append("never")

    with pytest.raises(Preempted), stop.listening():
        work()
    assert done == ["noted", "saved"]


def test_the_first_signal_counts_and_a_second_ctrl_c_aborts() -> None:
    with stop.listening(), stop.deferred(then_stop=False):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert stop.asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.asked() is None  # nobody listens any more


def test_a_generator_that_defers_does_so_while_its_items_are_looked_at() -> None:
    @stop.deferred_throughout
    def numbers() -> Iterator[int]:
        yield from range(3)

    seen = []

    def work() -> None:
        for number in numbers():
            signal.raise_signal(signal.SIGTERM)
            seen.append(number)

    with pytest.raises(Preempted), stop.listening():
        work()
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_when_the_process_began_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop.listening():
            signal.raise_signal(number)
            assert stop.asked() is None
            with pytest.raises(Preempted):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_an_announcement_that_cannot_be_made_does_not_matter() -> None:
    def gone(text: str) -> None:
        raise OSError(5, "Input/output error")

    with stop.listening(gone), stop.deferred(then_stop=False):
        signal.raise_signal(signal.SIGHUP)
        assert stop.asked() == signal.SIGHUP


# the command line


def scenes(out: Path) -> list[str]:
    return [sys.executable, "-m", "mmgen_cli", "import", "scenes", "--level", "0", "--count", "1000000", "--out", str(out)]


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status_of(out: Path) -> dict[str, Any]:
    return json.loads((out / ".mmgen" / "status.json").read_text())


def test_a_terminal_that_is_closed_is_sighup(tmp_path: Path) -> None:
    """Then nothing more can be written to stderr, and that must not be what it ends with."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, scenes(tmp_path / "out"), ENVIRONMENT)
    wait_for((tmp_path / "out" / ".mmgen" / "status.json").exists)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    status = status_of(tmp_path / "out")
    assert (status["state"], status["exit_code"], status["message"]) == ("preempted", 75, "stopped by SIGHUP")


@pytest.mark.parametrize("stderr", ["closed", "broken"])
def test_without_a_stderr_a_signal_means_what_it_always_means(tmp_path: Path, stderr: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    close: Any = (lambda: os.close(2)) if stderr == "closed" else None
    process = subprocess.Popen(scenes(tmp_path / "out"), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=writing, preexec_fn=close)
    os.close(writing)
    wait_for((tmp_path / "out" / ".mmgen" / "status.json").exists)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, b"")
    assert (status_of(tmp_path / "out")["state"], status_of(tmp_path / "out")["message"]) == ("stopped", "stopped by SIGINT")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_the_imports_ends_with_the_right_code(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "mmgen_cli", "recipes", "show-o", "--draw", str(tmp_path / "x.svg")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def listens() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    wait_for(listens)
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.startswith(f"error: stopped by {number.name}\n")
    assert "Traceback" not in errors
