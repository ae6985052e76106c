"""The vLLM adapter: only this package imports vLLM."""


def register_method() -> None:
    """Register the quantization method; safe to call again."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from vllm_moeq.format import QUANT_METHOD

    if QUANT_METHOD in QUANTIZATION_METHODS:
        return
    from vllm_moeq.serving.config import MoeqQuantizationConfig

    register_quantization_config(QUANT_METHOD)(MoeqQuantizationConfig)


__all__ = ["register_method"]
