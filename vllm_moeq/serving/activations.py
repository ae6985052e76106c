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


BACK_END = "vllm.model_executor.models.transformers."
"""Where vLLM has its layers for models of transformers."""

SILU_NAMES = ("silu", "swish")
"""What transformers calls it."""

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
NUMBER_KEYS = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
"""The keys of a config that say what experts compute, and with which numbers."""

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


def is_of_back_end(layer: Any) -> bool:
    """Tell whether a layer belongs to vLLM's back end for models of transformers."""
    return type(layer).__module__.startswith(BACK_END)


def check_back_end(activation: Activation, text_config: Any, prefix: str) -> None:
    """Refuse a layer of vLLM's transformers back end, which asks for SiLU whatever the model computes.

    Args:
        activation: what it asks for.
        text_config: the model's config in transformers, its language model's part.
        prefix: the layer's name, for the message.

    Raises:
        UsageError: the model's config has another function, or numbers; the message names the key.
    """
    for key in (*ACTIVATION_KEYS, *NUMBER_KEYS) if activation == SILU else ():
        found = getattr(text_config, key, None)
        if found is not None and (key in NUMBER_KEYS or found not in SILU_NAMES):
            expected = "none" if key in NUMBER_KEYS else " or ".join(SILU_NAMES)
            raise UsageError(
                f"{prefix}: {key}: expected {expected}, as vLLM's transformers back end computes SiLU for every model, "
                f"found {found!r:.80}"
            )


def _number(config: Any, key: str) -> float | None:
    """Return a number of the config, or None; an older vLLM may not have it."""
    value = getattr(config, key, None)
    return None if value is None else float(value)
