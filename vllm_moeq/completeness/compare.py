"""Compare the tensors of a file with those of the architecture's class."""

from __future__ import annotations

from collections.abc import Mapping, Set

from vllm_moeq.completeness.expected import Expected, matches
from vllm_moeq.format import CheckpointError, TensorInfo
from vllm_moeq.format.tensors import Tensors


def compare(
    shards: Tensors,
    expected: Expected,
    found: Mapping[str, TensorInfo],
    *,
    elsewhere: Set[str] = frozenset(),
    besides: Set[str] = frozenset(),
) -> None:
    """Refuse a checkpoint whose tensors are not those of its class.

    Args:
        shards: the checkpoint, for messages.
        expected: the class's tensors.
        found: the checkpoint's tensors, decoded: a packed matrix stands under its weight's name, in the weight's shape.
        elsewhere: names among ``expected.tensors`` that the checkpoint holds in another form, checked before.
        besides: names among ``found`` that the class does not need.

    Raises:
        CheckpointError: naming the first tensor that is missing, misshapen or too much.
    """
    owner = f"transformers' {expected.class_name}"
    for name, info in expected.tensors.items():
        if name in found:
            _check_shape(shards, name, info.shape, found[name], owner)
            if info.dtype.is_floating_point and not found[name].dtype.is_floating_point:
                raise CheckpointError(
                    f"{shards.folder / found[name].shard}: tensor {name}: expected floats, as in {owner}, "
                    f"found {found[name].dtype}"
                )
        elif name not in elsewhere and not matches(name, expected.optional):
            raise CheckpointError(
                f"{shards.folder}: tensor {name} is missing: expected {list(info.shape)}, as in {owner}"
            )
    for name, info in found.items():
        if name in expected.tied:
            _check_shape(shards, name, expected.tensors[expected.tied[name]].shape, info, owner)
        elif name not in expected.tensors and name not in besides and not matches(name, expected.ignored):
            raise CheckpointError(
                f"{shards.folder / info.shard}: tensor {name}: expected no such tensor, as {owner} has none, "
                f"found {list(info.shape)}"
            )


def _check_shape(shards: Tensors, name: str, shape: tuple[int, ...], info: TensorInfo, owner: str) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{shards.folder / info.shard}: tensor {name}: expected {list(shape)}, as in {owner}, "
            f"found {list(info.shape)}"
        )
