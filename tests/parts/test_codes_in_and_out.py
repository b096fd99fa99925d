"""How codes enter and leave a network that has no words' table for them: a narrow table with an MLP, and a head of two layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

from stages.parts.connectors import EmbeddingMLPConfig
from stages.parts.heads import LinearHeadConfig, MLPHeadConfig


def test_codes_pass_a_narrow_table_and_the_layers_after_it() -> None:
    connector = EmbeddingMLPConfig(dim=3, depth=2).build(11, 7)
    connector.init_weights(Generator().manual_seed(0))
    ids = torch.tensor([4, 0, 4, 10])
    first, second = connector.aligner.layers
    vectors = F.embedding(ids, connector.table.weight)
    torch.testing.assert_close(connector(ids), second(F.gelu(first(vectors))))
    assert sum(p.numel() for p in connector.parameters()) == 11 * 3 + (3 * 7 + 7) + (7 * 7 + 7)
    assert float(connector.table.weight.detach().norm(dim=1).mean()) == pytest.approx(1.0, abs=0.3)  # as codes of unit length


def test_the_head_multiplies_only_the_columns_it_is_asked_for() -> None:
    head = MLPHeadConfig(width=5).build(7, 11)
    head.init_weights(Generator().manual_seed(0))
    torch.nn.init.normal_(head.outer.bias)  # type: ignore[arg-type]
    hidden = torch.randn(4, 7, generator=Generator().manual_seed(1))
    whole = head(hidden)
    torch.testing.assert_close(whole, F.linear(F.gelu(head.inner(hidden)), head.outer.weight, head.outer.bias))
    torch.testing.assert_close(head(hidden, 3, 8), whole[:, 3:8])
    assert MLPHeadConfig().build(7, 11).inner.out_features == 7


def test_a_head_cannot_be_tied_to_a_table_of_another_width() -> None:
    with pytest.raises(ValueError, match="of the network's width"):
        LinearHeadConfig(tied=True).build(7, 11, tied_to=EmbeddingMLPConfig(dim=3).build(11, 7))
