"""vLLM's view of a checkpoint's ``quantization_config``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_moeq.format import QUANT_METHOD, ConfigError, MoeqConfig, Scheme, Summary, UsageError, parse_config
from vllm_moeq.format.speculation import announced, is_speculative
from vllm_moeq.serving.checkpoint import Checkpoint
from vllm_moeq.serving.linear_widths import LinearWidths
from vllm_moeq.serving.metrics import publish
from vllm_moeq.serving.moe_method import MoeqMoEMethod
from vllm_moeq.serving.options import DRAFT, check_draft, check_options
from vllm_moeq.serving.seam import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    get_current_vllm_config,
    logger,
)

if TYPE_CHECKING:
    from vllm_moeq.serving.seam import WeightsMapper

OVERRIDE = "moeq_odp"


def parse_thresholds(value: Any, prefixes: Collection[str]) -> dict[str, float]:
    """Return the threshold of each layer that ``--hf-overrides '{"moeq_odp": …}'`` names.

    Args:
        value: the parsed JSON value: a number for all layers, or an object from prefixes to numbers.
        prefixes: the keys of the checkpoint's ``experts``.

    Raises:
        UsageError: the value is something else, a number is outside 0 … 1, or a prefix is not among ``prefixes``.
    """
    numbers = value if isinstance(value, dict) else dict.fromkeys(prefixes, value)
    for prefix, number in numbers.items():
        if prefix not in prefixes:
            raise UsageError(
                f"--hf-overrides: {OVERRIDE}: expected prefixes of quantization_config.experts "
                f"such as {next(iter(prefixes))}, found {prefix!r:.80}"
            )
        if type(number) not in (int, float) or not 0 <= number <= 1:
            raise UsageError(
                f"--hf-overrides: {OVERRIDE}: expected a number from 0 to 1, "
                f"or an object from experts prefixes to such numbers, found {value!r:.80}"
            )
    return {prefix: float(number) for prefix, number in numbers.items()}


ALL_TO_ALL = ("allgather_reducescatter", "naive")
"""The all-to-all backends that leave routing to vLLM's runner, as our kernels expect."""


def check_parallel(parallel: Any) -> None:
    """Refuse parallel layouts that the kernels do not support; the message names the flag.

    Args:
        parallel: vLLM's ``FusedMoEParallelConfig``.

    Raises:
        UsageError: tokens are exchanged by a backend outside :data:`ALL_TO_ALL`.
    """
    if parallel.dp_size > 1 and parallel.use_ep and parallel.all2all_backend not in ALL_TO_ALL:
        raise UsageError(f"--all2all-backend: expected {ALL_TO_ALL[0]}, found {parallel.all2all_backend}")


def find_layer(prefix: str, known: Collection[str]) -> str:
    """Return the checkpoint's name of the MoE layer that vLLM calls ``prefix``.

    In vLLM a layer's prefix may differ from its module's path: MiniMax-M2 calls ``layers.0.block_sparse_moe.experts``
    ``layers.0.mlp.experts``. So the name of the block is ignored; a decoder layer has only one block of experts.

    Raises:
        ConfigError: no layer matches, or several do.
    """
    if prefix in known:
        return prefix
    same = [name for name in known if _without_block(name) == _without_block(prefix)]
    if len(same) != 1:
        raise ConfigError(f"config.json: quantization_config.experts has no widths for {prefix}")
    return same[0]


def _without_block(prefix: str) -> tuple[str, str]:
    """Split ``model.layers.0.mlp.experts`` into ``model.layers.0`` and ``experts``, without the block's name."""
    parts = prefix.split(".")
    return ".".join(parts[:-2]), parts[-1]


class MoeqQuantizationConfig(QuantizationConfig):
    """Our kernels for experts, and for other linears vLLM's compressed-tensors kernels if they support them."""

    def __init__(self, config: MoeqConfig) -> None:
        super().__init__()
        self.moeq = config
        self.widths: dict[str, list[int]] = {prefix: list(bits) for prefix, bits in config.experts.items()}
        self.schemes: dict[str, list[Scheme]] = {
            prefix: [config.scheme(prefix, expert) for expert in range(len(bits))]
            for prefix, bits in config.experts.items()
        }
        self.odp: dict[str, float] = dict(config.odp or {})
        self._checkpoint: Checkpoint | None = None
        self._linears = LinearWidths(config)

    def __repr__(self) -> str:
        linear = ",".join(map(str, self.moeq.linear.choices))
        return f"MoeqQuantizationConfig(layers={len(self.widths)}, linear={linear} bits)"

    def get_name(self) -> str:
        """Return the name that ``--quantization`` takes."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the activation dtypes that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest supported CUDA capability, Ampere's."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the configuration is part of config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoeqQuantizationConfig:
        """Validate the dictionary; raise ConfigError for any violation of the format."""
        return cls(parse_config(config, "config.json"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Override nothing: vLLM asks every method before it reads a checkpoint, so a draft is refused here already.

        Raises:
            UsageError: the checkpoint is ours, and vLLM takes its layers for speculative decoding as a draft.
        """
        if hf_quant_cfg.get("quant_method") == QUANT_METHOD:
            check_draft(hf_config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the user's thresholds, and check the headers of a local checkpoint.

        vLLM calls this method before it builds the model. ``hf_config`` has the keys of ``--hf-overrides``, so vLLM's
        cache of compiled graphs depends on them too.

        Raises:
            MoeqError: the override is invalid, or the checkpoint is damaged.
        """
        if hasattr(hf_config, OVERRIDE):
            self.odp = parse_thresholds(getattr(hf_config, OVERRIDE), self.moeq.experts)
        self._log_odp()
        publish(self.moeq)
        self._checkpoint = Checkpoint(model_name, revision)
        if Path(model_name).is_dir():  # else it may have to be downloaded, and is checked before its first expert
            self._log_summary(self._checkpoint.check())

    @staticmethod
    def _log_summary(summary: Summary | None) -> None:
        if summary is None:
            return
        widths = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(summary.widths.items()))
        logger.info_once(
            "moeq: %d MoE layers, %d experts (%s), %.2f bits on average, %.2f GiB of experts",
            summary.layers,
            summary.experts,
            widths,
            summary.average_bits,
            summary.expert_bytes / 2**30,
        )
        if summary.only_experts is not None:
            logger.warning("moeq: only experts were checked for completeness: %s", summary.only_experts)

    def _loaded_from(self) -> Checkpoint | None:
        """Return the checkpoint that all layers are loaded from, or None if vLLM has not named it."""
        if self._checkpoint is not None and not Path(self._checkpoint.model).is_dir():
            self._checkpoint.cache = get_current_vllm_config().load_config.download_dir
        return self._checkpoint

    def _log_odp(self) -> None:
        active = [threshold for threshold in self.odp.values() if threshold > 0]
        if active:
            logger.info_once(
                "moeq: ODP in %d of %d MoE layers, thresholds %g to %g: "
                "experts with a smaller share of their token's largest routing weight are skipped",
                len(active),
                len(self.widths),
                min(active),
                max(active),
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename layers as the model class does."""
        self.widths = hf_to_vllm_mapper.apply_dict(self.widths)
        self.schemes = hf_to_vllm_mapper.apply_dict(self.schemes)
        self.odp = hf_to_vllm_mapper.apply_dict(self.odp)
        self._linears.rename(hf_to_vllm_mapper)

    @staticmethod
    def _is_kept(prefix: str) -> bool:
        """Tell whether vLLM drafts with a layer of experts that the checkpoint has in 16 bits."""
        model = get_current_vllm_config().speculative_config
        if model is None or model.draft_model_config is None:
            return False
        config = model.draft_model_config.hf_config
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        return is_speculative(f"{prefix}.", layers, announced(config.to_dict()))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of one layer; None leaves embeddings, attention and lm_head as they are."""
        prefix = prefix.removeprefix(DRAFT)
        if isinstance(layer, RoutedExperts):
            check_options(get_current_vllm_config())
            check_parallel(layer.moe_config.moe_parallel_config)
            if self._is_kept(prefix):
                return None
            known = find_layer(prefix, self.widths)
            threshold = self.odp.get(known, 0.0)
            widths, schemes = self.widths[known], self.schemes[known]
            return MoeqMoEMethod(layer.moe_config, self.moeq, known, widths, schemes, threshold, self._loaded_from())
        if isinstance(layer, LinearBase):
            dtype = get_current_vllm_config().model_config.dtype
            return self._linears.method(layer, prefix, self.packed_modules_mapping, dtype)
        return None
