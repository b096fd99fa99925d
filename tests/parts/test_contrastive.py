"""Contrastive losses: golden values at the start, symmetry, the limit of the scale, and what duplicates cost."""

import math

import pytest
import torch
from torch import Generator

from stages.parts.objectives.contrastive import ContrastiveConfig


def build(normalise="softmax", **keys):
    loss = ContrastiveConfig(between=("encoders.image", "encoders.text"), normalise=normalise, **keys).build().double()
    loss.init_weights(Generator())
    return loss


def embeddings(seed=0):
    return torch.randn(5, 7, generator=Generator().manual_seed(seed), dtype=torch.float64)


MATCHED = torch.eye(4, 6, dtype=torch.float64)
EQUAL = torch.ones(4, 6, dtype=torch.float64)
ORTHOGONAL = torch.zeros(4, 6, dtype=torch.float64).index_fill(1, torch.tensor([5]), 1.0), MATCHED


def test_golden_values_at_the_start():
    assert build()(MATCHED, MATCHED).item() == pytest.approx(1.8746e-6, rel=1e-4)
    assert build()(EQUAL, EQUAL).item() == pytest.approx(math.log(4), rel=1e-9)
    assert build("sigmoid")(MATCHED, MATCHED).item() == pytest.approx(0.693283, abs=1e-6)
    assert build("sigmoid")(*ORTHOGONAL).item() == pytest.approx(10 + 4 * math.log1p(math.exp(-10)), rel=1e-12)


def test_learned_values_start_where_the_papers_start_or_where_the_recipe_says():
    assert build().log_scale.item() == pytest.approx(2.65926, abs=1e-5)
    assert build().bias is None
    assert build("sigmoid").log_scale.item() == pytest.approx(math.log(10))
    assert build("sigmoid").bias.item() == -10
    assert build(temperature=0.5).log_scale.item() == pytest.approx(math.log(2))


def test_softmax_loss_is_two_cross_entropies_written_out():
    a, b, loss = embeddings(0), embeddings(1), build(temperature=0.3)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1) / 0.3
    rows = cosine.diagonal() - cosine.logsumexp(1)
    columns = cosine.diagonal() - cosine.logsumexp(0)
    torch.testing.assert_close(loss(a, b), -(rows.mean() + columns.mean()) / 2)


def test_sigmoid_loss_is_a_sum_over_pairs_written_out():
    a, b, loss = embeddings(0), embeddings(1), build("sigmoid")
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = 10 * torch.nn.functional.cosine_similarity(a[i], b[j], dim=0) - 10
            total -= torch.log(torch.sigmoid(logit if i == j else -logit)).item()
    assert loss(a, b).item() == pytest.approx(total / 5, rel=1e-9)


@pytest.mark.parametrize("normalise", ["softmax", "sigmoid"])
def test_the_loss_knows_neither_sides_nor_lengths_nor_order(normalise):
    a, b, loss = embeddings(0), embeddings(1), build(normalise)
    order = torch.tensor([3, 0, 4, 1, 2])
    for other in (loss(b, a), loss(4 * a, 0.1 * b), loss(a[order], b[order])):
        torch.testing.assert_close(other, loss(a, b))
    assert abs(loss(a, b[order]) - loss(a, b)) > 1e-3


@pytest.mark.parametrize("normalise", ["softmax", "sigmoid"])
def test_training_brings_partners_together(normalise):
    image = embeddings(0).requires_grad_()
    text, loss = embeddings(1), build(normalise)
    optimizer = torch.optim.Adam([image, *loss.parameters()], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss(image, text).backward()
        optimizer.step()
    assert torch.equal(loss.similarities(image, text).argmax(1), torch.arange(5))


def test_the_scale_stops_at_a_hundred_and_can_come_back():
    loss = build()
    torch.nn.init.constant_(loss.log_scale, 9.0)
    similarities = loss.similarities(MATCHED, MATCHED)
    torch.testing.assert_close(similarities, 100 * torch.eye(4, dtype=torch.float64))
    a, b = embeddings(0), embeddings(1)  # partners no closer than strangers: a smaller scale would be better
    loss(a, b).backward()
    assert loss.log_scale.grad.item() > 0


def test_a_caption_twice_in_a_batch_costs_its_rows_the_logarithm_of_two():
    twice = MATCHED[[0, 0, 1, 2]]
    assert build()(twice, twice).item() == pytest.approx(math.log(2) / 2, abs=1e-5)


def test_sides_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(4, 5\)"):
        build()(MATCHED, MATCHED[:, :5])
