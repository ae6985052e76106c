"""What the experts of transformers' class compute, and what that means for calibration and for serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_moeq.format import UsageError


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
    from vllm_moeq.hf.contract import has_default_gate, is_gated, require_computed, require_known, require_stored

    require_stored(prefix, module)
    biased = any(parameter.endswith("bias") for parameter, _ in module.named_parameters(recurse=False))
    try:
        words = f"{require_computed(prefix, module)}{', with biases' if biased else ''}"
        return Computed(words)
    except UsageError as error:
        reason = str(error).removeprefix(f"{prefix}: ")
    unloaded = _reason(prefix, module, require_known)
    act = getattr(module, "act_fn", None)
    name = getattr(act, "__name__", type(act).__name__)
    gated = is_gated(module)
    words = f"{name} with a gate" if gated else f"{name} without a gate"
    own = gated and not has_default_gate(module)
    return Computed("a gate of its own" if own else words, reason, reason, unloaded)


def _reason(prefix: str, module: torch.nn.Module, require: Callable[[str, torch.nn.Module], None]) -> str | None:
    """Return why a module is refused, without the place; None if it is not."""
    try:
        require(prefix, module)
    except UsageError as error:
        return str(error).removeprefix(f"{prefix}: ")
    return None
