"""vLLM's options that cannot work with packed experts of different widths; refused before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from vllm_moeq.format import UsageError
from vllm_moeq.format.speculation import announced

DRAFT = "draft_model."
"""What vLLM puts before the layers of a draft model; the checkpoint's names do not have it."""

NO_SPECULATIVE_LAYERS = (
    "--speculative-config: expected a draft that is a model of its own, or ngram; found this checkpoint's layers for "
    "speculative decoding (mtp), which quantizing left out; `moeq quantize --mtp keep` keeps them"
)

EXPERTS = "experts"
"""The last part of the name that vLLM's models give a layer of experts."""

PROCESSED = frozenset({"ipc_cache", "modelexpress", "runai_streamer_sharded", "sharded_state", "tensorizer"})
"""The formats of loading that store what another kernel made of the weights, not the checkpoint's tensors."""


@dataclass(frozen=True)
class Option:
    """An option that is refused.

    Attributes:
        flag: the flag, for the message.
        path: the attribute of vLLM's config that it sets.
        wrong: whether a value of that attribute cannot work.
        reason: why, and what was expected.
    """

    flag: str
    path: str
    wrong: Callable[[Any], bool]
    reason: str


def _adapts_experts(lora: Any) -> bool:
    """Tell whether adapters may be for experts: vLLM prepares those of all layers that it is not told to leave out."""
    if lora is None:
        return False
    named = lora.target_modules
    return not named or any(EXPERTS in name.split(".") for name in named)


OPTIONS = (
    Option(
        "--enable-lora",
        "lora_config",
        _adapts_experts,
        "adapters cannot be added to packed experts; expected --lora-target-modules with linears alone, such as "
        "q_proj v_proj",
    ),
    Option(
        "--enable-eplb",
        "parallel_config.enable_eplb",
        bool,
        "experts of different widths cannot change places; expected it left out",
    ),
    Option(
        "--load-format",
        "load_config.load_format",
        PROCESSED.__contains__,
        "it stores weights as other kernels arrange them; expected auto",
    ),
    Option(
        "--cpu-offload-gb",
        "offload_config.uva.cpu_offload_gb",
        bool,
        "the kernels keep packed experts on the device; expected it left out",
    ),
    Option(
        "--offload-group-size",
        "offload_config.prefetch.offload_group_size",
        bool,
        "the kernels keep packed experts on the device; expected it left out",
    ),
    Option(
        "--weight-transfer-config",
        "weight_transfer_config",
        bool,
        "packed experts cannot be replaced while they are served; expected it left out",
    ),
)


def check_options(config: Any) -> None:
    """Refuse options that cannot work; the message names the flag.

    Args:
        config: vLLM's ``VllmConfig``. A version of vLLM that has no such option passes.

    Raises:
        UsageError: naming the flag.
    """
    for option in OPTIONS:
        value = reduce(lambda place, name: getattr(place, name, None), option.path.split("."), config)
        if option.wrong(value):
            raise UsageError(f"{option.flag}: {option.reason}")


def check_draft(hf_config: Any) -> None:
    """Refuse to draft with layers for speculative decoding, which a checkpoint of ours does not have.

    Args:
        hf_config: the model's configuration, in which vLLM sets ``n_predict`` where it makes a model of a checkpoint's
            layers for speculative decoding.

    Raises:
        UsageError: vLLM is about to.
    """
    if hasattr(hf_config, "n_predict") and not announced(hf_config.to_dict()):
        raise UsageError(NO_SPECULATIVE_LAYERS)
