"""What happens between the projections, chosen while a kernel is compiled."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vllm_moeq.kernels.activations import FUNCTIONS, Activation

SILU = tl.constexpr(list(FUNCTIONS).index("silu"))
GELU_TANH = tl.constexpr(list(FUNCTIONS).index("gelu_tanh"))
TANH_FACTOR = tl.constexpr(2 * math.sqrt(2 / math.pi))

NONE = -1
"""The ``FUNCTION`` of a projection without an activation behind it: down."""


def constants_of(activation: Activation | None) -> dict[str, bool | int | float | None]:
    """Return an activation as the kernels' compile-time parameters; None is that of down."""
    if activation is None:
        return {"GATED": False, "FUNCTION": NONE, "ALPHA": 1.0, "LIMIT": None, "BETA": 0.0}
    limit = activation.limit if math.isfinite(activation.limit) else None
    return {
        "GATED": activation.gated, "FUNCTION": activation.number, "ALPHA": activation.alpha, "LIMIT": limit,
        "BETA": activation.beta,
    }  # fmt: skip


@triton.jit
def function_of(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """Return the function of the gate, or of up without a gate; what is no number stays one."""
    if FUNCTION == SILU:
        return x / (1 + tl.exp(-x if ALPHA == 1.0 else -ALPHA * x))
    elif FUNCTION == GELU_TANH:
        # x/2 · (1 + tanh y) is x / (1 + e^−2y).
        return x / (1 + tl.exp(-x * (TANH_FACTOR + TANH_FACTOR * 0.044715 * x * x)))
    else:
        return tl.where(x <= 0, 0.0, x * x)


@triton.jit
def gate_times_up(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr):
    """Return function(min(gate, LIMIT)) · (clamp(up, −LIMIT, LIMIT) + BETA)."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if BETA != 0:
        up += BETA
    return function_of(gate, FUNCTION, ALPHA) * up
