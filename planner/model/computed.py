"""What the experts of transformers' class compute, and what that means for calibration and for serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_moeq.format import UsageError

SILU = "SiLU with a gate"


@dataclass(frozen=True)
class Computed:
    """What experts compute.

    Attributes:
        words: the computation, in a few words.
        uncalibrated: reason why they cannot run over a text here, or None.
        unserved: reason why our kernels cannot compute them in vLLM, or None.
        unloaded: reason why our modules in transformers cannot compute them, or None.
    """

    words: str
    uncalibrated: str | None = None
    unserved: str | None = None
    unloaded: str | None = None


def computed(prefix: str, module: torch.nn.Module) -> Computed:
    """Return what a module of experts computes.

    Args:
        prefix: where the experts are, for messages.
        module: transformers' module.

    Raises:
        UsageError: it stores more than matrices and biases, or says not how; the message names the attribute.
    """
    from vllm_moeq.hf.contract import has_default_gate, require_known, require_silu, require_stored

    require_stored(prefix, module, ungated=True)
    unserved = _reason(prefix, module, require_silu)
    if unserved is None:
        return Computed(SILU)
    unloaded = _reason(prefix, module, require_known)
    act = getattr(module, "act_fn", None)
    name = getattr(act, "__name__", type(act).__name__)
    biased = any(parameter.endswith("bias") for parameter, _ in module.named_parameters(recurse=False))
    plain = not getattr(module, "has_gate", True)
    words = "biases" if biased else f"{name} without a gate" if plain else f"{name} with a gate"
    own = not plain and not has_default_gate(module)
    return Computed("a gate of its own" if own else words, unserved, unserved, unloaded)


def _reason(prefix: str, module: torch.nn.Module, require: Callable[[str, torch.nn.Module], None]) -> str | None:
    """Return why a module is refused, without the place; None if it is not."""
    try:
        require(prefix, module)
    except UsageError as error:
        return str(error).removeprefix(f"{prefix}: ")
    return None
