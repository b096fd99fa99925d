"""The SLURM script of docs/distributed.md, run as it stands there, with stand-ins for srun and scontrol."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", TEXT, re.S)
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo node1; echo node2 ;;
  requeue) echo "$2" > requeued ;;
esac
"""
SRUN = """#!/bin/sh
echo "$@" > asked
if [ "$STATE" = signalled ]; then kill -TERM $PPID; trap "exit 143" TERM; while :; do /bin/sleep 0.05; done; fi
[ -z "$STATE" ] || printf '{"state": "%s"}' "$STATE" > runs/show-o/status.json
exit 1
"""


def submit(folder: Path, state: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script where srun leaves `state` in status.json (empty: it does not come so far; signalled: it is told to stop before it does)."""
    assert SCRIPT is not None
    tools = folder / "tools"
    tools.mkdir()
    for name, text in {
        "scontrol": SCONTROL,
        "srun": SRUN,
        "sleep": "#!/bin/sh\nexec /bin/sleep 0.05\n",
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (folder / "job.sh").write_text(SCRIPT[1])
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts)}
    paths = {"PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "job.sh"], cwd=folder, env=os.environ | slurm | paths | {"STATE": state}, capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize(
    ("state", "requeued", "code"),
    [
        ("preempted", True, 0),
        ("running", True, 0),
        ("done", False, 0),
        ("stopped", False, 0),
        ("failed", False, 1),
        ("", False, 1),
        ("signalled", True, 0),
    ],
)
def test_the_slurm_script_goes_on_when_it_should_and_only_then(tmp_path: Path, state: str, requeued: bool, code: int) -> None:
    (tmp_path / "runs" / "show-o").mkdir(parents=True)
    earlier = tmp_path / "runs" / "show-o" / "status.json"
    earlier.write_text('{"state": "preempted"}')  # what the launch before left
    os.utime(earlier, (1e9, 1e9))
    answer = submit(tmp_path, state)
    assert answer.returncode == code, answer.stderr
    assert (tmp_path / "requeued").exists() == requeued
    asked = (tmp_path / "asked").read_text()
    assert "--rdzv-endpoint node1:29500 --rdzv-id 4711 -m mmgen_cli train-unified" in asked
    assert "--nnodes 2" in asked


def test_the_slurm_script_gives_up_on_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    assert submit(tmp_path, "running", restarts=200).returncode == 1
    assert not (tmp_path / "requeued").exists()
