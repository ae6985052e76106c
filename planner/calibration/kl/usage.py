"""How much each expert will be used on other texts than the calibration text."""

from __future__ import annotations

import torch

UNSEEN = 0.5
"""Router weight added to every expert's use, in tokens: a text that does not show an expert does not prove that it is
never used."""

DRIFT = 0.35
"""Standard deviation, over texts, of the logarithm of an expert's use. Between two collections of Python sources it is
0.2 to 0.3; the texts that a model serves differ more."""


def use_elsewhere(weight: torch.Tensor) -> torch.Tensor:
    """Return each expert's expected use on another text, float64 [experts], with the same sum but for :data:`UNSEEN`.

    On another text rare experts are less rare, and common ones less common: what a text shows is the model's own
    preference and the text's, of which only the first lasts. So the logarithm of each use is moved towards the layer's
    mean, by the share of the text (:data:`DRIFT`) in the variance of these logarithms. Uses that differ by orders of
    magnitude hardly change; nearly even ones become even.

    Args:
        weight: Σ of the router's weights of each expert over the calibration text, float64 [experts].
    """
    seen = weight + UNSEEN
    logarithm = seen.log()
    variance = float(logarithm.var()) if len(seen) > 1 else 0.0
    lasting = max(0.0, 1.0 - DRIFT**2 / variance) if variance else 0.0
    use = (lasting * (logarithm - logarithm.max())).exp()
    return use / use.sum() * seen.sum()
