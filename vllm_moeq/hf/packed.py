"""A module that holds a layer's packed experts and reads them from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vllm_moeq.format import CODES_PER_BLOCK, SIGNS, BlockRotation, CheckpointError, ShardSet, UsageError
from vllm_moeq.hf.layout import PARTS, StoredLayer
from vllm_moeq.kernels import PackedMatrices, of_one_dtype, wide_enough

AS_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class PackedStorage(torch.nn.Module):
    """The packed experts of a layer: one buffer per part and suffix, such as ``gate_up_weight_packed``.

    The buffers are not part of the state dict, so no file holds them in another form than the checkpoint's. Floating
    buffers such as scales are float16, or float32 if they hold a bfloat16 value that float16 cannot represent. A cast
    of the model does not change them.

    Args:
        layer: the layer in the checkpoint.
    """

    def __init__(self, layer: StoredLayer) -> None:
        super().__init__()
        self.layer = layer
        for part, suffix, name in self._stored():
            self.register_buffer(name, layer.matrices(part).empty(suffix), persistent=False)
        for part in PARTS:
            if layer.rotation(part) is not None:
                signs = torch.empty(layer.matrices(part).columns // CODES_PER_BLOCK, dtype=torch.int32)
                self.register_buffer(f"{part}_{SIGNS}", signs, persistent=False)

    def _stored(self) -> Iterator[tuple[str, str, str]]:
        """Yield part, suffix and name of every buffer."""
        for part in PARTS:
            for suffix in self.layer.matrices(part).suffixes:
                yield part, suffix, f"{part}_{suffix}"

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        gate_up, down = self.layer.gate_up, self.layer.down
        average = sum(gate_up.bits) / self.layer.experts
        return f"{self.layer.experts} experts, hidden={gate_up.columns}, intermediate={down.columns}, bits={average:g}"

    def packed(self, part: str) -> PackedMatrices:
        """Return one of :data:`PARTS` in the form that the kernels take."""
        matrices = self.layer.matrices(part)
        rotated, buffers = self.layer.rotation(part), (self.get_buffer(f"{part}_{it}") for it in matrices.suffixes)
        rotation = None if rotated is None else BlockRotation(self.get_buffer(f"{part}_{SIGNS}"), rotated.size)
        return PackedMatrices(matrices, *buffers, rotation=rotation)

    def load(self, shards: ShardSet) -> None:
        """Copy every tensor of every expert into the buffers, each once.

        Raises:
            CheckpointError: a tensor is missing or misshapen, or holds an invalid value such as a scale that is 0 or
                not finite; the message names it.
        """
        for part in PARTS:
            matrices, projections = self.layer.matrices(part), self.layer.names(part)
            for expert, scheme in enumerate(matrices.schemes):
                for place, projection in enumerate(projections):
                    for suffix in scheme.suffixes:
                        name = f"{self.layer.prefix}.{expert}.{projection}.{suffix}"
                        self._copy(name, shards, part, suffix, expert, (place, len(projections)))
            buffers = of_one_dtype({suffix: self.get_buffer(f"{part}_{suffix}") for suffix in matrices.suffixes})
            self._buffers.update({f"{part}_{suffix}": buffer for suffix, buffer in buffers.items()})
            if (rotated := self.layer.rotation(part)) is not None:
                self.get_buffer(f"{part}_{SIGNS}").copy_(shards.load(rotated.name))

    def _copy(self, name: str, shards: ShardSet, part: str, suffix: str, expert: int, place: tuple[int, int]) -> None:
        """Copy one tensor; ``place`` is its index in the stack of this part, and the size of the stack."""
        tensor = shards.map(name)
        matrices = self.layer.matrices(part)
        scheme = matrices.schemes[expert]
        if suffix in scheme.checked:
            scheme.check_values(tensor, suffix, shards.place(name))
        buffer = wide_enough(self.get_buffer(f"{part}_{suffix}"), tensor)
        self._buffers[f"{part}_{suffix}"] = buffer
        index, count = place
        target = matrices.view(buffer, suffix, expert).tensor_split(count)[index]
        if target.shape != tensor.shape:
            raise CheckpointError(f"{shards.place(name)}: expected {list(target.shape)}, found {list(tensor.shape)}")
        target.copy_(tensor)

    def release(self) -> None:
        """Free the buffers, once a kernel has repacked the weights."""
        for _, _, name in self._stored():
            self._buffers[name] = self.get_buffer(name).new_empty(0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedStorage:
        """Apply ``.to()``, ``.cuda()`` and the like, without changing the dtype of the buffers.

        Raises:
            UsageError: the device changes after the buffers have been freed.
        """
        device = self.packed(PARTS[0]).device
        dtypes = {name: self.get_buffer(name).dtype for _, _, name in self._stored()}
        for name, dtype in dtypes.items():
            # Seen as integers, the buffers are not cast.
            self._buffers[name] = self.get_buffer(name).view(AS_INTEGERS.get(dtype, dtype))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)
        packed = self.packed(PARTS[0])
        if packed.device != device and not any(tensor.numel() for tensor in packed.tensors.values()):
            raise UsageError(f"{self.layer.prefix}: its kernel keeps the experts on {device}: load the model again")
        return self
