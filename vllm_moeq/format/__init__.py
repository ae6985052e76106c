"""The checkpoint contract: schema, bit packing, validation (docs/format.md).

Needs torch and safetensors; neither vLLM nor a GPU.
"""

from vllm_moeq.format.errors import CheckpointError, ConfigError, MoeqError, UsageError
from vllm_moeq.format.packing import BIT_WIDTHS, CODES_PER_BLOCK, dequantize, linear_values, pack, packed_words, unpack
from vllm_moeq.format.routing import drop_weak
from vllm_moeq.format.schema import (
    FORMAT_VERSION,
    QUANT_METHOD,
    WHOLE_ROW,
    Linear,
    MoeqConfig,
    PlanSummary,
    Projections,
    first_problem,
    parse_config,
)
from vllm_moeq.format.shards import ShardSet, TensorInfo, read_json
from vllm_moeq.format.validation import (
    PACKED,
    SCALE,
    ZERO,
    ExpertMatrix,
    Summary,
    expert_matrices,
    load_config,
    verify,
)

__all__ = [
    "BIT_WIDTHS",
    "CODES_PER_BLOCK",
    "FORMAT_VERSION",
    "PACKED",
    "QUANT_METHOD",
    "SCALE",
    "WHOLE_ROW",
    "ZERO",
    "CheckpointError",
    "ConfigError",
    "ExpertMatrix",
    "Linear",
    "MoeqConfig",
    "MoeqError",
    "PlanSummary",
    "Projections",
    "ShardSet",
    "Summary",
    "TensorInfo",
    "UsageError",
    "dequantize",
    "drop_weak",
    "expert_matrices",
    "first_problem",
    "linear_values",
    "load_config",
    "pack",
    "packed_words",
    "parse_config",
    "read_json",
    "unpack",
    "verify",
]
