"""Who may attend to whom: one rule for every system.

Consecutive segments form attention blocks. A token sees its own block (all of it where the block is full, the past of it
where it is causal) and every earlier block that is not isolated; rows of a port that a row is hidden from never see it (Mogao's clean
latents, which text may not read). Causal language models, prefix language models, Show-o's
omni-attention, Transfusion's bidirectional image blocks, BAGEL's noisy copies and VAR's scales are all this rule with other
segments; tests/sequence/test_masks.py compares it entry by entry with those published masks.
"""

import torch
from torch import Tensor

from stages.sequence.segment import Layout


def may_attend(query: Layout, key: Layout) -> Tensor:
    """Bool (b, q, k): True where row q of `query` may look at row k of `key`.

    Padding sees itself only (a softmax over nothing is not a number), and nobody sees padding.
    """
    same_sample = (query.sample_id[:, :, None] == key.sample_id[:, None, :]) & (key.sample_id[:, None, :] >= 0)
    q_block, k_block = query.block_id[:, :, None], key.block_id[:, None, :]
    past = key.index[:, None, :] <= query.index[:, :, None]
    same_block = (q_block == k_block) & (query.full[:, :, None] | past)
    earlier = (k_block < q_block) & ~key.isolated[:, None, :]
    visible = same_sample & (same_block | earlier)
    if bool(key.hidden_from.any()):
        visible = visible & ((key.hidden_from[:, None, :] >> query.port_number[:, :, None]) & 1 == 0)
    blind = ~visible.any(dim=2, keepdim=True)  # padding rows
    itself = (query.index[:, :, None] == key.index[:, None, :]) & (query.sample_id[:, :, None] == key.sample_id[:, None, :])
    return visible | (blind & itself)


def is_causal(layout: Layout) -> bool:
    """True where `may_attend` is plain causal attention over one sample a row, for which SDPA has a faster path."""
    one_sample = bool((layout.sample_id == layout.sample_id[:, :1]).all()) and bool((layout.sample_id >= 0).all())
    return one_sample and not bool(layout.full.any() | layout.isolated.any() | layout.hidden_from.any())


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The float form (b, 1, q, k) that scaled_dot_product_attention adds to its scores; faster than a boolean on the CPU."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, float("-inf")).unsqueeze(1)
