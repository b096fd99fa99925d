"""A learned codebook finds the clusters of the latents, and comes back from the dead. (What all quantizers promise: test_quantizers_contract.py)"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parts.quantizers import VQConfig
from stages.parts.quantizers.codebook import nearest_codes
from stages.parts.quantizers.vq import VQ

CONFIGS = {
    "gradient": VQConfig(codebook_size=11, codebook_dim=6, revive=0),
    "ema": VQConfig(codebook_size=11, codebook_dim=6, decay=0.9, revive=0),
    "ema-revive": VQConfig(codebook_size=11, codebook_dim=6, decay=0.9, revive=0.1),
    "l2": VQConfig(codebook_size=11, codebook_dim=4, l2_normalize=True, revive=0),
    "l2-ema": VQConfig(codebook_size=11, codebook_dim=4, l2_normalize=True, decay=0.9, revive=0),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(b: int = 2, d: int = 5, h: int = 3, w: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(b, d, h, w, generator=generator(seed))


def built(name: str, in_dim: int = 5) -> VQ:
    torch.manual_seed(1)
    return CONFIGS[name].build(in_dim)


def bare(**keys: object) -> VQ:
    """A quantizer whose projections are the identity, so that its codebook lives among the latents."""
    config = VQConfig(**{"revive": 0, **keys})  # type: ignore[arg-type]
    quantizer = config.build(config.codebook_dim)
    quantizer.project_in = quantizer.project_out = nn.Identity()  # type: ignore[assignment]
    return quantizer


@pytest.mark.parametrize("name", CONFIGS)
def test_quantizing_what_was_quantized_changes_nothing(name: str) -> None:
    quantizer = built(name).eval()
    codes = torch.arange(11).view(1, 1, 11)
    rows = quantizer.codes_to_use()
    assert torch.equal(nearest_codes(rows, rows).view(1, 1, 11), codes)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_pass_straight_through_and_leave_the_codebook_alone(name: str) -> None:
    quantizer = built(name)
    z = latents().requires_grad_()
    weight = torch.randn(2, 5, 3, 7, generator=generator(5))
    (quantizer.quantize(z, generator()).quantized * weight).sum().backward()
    out, into = quantizer.project_out.weight[:, :, 0, 0], quantizer.project_in.weight[:, :, 0, 0]
    straight = torch.einsum("bohw,od,di->bihw", weight, out, into)
    if CONFIGS[name].l2_normalize:  # the only nonlinear step on the way
        projected = quantizer.project_in(z.detach()).detach().requires_grad_()
        F.normalize(projected, dim=1).backward(torch.einsum("bohw,od->bdhw", weight, out))
        assert projected.grad is not None
        straight = torch.einsum("bdhw,di->bihw", projected.grad, into)
    torch.testing.assert_close(z.grad, straight.detach())
    assert quantizer.codebook.grad is None


def test_commitment_moves_only_the_latents_and_the_codebook_loss_only_the_codes() -> None:
    quantizer = bare(codebook_size=7, codebook_dim=4, commitment_weight=0.5)
    z = latents(d=4).requires_grad_()
    result = quantizer.quantize(z)
    chosen = F.embedding(result.codes, quantizer.codebook).permute(0, 3, 1, 2)
    torch.testing.assert_close(result.losses["commitment"], 0.5 * F.mse_loss(z, chosen.detach()))
    torch.testing.assert_close(result.losses["codebook"], F.mse_loss(chosen, z.detach()))
    result.losses["commitment"].backward(retain_graph=True)
    assert quantizer.codebook.grad is None
    torch.testing.assert_close(z.grad, (0.5 * 2 * (z - chosen) / z.numel()).detach())
    z.grad = None
    result.losses["codebook"].backward()
    assert z.grad is None
    assert quantizer.codebook.grad is not None


def test_the_nearest_code_is_the_nearest_code_in_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(101, 6, generator=generator(1)), torch.randn(37, 6, generator=generator(2))
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    assert torch.equal(nearest_codes(z, codebook), expected)
    monkeypatch.setattr("stages.parts.quantizers.codebook.BLOCK_NUMBERS", 37 * 10)  # eleven blocks, the last one short
    assert torch.equal(nearest_codes(z, codebook), expected)


def test_unit_vectors_have_the_same_nearest_code_by_angle_and_by_distance() -> None:
    quantizer = bare(codebook_size=19, codebook_dim=5, l2_normalize=True).eval()
    z = latents(d=5)
    rows = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, 5), dim=1)
    assert torch.equal(quantizer.quantize(z).codes.flatten(), (rows @ F.normalize(quantizer.codebook, dim=1).T).argmax(1))


def test_an_ema_codebook_converges_to_the_means_of_its_clusters() -> None:
    quantizer = bare(codebook_size=2, codebook_dim=3, decay=0.9)
    centres = torch.tensor([[4.0, 0.0, -2.0], [-3.0, 5.0, 1.0]])
    quantizer.codebook.copy_(centres * 0.3)
    for step in range(120):
        noise = 0.1 * torch.randn(40, 3, generator=generator(step))
        rows = centres.repeat_interleave(20, 0) + noise - noise.view(2, 20, 3).mean(1).repeat_interleave(20, 0)  # exact means
        quantizer.quantize(rows.T.reshape(1, 3, 5, 8), generator())
    torch.testing.assert_close(quantizer.codebook, centres, atol=1e-4, rtol=0)
    torch.testing.assert_close(quantizer.counts, torch.tensor([20.0, 20.0]), atol=1e-2, rtol=0)


def test_the_running_mean_follows_its_closed_form() -> None:
    quantizer = bare(codebook_size=2, codebook_dim=1, decay=0.75)
    quantizer.codebook.copy_(torch.tensor([[0.0], [100.0]]))
    for value in (1.0, 2.0, 4.0):
        quantizer.quantize(torch.full((1, 1, 1, 2), value))
    weights = torch.tensor([0.75**2, 0.75, 1.0])
    expected = (weights * torch.tensor([1.0, 2.0, 4.0])).sum() / weights.sum()
    torch.testing.assert_close(quantizer.codebook[0, 0], expected)
    assert float(quantizer.codebook[1, 0]) == 100.0  # a code that wins nothing stays where it is


def test_codebooks_do_not_learn_outside_training() -> None:
    quantizer = built("ema-revive").eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.quantize(latents())
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_codebook_does_not_learn_from_latents_that_are_not_finite() -> None:
    quantizer = built("ema-revive")
    z = latents()
    z[0, 0, 0, 0] = math.nan
    before = quantizer.codebook.clone()
    quantizer.quantize(z, generator())
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_dead_codes_come_back_to_life(decay: float) -> None:
    """All codes far from the data but one: without revival one code wins everything for ever."""
    centres = 10 * torch.randn(8, 3, generator=generator(3))
    rows = centres.repeat_interleave(6, 0) + 0.05 * torch.randn(48, 3, generator=generator(4))
    z = rows.T.reshape(1, 3, 6, 8)
    used = {}
    for revive in (0.0, 0.3):
        quantizer = bare(codebook_size=8, codebook_dim=3, decay=decay, revive=revive)
        with torch.no_grad():
            quantizer.codebook.fill_(1000.0)
            quantizer.codebook[0] = 0.0
        for step in range(150):
            codes = quantizer.quantize(z, generator(step)).codes
        used[revive] = len(codes.unique())
    assert used[0.0] == 1
    assert used[0.3] == 8


def test_the_first_batches_place_a_reviving_codebook_on_the_data() -> None:
    quantizer = bare(codebook_size=16, codebook_dim=3, decay=0.99, revive=0.05)
    z = 50 + latents(b=4, d=3)
    errors = [float(quantizer.quantize(z, generator(step)).losses["commitment"]) for step in range(3)]
    assert errors[1] < errors[0] / 1000


def test_learning_depends_on_nothing_but_the_generator() -> None:
    states = []
    for _ in range(2):
        quantizer = built("ema-revive")
        torch.rand(3)  # the global generator moves on in between
        for step in range(5):
            quantizer.quantize(latents(seed=step), generator(step))
        states.append(quantizer.state_dict())
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key


def test_reviving_without_a_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="generator"):
        built("ema-revive").quantize(latents())


def test_health_counts_what_was_won() -> None:
    """Two of four codes win everything, three times to one: the perplexity is that of (3/4, 1/4), two codes are dead."""
    quantizer = VQConfig(codebook_size=4, codebook_dim=2, revive=0).build(2)
    quantizer.counts.copy_(torch.tensor([30.0, 0.0, 10.0, 0.0]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert quantizer.health() == {"perplexity": pytest.approx(expected), "dead": 2.0}
