"""Damages of single tensors: none, another, or values that no writer has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tests.attacks.damages.attack import PACKED, SCALE, SHARD, ZERO, Attack
from tests.attacks.forge import ATTENTION, LAYER, TENSOR, added, filled, tensor


def overflowing(name: str, value: float) -> Callable[[Path], None]:
    """Set one element of an expert's scales or zeros in bfloat16, which holds numbers of any size."""

    def change(folder: Path) -> None:
        for part in (SCALE, ZERO):
            tensor(part, lambda it: it.bfloat16())(folder)
        filled(name, value)(folder)

    return change


TENSORS = [
    Attack("dense linear beside the packed one", added(f"{ATTENTION}.weight"), (SHARD, f"{ATTENTION}.weight", "both")),
    Attack("no last norm", tensor("model.norm.weight", lambda _: None), ("model.norm.weight", "is missing")),
    Attack("scale that overflows", overflowing(SCALE, 1e30), (SHARD, SCALE, "values up to 65504")),
    Attack("zero that overflows", overflowing(ZERO, -3e38), (SHARD, ZERO, "values up to 65504")),
    Attack("linear's scale that overflows", filled(f"{ATTENTION}.weight_scale", 1e30),
           (SHARD, f"{ATTENTION}.weight_scale", "values up to 65504")),
    Attack("missing words", tensor(PACKED, lambda _: None), (PACKED, "is missing")),
    Attack("missing scales", tensor(SCALE, lambda _: None), (SCALE, "is missing")),
    Attack("missing zeros", tensor(ZERO, lambda _: None), (ZERO, "is missing")),
    Attack("same tensor in two shards", added(PACKED, f"{LAYER.replace('.0.', '.1.')}.0.w1.weight_packed"),
           (SHARD, PACKED, "is also in")),
    Attack("stray expert", added(f"{LAYER}.8.w1.weight_packed"), (SHARD, f"{LAYER}.8.w1.weight_packed", "no expert")),
    Attack("words of another dtype", tensor(PACKED, lambda it: it.float()), (SHARD, PACKED, "2-D int32")),
    Attack("words of another width", tensor(PACKED, lambda it: it.repeat(1, 2)), (SHARD, PACKED, "for 2 bits")),
    Attack("words in one dimension", tensor(PACKED, lambda it: it.flatten()), (SHARD, PACKED, "2-D int32")),
    Attack("scales of another dtype", tensor(SCALE, lambda it: it.float()), (SHARD, SCALE, "float16 or bfloat16")),
    Attack("scales of another shape", tensor(SCALE, lambda it: it[:, :-1].contiguous()), (SHARD, TENSOR)),
    Attack("no scales", tensor(SCALE, lambda it: it[:, :0].contiguous()), (SHARD, SCALE)),
    Attack("zeros of another dtype", tensor(ZERO, lambda it: it.float()), (SHARD, ZERO, "expected")),
    Attack("scale of 0", filled(SCALE, 0), (SHARD, SCALE, "no scale of 0")),
    Attack("scale NaN", filled(SCALE, float("nan")), (SHARD, SCALE, "finite")),
    Attack("scale infinite", filled(SCALE, float("inf")), (SHARD, SCALE, "finite")),
    Attack("zero NaN", filled(ZERO, float("nan")), (SHARD, ZERO, "finite")),
    Attack("zero infinite", filled(ZERO, float("-inf")), (SHARD, ZERO, "finite")),
    Attack("linear's scale NaN", filled(f"{ATTENTION}.weight_scale", float("nan")),
           (SHARD, f"{ATTENTION}.weight_scale", "finite")),
    Attack("linear's words", tensor(f"{ATTENTION}.weight_packed", lambda it: it[:, :-1].contiguous()),
           (SHARD, f"{ATTENTION}.weight_packed", "do not fit")),
    Attack("linear's scales are whole numbers", tensor(f"{ATTENTION}.weight_scale", lambda it: it.to(torch.int16)),
           (SHARD, f"{ATTENTION}.weight_packed", "do not fit")),
]  # fmt: skip
