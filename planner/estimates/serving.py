"""Estimate the number of GPUs to serve a checkpoint, from weights and cache per rank of tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from planner.common.units import GIB
from planner.model.layout import Layout, MoeLayer
from planner.model.sizes import GRIDS, Sizes, Storage
from vllm_moeq.format import UsageError

MEMORY_SHARE = 0.9
"""Share of a GPU's memory that vLLM uses (``--gpu-memory-utilization``)."""

FIXED_BYTES = 2 * GIB
"""Bytes for CUDA, CUDA graphs and the activations of a prefill step. This is an assumption, not a measurement."""

INPUT_BLOCK, ROW_TILE = 256, 64
"""The fused kernel keeps a matrix in blocks of inputs and tiles of output neurons; zeros fill the last ones."""

RANKS = (1, 2, 4, 8, 16)
FIXED = ("linear_attention", "mamba", "conv", "recurrent", "gated_delta", "moe", "mlp", "sparse", "dense", "none")
"""Kinds of layers that keep nothing, or a state of fixed size, small beside a long context. Others cache each token."""

KINDS = ("layer_types", "layers_block_type")
"""Keys of config.json for the kind of each layer."""

PATTERN = "hybrid_override_pattern"
"""The same as a letter for each layer, an asterisk for attention."""

CACHE_BYTES = 2
"""Bytes of a cached value, bfloat16."""


@dataclass(frozen=True)
class Service:
    """The load to serve, and the GPUs to serve it on.

    Attributes:
        context: tokens per request, prompt and answer together.
        concurrency: number of requests at a time, each ``context`` tokens long.
        gpu_gib: memory of one GPU in GiB.
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
    """The resources for serving.

    Attributes:
        gpus: least number of GPUs (tensor parallelism) that fits; None if no number that was tried fits.
        weight_bytes: bytes of weights on each GPU.
        cache_bytes: bytes of cache on each GPU, for all requests at full length.
        gpu_bytes: bytes on each GPU: weights, cache and :data:`FIXED_BYTES`.
        context: see :class:`Service`.
        concurrency: see :class:`Service`.
        gpu_gib: see :class:`Service`.
        expert_parallel: whether each GPU has whole experts, because they cannot be cut for so many.
    """

    gpus: int | None
    weight_bytes: int
    cache_bytes: int
    gpu_bytes: int
    context: int
    concurrency: int
    gpu_gib: float
    expert_parallel: bool = False

    @property
    def flags(self) -> str:
        """The flags that make vLLM use so many GPUs."""
        if self.gpus is None or self.gpus == 1:
            return ""
        return f"--tensor-parallel-size {self.gpus}{' --enable-expert-parallel' if self.expert_parallel else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for ``--json``."""
        return asdict(self)


def serving_needs(
    config: Mapping[str, Any], layout: Layout, sizes: Sizes, service: Service, storage: Storage = GRIDS
) -> ServingNeeds:
    """Return the least number of GPUs that serve a checkpoint, and the bytes on each GPU.

    Args:
        config: contents of the source's config.json.
        layout: the source's layout.
        sizes: sizes of the quantized checkpoint.
        service: the load to serve.
        storage: how its experts are stored.
    """
    text = text_config(config)
    available = MEMORY_SHARE * service.gpu_gib * GIB
    found: ServingNeeds | None = None
    for ranks in RANKS:
        if int(text.get("num_attention_heads") or ranks) % ranks:
            break
        whole = not all(_can_be_cut(layer, storage, ranks) for layer in layout.layers)
        weights = _weights_per_rank(layout, sizes, ranks, whole)
        cache = service.concurrency * cache_per_request(text, layout, service.context, ranks)
        taken = weights + cache + FIXED_BYTES
        fits = taken <= available
        found = ServingNeeds(ranks if fits else None, weights, cache, taken, **vars(service), expert_parallel=whole)
        if fits:
            break
    assert found is not None  # one rank divides every number of heads
    return found


def weight_room(config: Mapping[str, Any], layout: Layout, service: Service) -> int:
    """Return the bytes that one GPU has for weights beside the cache; negative where the cache alone does not fit.

    Args:
        config: contents of the source's config.json.
        layout: the source's layout.
        service: the load to serve.
    """
    cache = service.concurrency * cache_per_request(text_config(config), layout, service.context)
    return int(MEMORY_SHARE * service.gpu_gib * GIB) - FIXED_BYTES - cache


def _can_be_cut(layer: MoeLayer, storage: Storage, ranks: int) -> bool:
    """Tell whether ranks can split the experts of a layer."""
    return layer.shapes[layer.projections.down][1] % (storage.slice_step(layer) * ranks) == 0 or ranks == 1


def _weights_per_rank(layout: Layout, sizes: Sizes, ranks: int, whole: bool) -> int:
    """Return the bytes of weights per rank.

    Ranks split experts, or have whole ones each; and they split linears and embeddings. Routers and norms are not split
    but small, so they count as split.
    """
    if whole:
        uneven = max(Fraction(-(-it.num_experts // ranks) * ranks, it.num_experts) for it in layout.layers)
        growth = growth_on_gpu(layout) * uneven
    else:
        growth = growth_on_gpu(layout, ranks)
    experts = math.ceil(sizes.expert_bytes * growth)
    return math.ceil((experts + sizes.linear_bytes + sizes.kept_bytes) / ranks)


def growth_on_gpu(layout: Layout, ranks: int = 1) -> Fraction:
    """Return the bytes of all experts on GPUs, with what fills blocks and tiles, over those in the checkpoint.

    Args:
        layout: the source's layout.
        ranks: number of ranks of tensor parallelism; each has a slice of the rows of gate and up, and of down's inputs.
    """
    plain = padded = 0
    for layer in layout.layers:
        for name, (rows, columns) in layer.shapes.items():
            plain += layer.num_experts * rows * columns
            if name == layer.projections.down:
                own = _filled(rows, ROW_TILE) * _filled(math.ceil(columns / ranks), INPUT_BLOCK)
            else:  # a tile has as many rows of gate as of up
                own = _filled(math.ceil(rows / ranks), ROW_TILE // 2) * _filled(columns, INPUT_BLOCK)
            padded += layer.num_experts * ranks * own
    return Fraction(padded, plain)


def _filled(count: int, unit: int) -> int:
    """Return the next multiple of a unit."""
    return -(-count // unit) * unit


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "num_hidden_layers" in inner else config


def cache_per_request(text: Mapping[str, Any], layout: Layout, context: int, ranks: int = 1) -> int:
    """Return the bytes of one request's keys and values on one rank.

    Args:
        text: the part of config.json that describes the language model.
        layout: the model's layout.
        context: tokens of the request.
        ranks: number of ranks of tensor parallelism.
    """
    layers = _attention_kinds(text, layout.num_layers)
    window = text.get("sliding_window")
    seen = {
        **dict.fromkeys(FIXED, 0),
        "sliding_attention": min(context, window) if isinstance(window, int) and window > 0 else context,
    }
    return CACHE_BYTES * _values_per_token(text, ranks) * sum(seen.get(kind, context) for kind in layers)


def _attention_kinds(text: Mapping[str, Any], count: int) -> list[str]:
    """Return the kind of each layer: config.json lists them, or says which have full attention."""
    numbers = range(count)
    listed = next((text[key] for key in KINDS if isinstance(text.get(key), list) and text[key]), None)
    interval, linear = text.get("full_attention_interval"), text.get("linear_attn_config")
    period, offset, pattern = (text.get(key) for key in ("attn_layer_period", "attn_layer_offset", PATTERN))
    full = set(numbers)
    if listed is not None:
        return [str(kind) for kind in listed]
    if isinstance(pattern, str):
        full = {number for number, letter in enumerate(pattern) if letter == "*"}
    elif isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), list):
        full = {number - 1 for number in linear["full_attn_layers"]}
    elif isinstance(interval, int) and interval > 0:
        full = {number for number in numbers if (number + 1) % interval == 0}
    elif isinstance(period, int) and period > 0 and isinstance(offset, int):
        full = {number for number in numbers if number % period == offset}
    return ["full_attention" if number in full else "none" for number in numbers]


def _values_per_token(text: Mapping[str, Any], ranks: int) -> int:
    """Return the number of values that a layer caches per token on each rank."""
    latent = text.get("kv_lora_rank")
    if isinstance(latent, int) and latent:  # MLA caches one latent for all heads, on every rank
        return latent + int(text.get("qk_rope_head_dim") or 0)
    heads = int(text.get("num_attention_heads") or 1)
    pairs = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or int(text.get("hidden_size") or 0) // heads)
    return 2 * max(1, math.ceil(pairs / ranks)) * size
