"""Compare a checkpoint with what its architecture's class in transformers has: every tensor, none besides.

Building the class takes neither weights nor memory: its tensors are on torch's meta device.
"""

from vllm_moeq.completeness.classes import cannot_build, cannot_load, meta_model, no_class, parse_config, silence
from vllm_moeq.completeness.compare import check_tied, compare, refuse_bytes
from vllm_moeq.completeness.config_values import check_values
from vllm_moeq.completeness.expected import Expected, expected_tensors, saved
from vllm_moeq.completeness.sizes import MAX_INTEGER, check_top_k, positive_integer
from vllm_moeq.completeness.verify import verify_whole

__all__ = [
    "MAX_INTEGER",
    "Expected",
    "cannot_build",
    "cannot_load",
    "check_tied",
    "check_top_k",
    "check_values",
    "compare",
    "expected_tensors",
    "meta_model",
    "no_class",
    "parse_config",
    "positive_integer",
    "refuse_bytes",
    "saved",
    "silence",
    "verify_whole",
]
