"""Two ranks with half a batch each learn what one learns from the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizers_ranks_program import CONFIGS, steps

PROGRAM = Path(__file__).parents[1] / "quantizers_ranks_program.py"


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[1])}
    started = [subprocess.Popen([sys.executable, PROGRAM, str(rank), "2", folder], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_learn_what_one_does(name: str, of_two_ranks: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    alone = steps(name, 0, 1)
    first, second = (found[name] for found in of_two_ranks)
    entropies, gradients = ([found.pop(key, None) for found in (alone, first, second)] for key in ("entropy", "gradient"))
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], expected, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    if name in ("lfq", "bsq"):  # the entropy of the mean is of all ranks' latents, that of each latent its own rank's
        torch.testing.assert_close(sum(entropies[1:]) / 2, entropies[0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(torch.cat(gradients[1:]), gradients[0], atol=1e-6, rtol=1e-4)
