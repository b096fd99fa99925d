"""What test_quantizers_ranks.py starts: each rank quantizes its share of a batch and leaves its buffers, losses and gradients behind.

python quantizers_ranks_program.py RANK RANKS FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from stages.parts.quantizers import BSQConfig, FSQConfig, IBQConfig, LFQConfig, MultiScaleConfig, QuantizerConfig, ResidualConfig, VQConfig

CODEBOOK = {"codebook_size": 11, "codebook_dim": 6}
CONFIGS: dict[str, QuantizerConfig] = {
    "vq": VQConfig(**CODEBOOK, decay=0.9, revive=0.3),
    "residual": ResidualConfig(**CODEBOOK, shared=False, decay=0.9, revive=0.3),
    "multi-scale": MultiScaleConfig(**CODEBOOK, sides=(1, 2, 3), decay=0.9, revive=0),
    "fsq": FSQConfig(levels=(4, 5, 3)),
    "lfq": LFQConfig(bits=5, temperature=0.5),
    "bsq": BSQConfig(bits=5, temperature=0.5),
    "ibq": IBQConfig(**CODEBOOK, temperature=0.5),
}


def steps(name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    quantizer = CONFIGS[name].build(5)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        z = torch.randn(4, 5, 3, 7, generator=generator)
        if step == 1 and name == "fsq":
            z[3] = torch.nan  # the last rank's; no rank may count this step
        z = z.chunk(ranks)[rank].clone().requires_grad_()
        result = quantizer.quantize(z, generator)
    found = dict(quantizer.state_dict())
    if "entropy" in result.losses:
        result.losses["entropy"].backward()
        assert z.grad is not None
        found |= {"entropy": result.losses["entropy"].detach(), "gradient": z.grad / ranks}  # training averages the ranks' gradients
    return found


if __name__ == "__main__":
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.save({name: steps(name, rank, ranks) for name in CONFIGS}, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()
