"""A module that holds a layer's experts packed, and fills itself from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_moeq.format import PACKED, SCALE, ZERO, CheckpointError, ShardSet, UsageError, check_values
from vllm_moeq.hf.layout import PARTS, Layer
from vllm_moeq.kernels import PackedMatrices

SUFFIXES = (PACKED, SCALE, ZERO)
AS_INTEGERS = {torch.float16: torch.int16, torch.float32: torch.int32}


class PackedStorage(torch.nn.Module):
    """Six buffers: packed words, scales and zeros of gate and up, and of down.

    They are not part of the state dict: this module reads them itself, tensor by tensor, so that no file holds
    them in another form than the checkpoint's. Scales and zeros stay float16, or float32 where a bfloat16 value does
    not fit; a cast of the model does not touch them.

    Args:
        layer: what the checkpoint says.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        for part in PARTS:
            matrices = layer.matrices(part)
            shape = (layer.experts, matrices.rows, matrices.groups)
            self.register_buffer(
                f"{part}_{PACKED}", torch.empty(matrices.num_words, dtype=torch.int32), persistent=False
            )
            for suffix in (SCALE, ZERO):
                self.register_buffer(f"{part}_{suffix}", torch.empty(shape, dtype=torch.float16), persistent=False)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        gate_up, down = self.layer.gate_up, self.layer.down
        average = sum(gate_up.bits) / self.layer.experts
        return f"{self.layer.experts} experts, hidden={gate_up.columns}, intermediate={down.columns}, bits={average:g}"

    def packed(self, part: str) -> PackedMatrices:
        """Return one of :data:`PARTS` as the kernels take it."""
        words, scales, zeros = (self.get_buffer(f"{part}_{suffix}") for suffix in SUFFIXES)
        return PackedMatrices(self.layer.matrices(part), words, scales, zeros)

    def load(self, shards: ShardSet) -> None:
        """Copy every tensor of every expert, each once, to where the buffers are.

        Raises:
            CheckpointError: a tensor that is missing, has another shape than its place, or a scale or zero that is
                not finite, or a scale of 0; names it.
        """
        for part in PARTS:
            for expert in range(self.layer.experts):
                first = 0
                for projection in self.layer.names(part):
                    base = f"{self.layer.prefix}.{expert}.{projection}"
                    rows = self.layer.matrices(part).rows // len(self.layer.names(part))
                    for suffix in SUFFIXES:
                        self._copy(f"{base}.{suffix}", shards, part, suffix, expert, slice(first, first + rows))
                    first += rows
            # The kernels take scales and zeros of one dtype.
            scale, zero = self.get_buffer(f"{part}_{SCALE}"), self.get_buffer(f"{part}_{ZERO}")
            dtype = torch.promote_types(scale.dtype, zero.dtype)
            self._buffers.update({f"{part}_{SCALE}": scale.to(dtype), f"{part}_{ZERO}": zero.to(dtype)})

    def _copy(self, name: str, shards: ShardSet, part: str, suffix: str, expert: int, rows: slice) -> None:
        tensor = shards.map(name)
        buffer = self.get_buffer(f"{part}_{suffix}")
        if suffix == PACKED:
            matrices = self.layer.matrices(part)
            begin, end = matrices.offsets[expert], matrices.offsets[expert + 1]
            target = buffer[begin:end].view(matrices.rows, -1)[rows]
        else:
            check_values(tensor, suffix, shards.place(name))
            if buffer.dtype == torch.float16 and not torch.equal(tensor.half().to(tensor.dtype), tensor):
                buffer = buffer.float()
                self._buffers[f"{part}_{suffix}"] = buffer
            target = buffer[expert, rows]
        if target.shape != tensor.shape:
            raise CheckpointError(f"{shards.place(name)}: expected {list(target.shape)}, found {list(tensor.shape)}")
        target.copy_(tensor)

    def release(self) -> None:
        """Give the buffers' memory back, when a kernel has the weights in its own order."""
        for part in PARTS:
            for suffix in SUFFIXES:
                name = f"{part}_{suffix}"
                self._buffers[name] = self.get_buffer(name).new_empty(0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedStorage:
        """Do what ``.to()``, ``.cuda()`` and the like ask for, without changing the dtype of scales and zeros.

        Raises:
            UsageError: another device, when the buffers have been given back.
        """
        device = self.get_buffer(f"gate_up_{PACKED}").device
        dtypes = {f"{part}_{suffix}": torch.float16 for part in PARTS for suffix in (SCALE, ZERO)}
        for name in dtypes:
            buffer = self.get_buffer(name)
            dtypes[name] = buffer.dtype
            # Casts of a module leave integers alone.
            self._buffers[name] = buffer.view(AS_INTEGERS[buffer.dtype])
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)
        if not self.get_buffer(f"gate_up_{PACKED}").numel() and self.get_buffer(f"gate_up_{PACKED}").device != device:
            raise UsageError(f"{self.layer.prefix}: its kernel keeps the experts on {device}: load the model again")
        return self
