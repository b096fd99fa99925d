"""Run folders: identity, resume, status, signals, and what --overwrite may delete."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from stages import run as run_module
from stages.data.stream import receive_stream, spool_folder
from stages.data.tar_format import END_OF_ARCHIVE, member_bytes
from stages.errors import DataError, GuardError, Preempted, UsageError
from stages.files import open_atomic, write_atomic
from stages.options import RunOptions
from stages.run import Run, run_identity

RECIPE = '[backbone]\nwidth = 12\ndepth = 2\n\n[[phases]]\nname = "joint"\nsteps = 7\n'


def open_run(out: Path | str, kind: Literal["shards", "checkpoint"] = "checkpoint", recipe: str = RECIPE, **settings: Any) -> Run:
    inputs = settings.pop("inputs", [{"path": "data", "fingerprint": "abc", "provenance": {"stage": "import"}}])
    identity = settings.pop("identity", {})
    options = RunOptions(command=("mmgen", "align", "data"), quiet=True, **settings)
    return Run(out, stage="align", options=options, kind=kind, resolved_recipe=recipe, inputs=inputs, identity=identity)


def status_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "status.json").read_text())


def make(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def wrote(path: Path, text: str = "x") -> None:
    """What a stage does: the file is whole, and on the list of the run."""
    write_atomic(path, text)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# what a run leaves


def test_run_json_says_how_the_result_was_made(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", seed=5):
        pass
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"] == ["mmgen", "align", "data"]
    assert (record["stage"], record["seed"], record["recipe"]) == ("align", 5, RECIPE)
    assert record["inputs"] == [{"path": "data", "fingerprint": "abc", "provenance": {"stage": "import"}}]
    assert record["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "numpy"} <= set(record["versions"])
    assert record["machine"]["cpus"] == os.cpu_count()
    assert record["started"] <= record["finished"]


def test_run_json_holds_no_path_the_user_did_not_type(tmp_path: Path) -> None:
    with open_run(tmp_path / "out"):
        pass
    text = (tmp_path / "out" / "run.json").read_text()
    assert str(tmp_path) not in text
    assert str(Path(__file__).parent) not in text


def test_git_commit_is_that_of_the_checkout_the_code_runs_from(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    with open_run(tmp_path / "out"):
        pass
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["git_commit"].removesuffix("-dirty") == head


def test_asking_git_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held by somebody else is in nobody's way, and none is left behind when a run is killed."""
    checkout = tmp_path / "checkout"
    (checkout / "stages").mkdir(parents=True)
    (checkout / "stages" / "run.py").write_text("here\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=checkout, check=True, capture_output=True)
    monkeypatch.setattr(run_module, "__file__", str(checkout / "stages" / "run.py"))
    watched = checkout / ".git" / "index"
    os.utime(checkout / "stages" / "run.py", (1, 1))  # a time that the index does not know: `git describe --dirty` would write it anew
    before = watched.read_bytes()
    clean = run_module._git_commit()
    assert watched.read_bytes() == before and clean is not None and len(clean) == 40
    (checkout / "stages" / "run.py").write_text("edited\n")
    assert run_module._git_commit() == f"{clean}-dirty"


def test_shard_runs_keep_their_files_out_of_the_open(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", kind="shards") as run:
        run.log(step=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".mmgen"]
    assert {path.name for path in (tmp_path / "out" / ".mmgen").iterdir()} == {"run.json", "status.json", "metrics.jsonl", "written.jsonl"}


def test_status_while_running_and_when_done(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        assert status_of(tmp_path) == {"state": "running", "exit_code": None, "stage": "align", "step": 0, "of": None, "message": ""}
        run.status(step=3, of=7, message="loss 2.1")
    done = {"state": "done", "exit_code": 0, "stage": "align", "step": 3, "of": 7, "message": ""}
    assert status_of(tmp_path) == done


@pytest.mark.parametrize(
    ("error", "state", "exit_code"),
    [
        (Preempted("later"), "preempted", 75),
        (KeyboardInterrupt(), "stopped", 130),
        (DataError("bad tar"), "failed", 3),
        (GuardError("loss is nan"), "failed", 4),
        (ZeroDivisionError("oops"), "failed", 1),
    ],
)
def test_an_exception_is_written_down_and_propagates(tmp_path: Path, error: BaseException, state: str, exit_code: int) -> None:
    with pytest.raises(type(error)), open_run(tmp_path):
        raise error
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["exit_code"]) == (state, exit_code)


def test_metrics_are_one_object_a_line_and_never_invalid_json(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log(step=1, loss=2.5)
        run.log(step=2, loss=float("nan"), rate=float("inf"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "rate": None}]


def test_cutting_metrics_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for step in (1, 2, 3, 4):
            run.log(step=step)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "lo')
        run.cut_metrics(2)
        run.log(step=3, again=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


# coming back


def test_a_fresh_folder_neither_resumes_nor_is_complete(tmp_path: Path) -> None:
    with open_run(tmp_path / "new" / "deep") as run:
        assert (run.resuming, run.complete) == (False, False)


@pytest.mark.parametrize("error", [Preempted("x"), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_unfinished_run_resumes(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), open_run(tmp_path):
        raise error
    with open_run(tmp_path) as run:
        assert (run.resuming, run.complete) == (True, False)


def test_a_run_stopped_early_exits_0_and_continues(tmp_path: Path) -> None:
    with open_run(tmp_path, max_steps=3) as run:
        run.status(step=3, of=7)
        run.finish("stopped", "after --max-steps 3")
    assert status_of(tmp_path) | {"message": ""} == {
        "state": "stopped",
        "exit_code": 0,
        "stage": "align",
        "step": 3,
        "of": 7,
        "message": "",
    }
    with open_run(tmp_path, max_steps=None, max_minutes=2.0) as run:  # where to stop is not identity
        assert run.resuming


def test_a_complete_run_says_so_and_is_left_alone(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.finish("done", "all of it")
    before = everything(tmp_path)
    with open_run(tmp_path) as run:
        assert (run.resuming, run.complete) == (False, True)
    assert everything(tmp_path) == before


def test_every_launch_is_remembered(tmp_path: Path) -> None:
    with pytest.raises(Preempted), open_run(tmp_path):
        raise Preempted("x")
    started = json.loads((tmp_path / "run.json").read_text())["started"]
    with open_run(tmp_path):
        pass
    record = json.loads((tmp_path / "run.json").read_text())
    assert [launch["state"] for launch in record["launches"]] == ["preempted", "done"]
    assert record["started"] == started


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 1}, "seed: there 0, here 1"),
        ({"limit": 9}, "limit: there None, here 9"),
        ({"recipe": RECIPE.replace("width = 12", "width = 16")}, "recipe.backbone.width: there 12, here 16"),
        ({"recipe": RECIPE.replace("steps = 7", "steps = 8")}, "recipe.phases.0.steps: there 7, here 8"),
        ({"recipe": RECIPE.replace("depth = 2\n", "")}, "recipe.backbone.depth: there 2, here (absent)"),
        ({"inputs": [{"path": "data", "fingerprint": "xyz"}]}, "input 1 (data): there abc, here xyz"),
        ({"identity": {"level": 2}}, "level: there (absent), here 2"),
    ],
)
def test_another_run_is_refused_naming_the_key_that_differs(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    with open_run(tmp_path, seed=0) as run:
        run.log(step=1)
    with pytest.raises(UsageError) as caught, open_run(tmp_path, **{"seed": 0, **change}):
        pass
    assert caught.value.message.splitlines()[1:] == ["  " + line]
    assert "--overwrite" in caught.value.hint


def test_where_the_same_data_lies_is_not_identity(tmp_path: Path) -> None:
    options = RunOptions()
    one = run_identity("align", options, "", [{"path": "here", "fingerprint": "abc"}], {})
    assert one == run_identity("align", options, "", [{"path": "there", "fingerprint": "abc"}], {})


def test_a_launch_that_failed_before_it_made_anything_is_no_run_to_protect(tmp_path: Path) -> None:
    mended = RECIPE.replace("width = 12", "width = 16")
    with pytest.raises(DataError), open_run(tmp_path):
        raise DataError("a mistake")
    with open_run(tmp_path, recipe=mended) as run:
        assert not run.resuming
    assert json.loads((tmp_path / "run.json").read_text())["recipe"] == mended


def test_nor_is_one_of_the_other_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError), open_run(tmp_path, kind="shards"):
        raise DataError("a mistake")
    with open_run(tmp_path, seed=9):
        pass
    assert sorted(everything(tmp_path)) == [".mmgen/written.jsonl", "run.json", "status.json"]


def test_a_failed_launch_that_left_something_is_protected(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(DataError), run:  # noqa: PT012
        make(tmp_path / "state" / "step-00000001" / "state.json")
        raise DataError("a mistake")
    with pytest.raises(UsageError, match="holds another run"), open_run(tmp_path, recipe=RECIPE.replace("width = 12", "width = 16")):
        pass
    assert (tmp_path / "state" / "step-00000001" / "state.json").exists()


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    make(tmp_path / "thesis.tex")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds thesis\.tex"), open_run(tmp_path, overwrite=overwrite):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a file"), open_run(make(tmp_path / "out")):
        pass


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(UsageError, match="another mmgen process"), open_run(tmp_path):
            pass
        run.log(step=1)
    with open_run(tmp_path) as run:  # and the lock is gone with the run
        assert run.complete


def test_a_forked_worker_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.__enter__()
    begun, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"1")  # the locks were closed before fork returned here
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(begun, 1) == b"1"
        run.__exit__(None, None, None)
        with open_run(tmp_path) as again:
            assert again.complete
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --overwrite


def test_overwrite_deletes_a_checkpoint_and_keeps_what_mmgen_did_not_write(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.log(step=1)
        for name in (
            "model.safetensors",
            "config.json",
            "recipe.toml",
            "README.md",
            "state/step-00000007/state.json",
            "tokenizers/t-1/config.json",
        ):
            wrote(tmp_path / name)
    for name in ("notes.txt", "plots/loss.svg"):
        make(tmp_path / name)
    with open_run(tmp_path, seed=1, overwrite=True) as run:
        assert (run.resuming, run.complete) == (False, False)
        run.begin()
        assert everything(tmp_path).keys() == {"notes.txt", "plots/loss.svg", "run.json", "status.json", ".mmgen/written.jsonl"}
        assert not (tmp_path / "state").exists() and not (tmp_path / "tokenizers").exists()


def test_overwrite_deletes_the_tars_of_every_split_and_nothing_else(tmp_path: Path) -> None:
    with open_run(tmp_path, kind="shards"):
        for split in ("train", "val"):
            wrote(tmp_path / split / "data-000000.tar")
            wrote(tmp_path / split / ".mmgen" / "shardindex.json", "{}")
        wrote(tmp_path / "README.md")
    make(tmp_path / "val" / "notes.txt")
    with open_run(tmp_path, kind="shards", seed=1, overwrite=True) as run:
        run.begin()
        assert everything(tmp_path).keys() == {"val/notes.txt", ".mmgen/run.json", ".mmgen/status.json", ".mmgen/written.jsonl"}
        assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(
    ("stage", "kind", "written"),
    [("eval", "checkpoint", ["results.json", "samples/a.tar", "controls/untrained/a.tar"]), ("sample", "shards", ["files/000-cat.png"])],
)
def test_overwrite_deletes_what_a_stage_writes_beside_shards_and_weights(
    tmp_path: Path, stage: str, kind: Literal["shards", "checkpoint"], written: list[str]
) -> None:
    for overwrite in (False, True):
        with Run(tmp_path, stage=stage, options=RunOptions(quiet=True, overwrite=overwrite), kind=kind) as run:
            run.begin()
            assert not any((tmp_path / name).exists() for name in written)
            for name in written:
                wrote(tmp_path / name)
            make(tmp_path / "keep/me.txt")
    assert (tmp_path / "keep" / "me.txt").exists()


def test_overwrite_refuses_when_a_strange_tar_would_join_the_data(tmp_path: Path) -> None:
    with open_run(tmp_path, kind="shards"):
        wrote(tmp_path / "data-000000.tar")
    make(tmp_path / "mine.tar")
    with pytest.raises(UsageError, match=r"mine\.tar"), open_run(tmp_path, kind="shards", overwrite=True):
        pass
    assert (tmp_path / "data-000000.tar").exists()


def test_overwrite_clears_the_tars_of_a_run_that_was_killed(tmp_path: Path) -> None:
    with pytest.raises(Preempted), open_run(tmp_path, kind="shards"):  # noqa: PT012
        wrote(tmp_path / "train" / "data-000000.tar")
        raise Preempted("x")
    with open_run(tmp_path, kind="shards", overwrite=True) as run:
        run.begin()
        assert not (tmp_path / "train").exists()


def test_overwrite_spares_what_was_just_read_from_stdin(tmp_path: Path) -> None:
    with open_run(tmp_path):
        wrote(tmp_path / "model.safetensors")
    receive_stream(io.BytesIO(member_bytes("a.txt", b"x") + END_OF_ARCHIVE), spool_folder(tmp_path))
    with open_run(tmp_path, overwrite=True, inputs=[{"path": "-", "fingerprint": "new"}]) as run:
        run.begin()
        assert (tmp_path / ".mmgen" / "input" / "stdin-000000.tar").exists()
        assert not (tmp_path / "model.safetensors").exists()


def test_a_file_half_written_when_the_run_was_killed_is_cleared_away(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with open_run(tmp_path, kind="shards"), open_atomic(tmp_path / "train" / "data-000003.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list((tmp_path / "train").iterdir())) == 1
    other = make(tmp_path / "mine" / ".data-000003.tar.4711.tmp")  # of somebody else, who may be writing it
    with open_run(tmp_path, kind="shards") as run:
        assert run.resuming
        assert list((tmp_path / "train").iterdir()) == []
        assert other.exists()


# signals and streams

LOOP = """
import sys, time
from stages import stop
from stages.options import RunOptions
from stages.run import Run

with stop.listening(), Run(sys.argv[1], stage="align", options=RunOptions(), kind="checkpoint") as run, stop.deferred():
    print("ready", flush=True)
    for step in range(10_000):
        time.sleep(0.005)
        run.status(step=step)
        if stop.asked() and sys.argv[2] == "polite":
            (run.out / "state.txt").write_text("saved")
            stop.now("the state is saved")
"""


def start_loop(out: Path, manners: str) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP), str(out), manners],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_sigterm_lets_the_loop_save_and_means_preempted(tmp_path: Path) -> None:
    process = start_loop(tmp_path, "polite")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert "Preempted" in errors
    assert (tmp_path / "state.txt").read_text() == "saved"
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["exit_code"]) == ("preempted", 75)


def test_the_first_ctrl_c_lets_the_loop_save(tmp_path: Path) -> None:
    process = start_loop(tmp_path, "polite")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "Ctrl-C again aborts at once" in errors
    assert (tmp_path / "state.txt").exists()
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["exit_code"]) == ("stopped", 130)


def test_the_second_ctrl_c_aborts_at_once(tmp_path: Path) -> None:
    process = start_loop(tmp_path, "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert not (tmp_path / "state.txt").exists()
    assert status_of(tmp_path)["exit_code"] == 130


def test_a_killed_run_says_running_and_resumes(tmp_path: Path) -> None:
    process = start_loop(tmp_path, "polite")
    process.kill()
    process.communicate(timeout=20)
    assert status_of(tmp_path)["state"] == "running"
    with Run(tmp_path, stage="align", options=RunOptions(quiet=True), kind="checkpoint") as run:
        assert run.resuming


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with open_run(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_streamed_run_leaves_nothing_behind() -> None:
    with open_run("-", kind="shards") as run:
        run.log(step=1)
        folder = run.out
        assert (run.meta / "metrics.jsonl").exists()
    assert not folder.exists()
    assert not Path("-").exists()


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with open_run(tmp_path) as run:
        run.log(step=1)
        run.status(step=1)
        run.cut_metrics(0)
    assert list(tmp_path.iterdir()) == []


RANK = """
import os, sys
import torch.distributed as dist
from stages.errors import UsageError
from stages.options import RunOptions
from stages.run import Run

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(os.environ["RANK"]), world_size=2)
rank = dist.get_rank()
for seed, settings in ((0, {}), (0, {}), (1, {}), (rank, {}), (0, {"max_steps": 5 + rank})):
    try:
        with Run(sys.argv[1], stage="align", options=RunOptions(seed=seed, **settings), kind="checkpoint") as run:
            print(run.resuming, run.complete)
            if not run.complete:
                run.log(step=1)
            dist.barrier()
    except UsageError as error:
        print(error.message.splitlines()[1].strip())
dist.destroy_process_group()
"""


def test_all_ranks_follow_the_verdict_of_rank_0(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", RANK, str(tmp_path / "out"), str(tmp_path / "meeting")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command, cwd=root, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    expected = ["False False", "False True", "seed: there 0, here 1", "seed: rank 0 0, rank 1 1", "--max-steps: rank 0 5, rank 1 6"]
    assert [out.splitlines() for out, _ in answers] == [expected] * 2
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "align: done" in answers[0][1]
    assert "align: done" not in answers[1][1]


LOST = """
import os, signal, sys, time
from mmgen_cli.door import Invocation, exit_code_of
from stages import ranks, stop
from stages.errors import DataError
from stages.options import RunOptions
from stages.run import Run

@ranks.joined(patience=ranks.FOREVER)
def work():
    with Run(sys.argv[1], stage="align", options=RunOptions(), kind="checkpoint") as run:
        if run.rank == 1:
            match sys.argv[2]:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "bad data":
                    raise DataError("a.tar: cut")
                case "waits":
                    time.sleep(60)
        if sys.argv[2] == "bad data":  # as torchrun does when a rank ends
            while not (run.meta / ".failure.1.tmp").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        print("waiting", flush=True)
        ranks.wait()

with stop.listening():
    os._exit(exit_code_of(work, Invocation(())))
"""


def two_ranks(out: Path, case: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", LOST, str(out), case]
    return [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("case", "codes", "state", "message"),
    [
        ("killed", [75, -signal.SIGKILL], "preempted", "another rank ended without a word"),
        ("bad data", [75, 3], "failed", "a.tar: cut"),
    ],
)
def test_a_rank_that_ends_is_told_apart_from_one_that_fails(tmp_path: Path, case: str, codes: list[int], state: str, message: str) -> None:
    ranks = two_ranks(tmp_path / "out", case)
    answers = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes, answers
    assert "Traceback" not in answers[0][1]
    status = status_of(tmp_path / "out")
    assert (status["state"], status["exit_code"]) == (state, {"preempted": 75, "failed": 3}[state])
    assert message in status["message"]
    with open_run(tmp_path / "out", inputs=[], recipe="") as run:  # the next launch starts with a clean slate
        assert run.resuming
    assert status_of(tmp_path / "out")["state"] == "done"
    assert not list((tmp_path / "out").glob(".failure*"))


@pytest.mark.slow
def test_a_rank_that_waits_for_another_hears_signals(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path / "out", "waits")
    assert ranks[0].stdout is not None
    assert ranks[0].stdout.readline() == "waiting\n"
    ranks[0].send_signal(signal.SIGTERM)
    ranks[0].communicate(timeout=20)
    ranks[1].kill()
    ranks[1].communicate(timeout=20)
    assert ranks[0].returncode == 75
    assert (status_of(tmp_path / "out")["state"], status_of(tmp_path / "out")["message"]) == ("preempted", "stopped by SIGTERM")


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: Not a directory"), open_run(make(tmp_path / "file") / "out"):
        pass


def test_progress_goes_to_stderr_and_quiet_means_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with Run(tmp_path / str(quiet), stage="align", options=RunOptions(quiet=quiet), kind="checkpoint") as run:
            run.finish("done", "kept 9, skipped 1")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "align: done, kept 9, skipped 1\n"


def test_a_stage_for_one_process_refuses_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="work of one process, and 3 ranks"), open_run(tmp_path):
        pass
