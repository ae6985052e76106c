"""Checkpoints of this project in transformers: import this package, then call ``from_pretrained`` as always.

    import vllm_moeq.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

The import registers the quantization method ``moeq``. Transformers looks for methods in a dictionary of its own and at
no entry point, so nothing can do it for the user; without the import it warns of an unknown quantization type and
gives the experts random weights. Needs transformers, and not vLLM.
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
