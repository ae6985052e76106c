"""The checkpoint contract: schema, bit packing, validation (docs/format.md).

It needs torch and safetensors, but neither vLLM nor a GPU.
"""

from vllm_moeq.format.errors import CheckpointError, ConfigError, MoeqError, UsageError
from vllm_moeq.format.files import parse_json, read_config_json, read_json
from vllm_moeq.format.headers import TensorInfo
from vllm_moeq.format.linears import JOINED, LINEAR_SUFFIXES, joined, linear_values, split_width
from vllm_moeq.format.packing import BIT_WIDTHS, CODES_PER_BLOCK, WHOLE_ROW, dequantize, pack, packed_words, unpack
from vllm_moeq.format.problems import first_problem
from vllm_moeq.format.rotation import (
    SIGNS,
    BlockRotation,
    Rotated,
    pack_signs,
    rotate,
    rotation_size,
    unpack_signs,
    unrotate,
)
from vllm_moeq.format.routing import drop_weak
from vllm_moeq.format.schema import (
    FORMAT_VERSIONS,
    QUANT_METHOD,
    Linear,
    MoeqConfig,
    PlanSummary,
    Projections,
    Rotation,
    parse_config,
    version_for,
)
from vllm_moeq.format.schemes import GRID, SCHEMES, TRELLIS_SCHEME, ExpertMatrix, Scheme, Span, TensorLayout
from vllm_moeq.format.schemes.grid import PACKED, SCALE, ZERO, check_values
from vllm_moeq.format.schemes.trellis import (
    CENTRE,
    MULTIPLIER,
    ROW_SCALE,
    STATE_BITS,
    TILE,
    TRELLIS,
    TRELLIS_WIDTHS,
    codes_of_states,
    pack_trellis,
    ring_states,
    trellis_codes,
    trellis_states,
)
from vllm_moeq.format.shards import ShardSet
from vllm_moeq.format.validation import (
    EXPERT_COUNT,
    NESTED,
    Summary,
    expert_matrices,
    load_config,
    open_shards,
    verify,
    verify_shards,
)

__all__ = [
    "BIT_WIDTHS",
    "CENTRE",
    "CODES_PER_BLOCK",
    "EXPERT_COUNT",
    "FORMAT_VERSIONS",
    "GRID",
    "JOINED",
    "LINEAR_SUFFIXES",
    "MULTIPLIER",
    "NESTED",
    "PACKED",
    "QUANT_METHOD",
    "ROW_SCALE",
    "SCALE",
    "SCHEMES",
    "SIGNS",
    "STATE_BITS",
    "TILE",
    "TRELLIS",
    "TRELLIS_SCHEME",
    "TRELLIS_WIDTHS",
    "WHOLE_ROW",
    "ZERO",
    "BlockRotation",
    "CheckpointError",
    "ConfigError",
    "ExpertMatrix",
    "Linear",
    "MoeqConfig",
    "MoeqError",
    "PlanSummary",
    "Projections",
    "Rotated",
    "Rotation",
    "Scheme",
    "ShardSet",
    "Span",
    "Summary",
    "TensorInfo",
    "TensorLayout",
    "UsageError",
    "check_values",
    "codes_of_states",
    "dequantize",
    "drop_weak",
    "expert_matrices",
    "first_problem",
    "joined",
    "linear_values",
    "load_config",
    "open_shards",
    "pack",
    "pack_signs",
    "pack_trellis",
    "packed_words",
    "parse_config",
    "parse_json",
    "read_config_json",
    "read_json",
    "ring_states",
    "rotate",
    "rotation_size",
    "split_width",
    "trellis_codes",
    "trellis_states",
    "unpack",
    "unpack_signs",
    "unrotate",
    "verify",
    "verify_shards",
    "version_for",
]
