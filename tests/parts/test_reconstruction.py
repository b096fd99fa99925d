"""The reconstruction objective: what each term is worth, who learns from which loss, and the balance between them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import RecipeError
from stages.parts.autoencoders import Autoencoder, CNNConfig, KLCNNConfig
from stages.parts.config import parse_part
from stages.parts.losses import DISCRIMINATORS, LaplacianConfig, PatchConfig
from stages.parts.losses.discriminator import (
    LOSSES,
    LeCam,
    adaptive_weight,
    discriminator_cross_entropy,
    discriminator_hinge,
    generator_non_saturating,
)
from stages.parts.objectives.reconstruction import Reconstruct, ReconstructionConfig

PATCH = {"kind": "patch", "channels": 8, "layers": 2, "norm": "group"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(2, 3, height, width, generator=generator()) * 2 - 1


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    quantizer = {"kind": "vq", "revive": 0, "codebook_size": 11, "codebook_dim": 6}
    return CNNConfig(downsample=4, patch_size=2, channels=8, multipliers=(1, 2), latent_channels=5, quantizer=quantizer).build()


def objective(**keys: object) -> Reconstruct:
    torch.manual_seed(1)
    return ReconstructionConfig(port="image", **keys).build()  # type: ignore[arg-type]


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    model, loss = autoencoder(), objective(weight=3.0, terms={"l1": 0.5, "l2": 2.0, "perceptual": 0.25})
    found = loss(model, images(), 0, generator())
    result = model.reconstruct(images(), generator())
    own = sum(result.losses.values())
    expected = 0.5 * F.l1_loss(result.images, images()) + 2 * F.mse_loss(result.images, images())
    expected = expected + 0.25 * LaplacianConfig().build()(images(), result.images) + own
    torch.testing.assert_close(found.main, 3 * expected)
    assert found.discriminator is None
    assert set(found.parts) == {"l1", "l2", "perceptual", "commitment", "codebook"}


def test_kl_alone_is_weighted_by_the_terms() -> None:
    torch.manual_seed(0)
    model = KLCNNConfig(downsample=2, channels=8, multipliers=(1, 1)).build()
    small, large = (objective(terms={"l1": 1.0, "kl": weight})(model, images(), 0, generator()) for weight in (0.0, 10.0))
    torch.testing.assert_close(large.main - small.main, 10 * small.parts["kl"])


def test_the_discriminator_joins_at_its_start_step() -> None:
    loss = objective(terms={"l1": 1.0, "adversarial": 0.5}, discriminator={**PATCH, "start_step": 7})
    model = autoencoder()
    before, after = (loss(model, images(), step, generator()) for step in (6, 7))
    assert before.discriminator is None
    assert "adversarial" not in before.parts
    assert after.discriminator is not None
    torch.testing.assert_close(
        after.main - before.main, 0.5 * after.parts["adversarial_weight"] * after.parts["adversarial"], atol=1e-5, rtol=1e-4
    )


def test_neither_side_learns_from_the_other_sides_loss() -> None:
    loss, model = objective(terms={"l1": 1.0, "adversarial": 0.5}, discriminator=PATCH), autoencoder()
    found = loss(model, images(), 0, generator())
    found.main.backward()
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    assert found.discriminator is not None
    found.discriminator.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_the_adversarial_gradient_is_balanced_at_the_last_layer() -> None:
    """|w ∇adv| / |∇rec| = 1 - O(1e-4), whatever the scale of either."""
    layer = nn.Conv2d(3, 3, 3)
    picture = images()
    for scale in (1e-2, 1.0, 1e3):
        rebuilt = layer(picture)
        rec, adv = rebuilt.abs().mean(), scale * (rebuilt - 1).square().mean()
        weight = adaptive_weight(rec, adv, layer.weight)
        wanted, found = (torch.autograd.grad(part, layer.weight, retain_graph=True)[0].norm() for part in (rec, adv))
        torch.testing.assert_close(weight * found, wanted * found / (found + 1e-4))
        assert not weight.requires_grad
    rebuilt = layer(picture)
    assert float(adaptive_weight(1e9 * rebuilt.mean(), 1e-9 * rebuilt.sum(), layer.weight)) == 1e4


def test_without_balance_the_weight_is_one() -> None:
    loss = objective(terms={"l1": 1.0, "adversarial": 0.5}, discriminator={**PATCH, "adaptive": False})
    assert float(loss(autoencoder(), images(), 0, generator()).parts["adversarial_weight"]) == 1.0


def test_hinge_is_one_at_zero_logits_and_zero_beyond_the_margin() -> None:
    zero = torch.zeros(2, 1, 3, 5)
    assert float(discriminator_hinge(zero, zero)) == 1.0
    assert float(discriminator_hinge(zero + 1, zero - 1)) == 0.0
    assert float(discriminator_hinge(zero - 1, zero + 1)) == 2.0


def test_the_whole_objective_keeps_the_balance_at_the_last_layer() -> None:
    """The adversarial term's gradient there is `terms.adversarial` of that of the reconstruction, whatever the discriminator's scale."""
    terms, model = {"l1": 1.0, "perceptual": 0.5}, autoencoder()
    loss = objective(terms={**terms, "adversarial": 0.8}, discriminator=PATCH)
    with torch.no_grad():
        assert loss.discriminator is not None
        next(iter(loss.discriminator.children()))[-1].weight.mul_(100)  # type: ignore[index, union-attr, operator]
    both, alone = (learns(model, images(), 0, generator()).main for learns in (loss, objective(terms=terms)))
    (rebuilt,) = torch.autograd.grad(alone, model.last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(both - alone, model.last_layer)
    assert float(adversarial.norm() / rebuilt.norm()) == pytest.approx(0.8, rel=1e-2)


def test_the_game_is_worth_log_4_between_equals() -> None:
    """arXiv:1406.2661, theorem 1: the value is -log 4 where nothing can be told apart."""
    zero = torch.zeros(2, 1, 3, 5)
    assert float(discriminator_cross_entropy(zero, zero)) == pytest.approx(math.log(4))


def test_the_best_discriminator_of_two_gaussians_is_their_ratio() -> None:
    """arXiv:1406.2661, proposition 1: D = p / (p + q), whose logit for N(0, 1) against N(1, 1) is 1/2 - x."""
    levels = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    real = torch.special.ndtri(levels)
    fake = real + 1
    slope, bias, bend = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.0, 0.5, 0.0))
    loss = discriminator_cross_entropy(*(slope * x + bias + bend * x**2 for x in (real, fake)))
    gradients = torch.autograd.grad(loss, [slope, bias, bend])
    assert [float(gradient) for gradient in gradients] == pytest.approx([0, 0, 0], abs=1e-3)
    assert float(loss) < float(discriminator_cross_entropy(-0.8 * real + 0.4, -0.8 * fake + 0.4))
    assert float(loss) < math.log(4)


def test_the_non_saturating_loss_pulls_where_the_discriminator_is_sure() -> None:
    logits = torch.tensor([-20.0], requires_grad=True)
    (pull,) = torch.autograd.grad(generator_non_saturating(logits), logits)
    (saturated,) = torch.autograd.grad(-F.softplus(logits).mean(), logits)
    assert float(pull) == pytest.approx(-1)
    assert abs(float(saturated)) < 1e-8


def test_lecam_holds_each_side_to_the_running_mean_of_the_other() -> None:
    lecam = LeCam(decay=0.5)
    real, fake = torch.full((4, 1, 2, 3), 2.0), torch.full((4, 1, 2, 3), -1.0)
    assert float(lecam(real, fake)) == pytest.approx((2 + 0.5) ** 2 + (1 + 1) ** 2)  # the anchors are now 1 and -1/2
    assert lecam.state_dict()["anchors"].tolist() == [1.0, -0.5]
    lecam(real * math.nan, fake)
    assert float(lecam.eval()(real, fake)) == pytest.approx((2 + 0.5) ** 2 + (1 + 1) ** 2)
    assert lecam.anchors.tolist() == [1.0, -0.5]
    assert float(lecam(fake, real)) == pytest.approx(0.0)  # a discriminator that is wrong is not held back


@pytest.mark.parametrize("name", LOSSES)
def test_each_side_plays_the_game_of_the_recipe(name: str) -> None:
    keys = {**PATCH, "loss": name, "adaptive": False, "lecam": 0.25}
    loss, model = objective(terms={"l1": 1.0, "adversarial": 0.5}, discriminator=keys), autoencoder()
    found, rebuilt = loss(model, images(), 0, generator()), model.reconstruct(images(), generator()).images
    assert loss.discriminator is not None and found.discriminator is not None
    real, fake = loss.discriminator(images()), loss.discriminator(rebuilt)
    torch.testing.assert_close(found.parts["adversarial"], LOSSES[name].generator(fake))
    torch.testing.assert_close(found.parts["discriminator"], LOSSES[name].discriminator(real, fake))
    torch.testing.assert_close(found.discriminator, found.parts["discriminator"] + 0.25 * found.parts["lecam"])
    assert float(found.parts["lecam"]) > 0


def test_the_discriminator_learns_to_tell_noise_from_pictures() -> None:
    torch.manual_seed(0)
    discriminator = PatchConfig(channels=8, layers=2, norm="group").build()
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    real = torch.linspace(-1, 1, 24).expand(4, 3, 16, 24)
    for step in range(30):
        fake = torch.rand(4, 3, 16, 24, generator=generator(step)) * 2 - 1
        loss = discriminator_hinge(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2


def test_the_patch_discriminator_has_its_published_size_and_reach() -> None:
    """pix2pix, arXiv:1611.07004: 70 pixels with three layers, 2.77 M parameters."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in PatchConfig().build().parameters()) == 2_765_633
    torch.manual_seed(0)
    discriminator = PatchConfig(channels=8, norm="batch").build().eval()
    picture = torch.zeros(1, 3, 96, 112, requires_grad=True)
    logits = discriminator(picture)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert picture.grad is not None
    seen = picture.grad.abs().sum((0, 1)) > 0
    assert int(seen.any(1).sum()) == int(seen.any(0).sum()) == 70


def test_the_pyramid_is_a_distance() -> None:
    distance = LaplacianConfig().build()
    one, other = images(), images().flip(3)
    assert float(distance(one, one)) == 0.0
    torch.testing.assert_close(distance(one, other), distance(other, one))
    torch.testing.assert_close(distance(3 * one, 3 * other), 3 * distance(one, other))


def test_errors_of_two_scales_add_up_in_the_pyramid_where_l1_lets_one_hide_the_other() -> None:
    distance, flat = LaplacianConfig(levels=2).build(), torch.zeros(1, 3, 64, 80)
    fine, coarse = torch.ones_like(flat), torch.ones_like(flat)
    fine[..., ::2, 1::2] = fine[..., 1::2, ::2] = -1  # a checkerboard
    coarse[..., :40] = -1
    for error in (fine, coarse):
        assert float(distance(error, flat)) == pytest.approx(1.0, abs=0.1)
    assert float((fine + coarse).abs().mean()) == 1.0
    assert float(distance(fine + coarse, flat)) == pytest.approx(2.0, abs=0.2)


def test_the_laplacian_is_exact_on_an_impulse() -> None:
    """One level: mean |d - blur(d)| plus the mean of the halved blur, with the binomial filter [1 4 6 4 1] / 16 twice."""
    distance = LaplacianConfig(levels=1).build()
    impulse = torch.zeros(1, 3, 12, 16)
    impulse[:, :, 6, 8] = 1.0
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    centre = float(taps[2]) ** 2
    high = ((1 - centre) + (1 - centre)) / (12 * 16)  # the centre keeps 1 - c, its neighbours together lose 1 - c
    low = float(taps[::2].sum()) ** 2 / (6 * 8)  # even taps fall on the halved grid
    torch.testing.assert_close(distance(impulse, torch.zeros_like(impulse)), torch.tensor(high + low))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"terms": {"perceptual": 1.0}}, "l1 or l2"),
        ({"terms": {"l1": 1.0, "adversarial": 0.1}}, "no discriminator"),
        ({"terms": {"l1": 1.0, "adversarial": 0.1}, "discriminator": {"kind": "patch", "loss": "wasserstein"}}, "loss"),
        ({"terms": {"l3": 1.0}}, "l3"),
        ({"terms": {"l1": 1.0, "adversarial": 0.1}, "discriminator": {"kind": "path"}}, "no 'path'"),
        ({"perceptual": {"kind": "lpip"}}, "no 'lpip'"),
    ],
)
def test_impossible_configs_say_why(keys: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_part({"reconstruction": ReconstructionConfig}, {"kind": "reconstruction", "port": "image", **keys}, "objectives.x")


def test_every_discriminator_judges_pictures_that_are_not_square() -> None:
    for config in DISCRIMINATORS.values():
        logits = config().build()(images(40, 56))
        assert logits.shape[:2] == (2, 1)
        assert logits.shape[2] < logits.shape[3]
