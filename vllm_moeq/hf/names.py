"""Find a model's modules by names in the checkpoint, with transformers' own tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from vllm_moeq.format import UsageError


class Names:
    """Transformers' renamings for one model.

    Args:
        model: transformers' model, before its weights are loaded.
    """

    def __init__(self, model: Any) -> None:
        transforms = get_model_conversion_mapping(model)
        self._class = type(model).__name__
        self._base = model.base_model_prefix
        self._modules = {name for name, _ in model.named_modules()}
        self._renamings = [it for it in transforms if isinstance(it, WeightRenaming)]
        self._converters = [it for it in transforms if isinstance(it, WeightConverter)]

    def module(self, prefix: str) -> str:
        """Return the path of the module whose tensors have this prefix in the checkpoint.

        Raises:
            UsageError: the model has no such module.
        """
        renamed: str = rename_source_key(f"{prefix}.", self._renamings, [])[0].rstrip(".")
        # A checkpoint may be loaded into a model with a head or without.
        for name in (renamed, renamed.removeprefix(f"{self._base}."), f"{self._base}.{renamed}", prefix):
            if name in self._modules:
                return name
        raise UsageError(f"{prefix}: transformers' {self._class} has no module for these experts, looked for {renamed}")

    def require_whole(self, weights: Iterable[str]) -> None:
        """Refuse packed linears that transformers would split or join while it loads.

        Args:
            weights: the names that the linears' weights would have in the checkpoint if they were not packed.

        Raises:
            UsageError: there is such a linear; the message names the first.
        """
        for weight in weights:
            if rename_source_key(weight, self._renamings, self._converters)[1] is not None:
                raise UsageError(
                    f"{weight}: transformers' {self._class} loads it in another form, which needs linears of 16 bits; "
                    "quantize again with --linear-bits 16"
                )
