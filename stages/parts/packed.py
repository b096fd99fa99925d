"""Weights laid out once as the processor multiplies them, for networks that only answer.

oneDNN, which comes with torch, multiplies matrices in blocks. A weight that lies in memory block by block is read in one stream and is not
copied for each product: next to `F.linear`, 4 to 32 rows of a large weight that comes from memory take half to two thirds of the time, and
hundreds of rows nine tenths. One row, and weights so small that the call costs more than the product, are faster by `F.linear`. (Measured
on an AMD EPYC with AVX-512.) Values do not change, results do in their last bits. Gradients do not pass through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**17  # numbers in a weight worth packing
# torch keeps both names to itself (its compiler calls them): where one is gone, the plain product takes their place
AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
)


class Packed:
    """x (..., k) → x · weightᵀ + bias (..., n), for one weight (n, k). Anything but float32 on a CPU stays as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        single = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.able = single and weight.numel() >= SMALLEST and AVAILABLE
        self.blocks: Tensor | None = None  # made when first needed

    def __call__(self, x: Tensor) -> Tensor:
        if not self.able or x.numel() == x.shape[-1] or not x.numel():
            return F.linear(x, self.weight, self.bias)
        if self.blocks is None:
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.blocks, self.bias, "none", [], "")


def pack_linears(network: nn.Module) -> None:
    """From now on the linear layers of `network` multiply by packed copies of the weights they have now."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.forward = Packed(module.weight, module.bias)  # type: ignore[method-assign, assignment]
