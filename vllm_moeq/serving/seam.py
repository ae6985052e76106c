"""Every name of vLLM that this package uses; when vLLM moves one, only this file has to change.

``tests/compat`` compares the use of these names with the sources of all tested versions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm import __version__ as version
from vllm.logger import init_logger

TESTED = ((0, 30), (0, 33))
"""The first and the last tested minor version."""

try:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.parameter import BasevLLMParameter, GroupQuantScaleParameter, PackedvLLMParameter
    from vllm.platforms import current_platform
except ImportError as error:
    low, high = (".".join(map(str, it)) for it in TESTED)
    raise ImportError(f"vllm-moeq is tested with vLLM {low} to {high}, found {version}: {error}") from error

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger("vllm.moeq")  # below "vllm": other names are not configured


def warn_if_untested(found: str = version) -> None:
    """Log one line if vLLM is older or newer than the tested versions; ignore builds without a release number."""
    parts = found.split(".")[:2]
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        return
    if not TESTED[0] <= (int(parts[0]), int(parts[1])) <= TESTED[1]:
        low, high = (".".join(map(str, it)) for it in TESTED)
        logger.warning_once("moeq: tested with vLLM %s to %s, found %s", low, high, found)


__all__ = [
    "QUANTIZATION_METHODS",
    "TESTED",
    "BasevLLMParameter",
    "CompressedTensorsConfig",
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "GroupQuantScaleParameter",
    "LinearBase",
    "PackedvLLMParameter",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "WeightsMapper",
    "current_platform",
    "get_current_vllm_config",
    "logger",
    "register_quantization_config",
    "version",
    "warn_if_untested",
]
