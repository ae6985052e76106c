"""The vLLM adapter; its module ``seam`` is the only one that imports vLLM."""


def register_method() -> None:
    """Register the quantization method; safe to call again."""
    from vllm_moeq.format import QUANT_METHOD
    from vllm_moeq.serving.seam import QUANTIZATION_METHODS, register_quantization_config, warn_if_untested

    warn_if_untested()
    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    from vllm_moeq.serving.config import MoeqQuantizationConfig

    register_quantization_config(QUANT_METHOD)(MoeqQuantizationConfig)


__all__ = ["register_method"]
