"""The models of docs/models.md: what their publishers say of them. Their configs lie in ``configs/``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Listed:
    """One model.

    Attributes:
        name: name on the Hub.
        billions: published number of parameters, without layers for speculative decoding where a publisher counts both.
        same: other models of the same sizes.
    """

    name: str
    billions: float
    same: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """The name without its owner."""
        return self.name.partition("/")[2]


MODELS = (
    Listed("mistralai/Mixtral-8x7B-v0.1", 46.7, ("Mixtral-8x7B-Instruct-v0.1",)),
    Listed("mistralai/Mixtral-8x22B-v0.1", 141),
    Listed("Qwen/Qwen3-30B-A3B", 30.5, ("its 2507 versions", "Qwen3-Coder-30B-A3B")),
    Listed("Qwen/Qwen3-235B-A22B", 235, ("its 2507 versions",)),
    Listed("Qwen/Qwen3-Coder-480B-A35B-Instruct", 480),
    Listed("Qwen/Qwen3-Next-80B-A3B-Instruct", 80, ("its Thinking version",)),
    Listed("Qwen/Qwen2-57B-A14B", 57.4),
    Listed("Qwen/Qwen1.5-MoE-A2.7B", 14.3),
    Listed("deepseek-ai/DeepSeek-V3", 671, ("R1", "V3.1")),
    Listed("deepseek-ai/DeepSeek-V2", 236, ("V2.5", "Coder-V2")),
    Listed("deepseek-ai/DeepSeek-V2-Lite", 15.7, ("Coder-V2-Lite",)),
    Listed("zai-org/GLM-4.5", 355, ("GLM-4.6", "GLM-4.7")),
    Listed("zai-org/GLM-4.5-Air", 106),
    Listed("MiniMaxAI/MiniMax-M2", 230, ("M2.1", "M2.5")),
    Listed("meta-llama/Llama-4-Scout-17B-16E", 109, ("its Instruct version",)),
    Listed("meta-llama/Llama-4-Maverick-17B-128E", 400, ("its Instruct version",)),
    Listed("baidu/ERNIE-4.5-300B-A47B-PT", 300),
    Listed("baidu/ERNIE-4.5-21B-A3B-PT", 21.83),
    Listed("microsoft/Phi-3.5-MoE-instruct", 41.9),
    Listed("allenai/OLMoE-1B-7B-0924", 6.9, ("its Instruct version",)),
    Listed("ibm-granite/granite-3.1-3b-a800m-instruct", 3.3),
    Listed("openai/gpt-oss-120b", 117),
    Listed("openai/gpt-oss-20b", 21),
)
"""In the order of the page."""
