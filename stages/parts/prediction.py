"""What a denoiser predicts, and the algebra between the three choices.

Given noisy = alpha · clean + sigma · noise, a network may predict the noise, the clean data or the velocity. The velocity is the
derivative of noisy along the path (`NoiseLevel`): noise - clean on the line of rectified flow (arXiv:2209.03003), alpha · noise - sigma ·
clean on the circle of VP schedules ("v" of arXiv:2202.00512). Whatever the prediction is, `estimates` turns it into the pair (clean,
noise), which is all that a sampler needs. Tensors of a level must broadcast against the data.

At the ends of the path two conversions have no answer: predicted noise says nothing about clean data where alpha = 0, nor predicted clean
data about noise where sigma = 0. There the divisor is SMALLEST: the result is finite, and right for a perfect network.
"""

from typing import Literal

from torch import Tensor

from stages.parts.schedules import NoiseLevel

Prediction = Literal["noise", "velocity", "clean"]
SMALLEST = 1e-5  # below every alpha and sigma of the published tables, which therefore are untouched


def velocity(clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """noise - clean on the line, alpha · noise - sigma · clean on the circle."""
    return level.alpha_rate * clean + level.sigma_rate * noise


def velocity_to_clean(velocity: Tensor, noisy: Tensor, level: NoiseLevel) -> Tensor:
    """noisy - t · velocity on the line, alpha · noisy - sigma · velocity on the circle."""
    return level.sigma_rate * noisy - level.sigma * velocity


def velocity_to_noise(velocity: Tensor, noisy: Tensor, level: NoiseLevel) -> Tensor:
    """noisy + (1 - t) · velocity on the line, sigma · noisy + alpha · velocity on the circle."""
    return level.alpha * velocity - level.alpha_rate * noisy


def noise_to_clean(noise: Tensor, noisy: Tensor, level: NoiseLevel) -> Tensor:
    """(noisy - sigma · noise) / alpha."""
    return (noisy - level.sigma * noise) / level.alpha.clamp(min=SMALLEST)


def clean_to_noise(clean: Tensor, noisy: Tensor, level: NoiseLevel) -> Tensor:
    """(noisy - alpha · clean) / sigma."""
    return (noisy - level.alpha * clean) / level.sigma.clamp(min=SMALLEST)


def target(predict: Prediction, clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """What a network that predicts `predict` should have answered."""
    if predict == "noise":
        return noise
    if predict == "clean":
        return clean
    return velocity(clean, noise, level)


def estimates(predict: Prediction, prediction: Tensor, noisy: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(clean, noise) that a prediction stands for; alpha · clean + sigma · noise is `noisy` again."""
    if predict == "noise":
        return noise_to_clean(prediction, noisy, level), prediction
    if predict == "clean":
        return prediction, clean_to_noise(prediction, noisy, level)
    return velocity_to_clean(prediction, noisy, level), velocity_to_noise(prediction, noisy, level)
