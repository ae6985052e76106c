"""What vLLM's names of activations mean to our kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_moeq.format import UsageError
from vllm_moeq.kernels import SILU, Activation


@dataclass(frozen=True)
class Named:
    """One of vLLM's activations.

    Attributes:
        activation: what it computes where the model gives no numbers.
        limit: whether the model's ``swiglu_limit`` counts.
        factors: whether its ``swiglu_alpha`` and ``swiglu_beta`` count.
    """

    activation: Activation
    limit: bool = False
    factors: bool = False


ACTIVATIONS = {
    "silu": Named(SILU, limit=True),
    "gelu_tanh": Named(Activation("gelu_tanh")),
    "relu2": Named(Activation("relu2")),
    "swigluoai": Named(Activation(alpha=1.702, limit=7.0, beta=1.0)),
    "swigluoai_uninterleave": Named(SILU, limit=True, factors=True),
    "silu_no_mul": Named(Activation("silu", gated=False)),
    "gelu_tanh_no_mul": Named(Activation("gelu_tanh", gated=False)),
    "relu2_no_mul": Named(Activation("relu2", gated=False)),
}
"""vLLM's name → what it computes. Its GELU by the error function, SiTU and SwiGLU-step are computed by no kernel."""


def activation_of(config: Any, prefix: str) -> Activation:
    """Return what a layer's experts compute between their projections.

    Args:
        config: vLLM's ``FusedMoEConfig``.
        prefix: the layer's name, for the message.

    Raises:
        UsageError: the kernels do not compute it; the message names the layer and the argument.
    """
    name = getattr(config.activation, "value", config.activation)
    row = ACTIVATIONS.get(name)
    if row is None:
        raise UsageError(f"{prefix}: activation: expected one of {', '.join(ACTIVATIONS)}, found {name}")
    own = row.activation
    limit, alpha, beta = (_number(config, f"swiglu_{key}") for key in ("limit", "alpha", "beta"))
    ignored = {
        "swiglu_limit": not row.limit and limit not in (None, own.limit),
        "swiglu_alpha": not row.factors and alpha not in (None, own.alpha),
        "swiglu_beta": not row.factors and beta not in (None, own.beta),
    }
    for key, wrong in ignored.items():
        if wrong:
            raise UsageError(
                f"{prefix}: {key}: expected none, as {name} does not read it, found {_number(config, key)}"
            )
    return Activation(
        own.function,
        own.gated,
        own.alpha if not row.factors or alpha is None else alpha,
        own.limit if not row.limit or limit is None else limit,
        own.beta if not row.factors or beta is None else beta,
    )


def _number(config: Any, key: str) -> float | None:
    """Return a number of the config, or None; an older vLLM may not have it."""
    value = getattr(config, key, None)
    return None if value is None else float(value)
