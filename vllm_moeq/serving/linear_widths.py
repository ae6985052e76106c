"""The width of each linear outside the experts, by the name that vLLM has for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_moeq.format import JOINED, ConfigError, MoeqConfig
from vllm_moeq.serving.linear_method import choose_method, unserved
from vllm_moeq.serving.seam import CompressedTensorsConfig, QuantizeMethodBase, UnquantizedLinearMethod

if TYPE_CHECKING:
    from vllm_moeq.serving.seam import WeightsMapper

MIXERS = {"mixer": "mamba"}
"""vLLM's name of a layer's block → the files' name, where its model classes give a prefix that no tensor has."""


def parts_of(prefix: str, packed_modules: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the checkpoint's names of the linears that vLLM joins in one.

    Args:
        prefix: vLLM's name of the linear.
        packed_modules: last part of a joined linear's name → last parts of its parts' names, as the model class has it.
            Where it says nothing, :data:`vllm_moeq.format.JOINED` does: some classes join linears without saying so.
    """
    for joined, parts in (*packed_modules.items(), *JOINED.items()):
        if prefix == joined or prefix.endswith(f".{joined}"):
            return tuple(prefix.removesuffix(joined) + part for part in parts)
    return (prefix,)


class LinearWidths:
    """The methods of the linears outside the experts: vLLM's compressed-tensors kernels, one configuration per width.

    Args:
        config: the checkpoint's configuration.
    """

    def __init__(self, config: MoeqConfig) -> None:
        self.linear = config.linear
        self._widths: dict[str, int] = dict.fromkeys(config.unquantized, 16) | config.linear.widths
        self._configs: dict[int, CompressedTensorsConfig] = {
            bits: CompressedTensorsConfig.from_config(config.linear.of_width(bits).compressed_tensors())
            for bits in config.linear.choices
            if bits != 16
        }

    def rename(self, mapper: WeightsMapper) -> None:
        """Rename linears as the model class does."""
        self._widths = mapper.apply_dict(self._widths)

    def bits_of(self, prefix: str, packed_modules: Mapping[str, Sequence[str]]) -> int:
        """Return the width of a linear, 16 if it is not packed.

        Args:
            prefix: vLLM's name of the linear.
            packed_modules: see :func:`parts_of`.

        Raises:
            ConfigError: vLLM joins linears that differ in width; the message names them.
        """
        names = (prefix,) if prefix in self._widths else parts_of(prefix, packed_modules)
        widths = {name: self._widths.get(self._known(name), self.linear.bits) for name in names}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name.rpartition('.')[2]} {bits}" for name, bits in widths.items())
            raise ConfigError(
                f"config.json: linear: {prefix}: expected one width, as vLLM joins its parts, found {found}"
            )
        return next(iter(widths.values()))

    def _known(self, name: str) -> str:
        """Return a linear's name in the checkpoint, if the config has it under that of another block."""
        parts = name.split(".")
        renamed = ".".join(parts[:-2] + [MIXERS.get(part, part) for part in parts[-2:-1]] + parts[-1:])
        return name if name in self._widths else renamed

    def method(
        self, layer: torch.nn.Module, prefix: str, packed_modules: Mapping[str, Sequence[str]], dtype: torch.dtype
    ) -> QuantizeMethodBase | None:
        """Return the method of a linear: vLLM's where it has a kernel, else ours.

        Args:
            layer: vLLM's layer.
            prefix: its name.
            packed_modules: see :func:`parts_of`; models fill it in after the config is made.
            dtype: the dtype of the activations.

        Raises:
            ConfigError: see :meth:`bits_of`.
        """
        bits = self.bits_of(prefix, packed_modules)
        if bits == 16:
            return UnquantizedLinearMethod()
        linear = self.linear.of_width(bits)
        reason = unserved(linear, dtype)
        if reason is None:
            return self._configs[bits].get_quant_method(layer, prefix)
        return choose_method(linear, prefix, reason)
