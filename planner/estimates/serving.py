"""How many GPUs serve a checkpoint: weights, cache and what vLLM keeps free, per rank of tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from planner.common.units import GIB
from planner.model.layout import Layout
from planner.model.sizes import Sizes
from vllm_moeq.format import UsageError

MEMORY_SHARE = 0.9
"""Of a GPU's memory that vLLM uses (``--gpu-memory-utilization``)."""

FIXED_BYTES = 2 * GIB
"""For CUDA, its graphs and activations of a prefill step. An assumption: it was not measured."""

RANKS = (1, 2, 4, 8, 16)
CACHE_BYTES = 2
"""Of a cached value: bfloat16."""


@dataclass(frozen=True)
class Service:
    """What is to be served.

    Attributes:
        context: tokens of a request, prompt and answer.
        concurrency: requests at a time, each as long as that.
        gpu_gib: memory of one GPU.
    """

    context: int = 8192
    concurrency: int = 16
    gpu_gib: float = 80.0

    def __post_init__(self) -> None:
        for flag, value in (("context", self.context), ("concurrency", self.concurrency), ("gpu-gib", self.gpu_gib)):
            if not 0 < value < math.inf:
                raise UsageError(f"--{flag}: expected a positive number, found {value:g}")


@dataclass(frozen=True)
class ServingNeeds:
    """What serving takes.

    Attributes:
        gpus: least tensor parallelism that holds it; None where not even the largest of :data:`RANKS` does.
        weight_bytes: of each GPU.
        cache_bytes: of each GPU, for all requests at their full length.
        gpu_bytes: the two and what CUDA and activations take.
        context: see :class:`Service`; so is the rest.
        concurrency: requests.
        gpu_gib: memory of one GPU.
    """

    gpus: int | None
    weight_bytes: int
    cache_bytes: int
    gpu_bytes: int
    context: int
    concurrency: int
    gpu_gib: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for ``--json``."""
        return asdict(self)


def serving_needs(config: Mapping[str, Any], layout: Layout, sizes: Sizes, service: Service) -> ServingNeeds:
    """Return the least number of GPUs for a checkpoint, and what each of them holds.

    Args:
        config: config.json of the source.
        layout: of the source.
        sizes: of the quantized checkpoint.
        service: what is to be served.
    """
    text = text_config(config)
    available = MEMORY_SHARE * service.gpu_gib * GIB
    found: ServingNeeds | None = None
    for ranks in RANKS:
        if int(text.get("num_attention_heads") or ranks) % ranks:
            break
        weights = _weights_per_rank(sizes, ranks)
        cache = service.concurrency * _cache_per_request(text, layout, service.context, ranks)
        taken = weights + cache + FIXED_BYTES
        fits = taken <= available
        found = ServingNeeds(ranks if fits else None, weights, cache, taken, **vars(service))
        if fits:
            break
    assert found is not None  # one rank divides every number of heads
    return found


def _weights_per_rank(sizes: Sizes, ranks: int) -> int:
    """Experts, linears and embeddings are split; routers and norms, a small part of what is kept, count as if so."""
    return math.ceil(sizes.total_bytes / ranks)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "num_hidden_layers" in inner else config


def _cache_per_request(text: Mapping[str, Any], layout: Layout, context: int, ranks: int) -> int:
    """Return bytes of keys and values of one request on one rank."""
    kinds = text.get("layer_types")
    layers = kinds if isinstance(kinds, list) and kinds else ["full_attention"] * layout.num_layers
    window = text.get("sliding_window")
    seen = {
        "linear_attention": 0,  # a state of fixed size, small beside a long context
        "sliding_attention": min(context, window) if isinstance(window, int) and window > 0 else context,
    }
    return CACHE_BYTES * _values_per_token(text, ranks) * sum(seen.get(kind, context) for kind in layers)


def _values_per_token(text: Mapping[str, Any], ranks: int) -> int:
    """Return the values that a layer caches for a token on each rank."""
    latent = text.get("kv_lora_rank")
    if isinstance(latent, int) and latent:  # one latent for all heads (MLA), on every rank
        return latent + int(text.get("qk_rope_head_dim") or 0)
    heads = int(text.get("num_attention_heads") or 1)
    pairs = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or int(text.get("hidden_size") or 0) // heads)
    return 2 * max(1, math.ceil(pairs / ranks)) * size
