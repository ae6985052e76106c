"""Compare the tensors of a file with those of the architecture's class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch

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
    refuse_bytes(shards, [name for name in found if name not in besides and not matches(name, expected.ignored)])
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


def check_tied(shards: Tensors, expected: Expected) -> None:
    """Refuse two tensors with different values where the config says that they are one: a reader takes either.

    Args:
        shards: the checkpoint.
        expected: its class's tensors.

    Raises:
        CheckpointError: naming the tensor that a reader would leave out.
    """
    for name, weight in expected.tied.items():
        if name in shards.tensors and weight in shards.tensors:
            one, other = shards.map(name), shards.map(weight)
            if not torch.equal(one, other.to(one.dtype)):
                raise CheckpointError(
                    f"{shards.place(name)}: expected the values of {weight}, as config.json says that they are one "
                    "tensor (tie_word_embeddings), found others"
                )


def refuse_bytes(shards: Tensors, names: Iterable[str]) -> None:
    """Refuse floats of eight bits, whose scales no config describes.

    Args:
        shards: the checkpoint.
        names: names of tensors; others than the checkpoint's are skipped.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name in names:
        info = shards.tensors.get(name)
        if info is not None and info.dtype.is_floating_point and info.dtype.itemsize == 1:
            raise CheckpointError(f"{shards.place(name)}: expected floats of 16 bits or more, found {info.dtype}")


def _check_shape(shards: Tensors, name: str, shape: tuple[int, ...], info: TensorInfo, owner: str) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{shards.folder / info.shard}: tensor {name}: expected {list(shape)}, as in {owner}, "
            f"found {list(info.shape)}"
        )
