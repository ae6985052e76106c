"""The checkpoint contract: schema, bit packing, validation (docs/format.md).

Needs torch and safetensors; neither vLLM nor a GPU.
"""

from vllm_moeq.format.errors import CheckpointError, ConfigError, MoeqError, UsageError
from vllm_moeq.format.files import parse_json, read_json
from vllm_moeq.format.headers import TensorInfo
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
from vllm_moeq.format.shards import ShardSet
from vllm_moeq.format.validation import (
    EXPERT_COUNT,
    NESTED,
    PACKED,
    SCALE,
    ZERO,
    ExpertMatrix,
    Summary,
    check_values,
    expert_matrices,
    load_config,
    verify,
)

__all__ = [
    "BIT_WIDTHS",
    "CODES_PER_BLOCK",
    "EXPERT_COUNT",
    "FORMAT_VERSION",
    "NESTED",
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
    "check_values",
    "dequantize",
    "drop_weak",
    "expert_matrices",
    "first_problem",
    "linear_values",
    "load_config",
    "pack",
    "packed_words",
    "parse_config",
    "parse_json",
    "read_json",
    "unpack",
    "verify",
]
