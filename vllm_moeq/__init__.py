"""Serve Mixture-of-Experts checkpoints with one bit width per expert on stock vLLM.

Importing this package loads neither torch nor vLLM; :func:`register` is vLLM's entry point.
"""

__version__ = "0.1.0"


def register() -> None:
    """Register the quantization method ``moeq`` with vLLM.

    vLLM calls this function through the entry point group ``vllm.general_plugins``, at least once in every process.
    """
    from vllm_moeq.serving import register_method

    register_method()


__all__ = ["__version__", "register"]
