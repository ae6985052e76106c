"""Load this project's checkpoints in transformers: import this package, then call ``from_pretrained`` as usual.

    import vllm_moeq.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

The import registers the quantization method ``moeq``. Transformers has no entry point for methods, so the user has to
import this package. Without the import, transformers stops: config.json names no weights for it, but this package. The
package needs transformers, but not vLLM.
"""

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from vllm_moeq.format import QUANT_METHOD
from vllm_moeq.hf.config import MoeqQuantizationConfig
from vllm_moeq.hf.experts import RoutedExperts
from vllm_moeq.hf.quantizer import MoeqHfQuantizer

if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(MoeqQuantizationConfig)
    register_quantizer(QUANT_METHOD)(MoeqHfQuantizer)

__all__ = ["MoeqHfQuantizer", "MoeqQuantizationConfig", "RoutedExperts"]
