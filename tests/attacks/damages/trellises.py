"""Damages of what format version 2 adds to experts: schemes, trellises, and the rotation with its signs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.attacks.damages.attack import ESCAPE, SHARD, Attack
from tests.attacks.forge import LAYER, TENSOR, added, config_text, ours, tensor

Damage = partial(Attack, base="trellis_mixtral")

OTHER_LAYER = LAYER.replace(".0.", ".1.")
WORDS, SCALES = f"{TENSOR}.weight_trellis", f"{TENSOR}.weight_row_scale"
SIGNS, INNER_SIGNS = f"{LAYER}.0.w1.weight_signs", f"{LAYER}.0.w2.weight_signs"


def scheme(expert: int, name: Any) -> Callable[[Path], None]:
    """Give one expert another scheme."""
    return ours(lambda it: it["schemes"][LAYER].__setitem__(expert, name))


def schemes(value: Any) -> Callable[[Path], None]:
    return ours(lambda it: it.update(schemes=value))


def rotation(**sizes: Any) -> Callable[[Path], None]:
    """Change sizes of the rotation."""
    return ours(lambda it: it["rotation"].update(sizes))


def one_scale(value: float) -> Callable[[Path], None]:
    """Set one row's scale, in bfloat16, which holds numbers of any size."""

    def edit(scales: torch.Tensor) -> torch.Tensor:
        scales = scales.bfloat16()
        scales[-1] = value
        return scales

    return tensor(SCALES, edit)


def stray(name: str) -> Attack:
    """Return the attack that adds a tensor which no expert of the config has."""
    return Damage(f"stray {name.removeprefix(f'{LAYER}.')}", added(name, WORDS), (SHARD, name, "no expert"))


def other_signs(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None], *words: str) -> tuple[Any, ...]:
    """Return the change of a layer's signs, and what is said of it."""
    return tensor(name, edit), (name, *words)


OF_SCHEMES = [
    Damage("unknown scheme", scheme(3, "hexagon"),
           ("config.json", f"schemes: {LAYER}: expert 3", "expected grid or trellis, found 'hexagon'")),
    Damage("scheme with an escape", scheme(3, ESCAPE), ("config.json", f"schemes: {LAYER}: expert 3", r"\x1b")),
    Damage("scheme that is a number", scheme(3, 2), ("config.json", f"schemes.{LAYER}.3", "found 2")),
    Damage("endless scheme", scheme(3, "x" * 100_000), ("config.json", f"schemes.{LAYER}.3", "64 char")),
    Damage("scheme without this width", scheme(0, "trellis"),
           ("config.json", f"schemes: {LAYER}: expert 0", "one of 1, 2, 3, 4 bits for trellis, found 8")),
    Damage("a scheme too few", ours(lambda it: it["schemes"][LAYER].pop() and None),
           ("config.json", f"schemes: {LAYER}", "expected 8 names, found 7")),
    Damage("a hundred thousand schemes", schemes({LAYER: ["trellis"] * 100_000}), ("config.json", "schemes", "4096")),
    Damage("schemes of no layer", ours(lambda it: it["schemes"].update(elsewhere=["trellis"] * 8)),
           ("config.json", "schemes: elsewhere is not among experts")),
    Damage("schemes that are empty", schemes({}), ("config.json", "schemes: expected a layer, found none")),
    Damage("schemes that say nothing", ours(lambda it: it["schemes"].update({LAYER: ["grid"] * 8})),
           ("config.json", f"schemes: {LAYER}", "found only that")),
    Damage("schemes that are one text", schemes("trellis"), ("config.json", "schemes", "found 'trellis'")),
    Damage("schemes in version 1", ours(lambda it: it.update(format_version=1)),
           ("config.json", "format_version: expected 2", "found 1")),
    Damage("grid where a trellis is stored", scheme(3, "grid"), (f"{LAYER}.3.w1.weight_packed", "is missing")),
    Damage("no schemes of trellises", ours(lambda it: it.pop("schemes") and None),
           (f"{LAYER}.1.w1.weight_packed", "is missing")),
    Attack("trellis where a grid is stored",
           ours(lambda it: it.update(format_version=2, schemes={LAYER: ["grid"] * 3 + ["trellis"] + ["grid"] * 4})),
           (f"{LAYER}.3.w1.weight_trellis", "is missing")),
    Damage("trellis of three bits for two", ours(lambda it: it["experts"][LAYER].__setitem__(3, 3)),
           (SHARD, f"{LAYER}.3.w1.weight_trellis", "3 words for 3 bits")),
    Damage("trellis of four bits for two", ours(lambda it: it["experts"][LAYER].__setitem__(3, 4)),
           (f"{LAYER}.3.w1.weight_trellis", "expected [128, 64] weights", "found [128, 32]")),
]  # fmt: skip

OF_TRELLISES = [
    Damage("missing trellis", tensor(WORDS, lambda _: None), (WORDS, "is missing")),
    Damage("missing row scales", tensor(SCALES, lambda _: None), (SCALES, "is missing")),
    Damage("trellis of another dtype", tensor(WORDS, lambda it: it.float()), (SHARD, WORDS, "2-D int32")),
    Damage("trellis in one dimension", tensor(WORDS, lambda it: it.flatten()), (SHARD, WORDS, "2-D int32")),
    Damage("trellis of torn tiles", tensor(WORDS, lambda it: it[:-8].contiguous()),
           (SHARD, WORDS, "a multiple of 16 rows", "found [56, 8]")),
    Damage("trellis of fewer tiles", tensor(WORDS, lambda it: it[:-16].contiguous()), (SHARD, TENSOR, "[48")),
    Damage("row scales of another dtype", tensor(SCALES, lambda it: it.float()),
           (SHARD, SCALES, "float16 or torch.bfloat16 [64]")),
    Damage("row scales that are a column", tensor(SCALES, lambda it: it[:, None].contiguous()),
           (SHARD, SCALES, "found torch.float16 [64, 1]")),
    Damage("too few row scales", tensor(SCALES, lambda it: it[1:].contiguous()), (SHARD, SCALES, "found", "[63]")),
    Damage("row scale NaN", one_scale(float("nan")), (SHARD, SCALES, "finite")),
    Damage("row scale infinite", one_scale(float("-inf")), (SHARD, SCALES, "finite")),
    Damage("row scale of 0", one_scale(0.0), (SHARD, SCALES, "no scale of 0")),
    Damage("row scale that overflows", one_scale(3e38), (SHARD, SCALES, "values up to 1027")),
    Damage("row scale of infinite weights", one_scale(65280.0), (SHARD, SCALES, "values up to 1027")),
    Damage("row scale that overflows below 0", one_scale(-3e38), (SHARD, SCALES, "values up to 1027")),
    stray(f"{TENSOR}.weight_packed"),
    stray(f"{TENSOR}.weight_scale"),
    stray(f"{LAYER}.0.w2.weight_trellis"),
]  # fmt: skip

OF_SIGNS = [
    *(
        Damage(f"signs of {part}: {name}", *other_signs(place, edit, *words))
        for part, place, count in (("the input", SIGNS, 2), ("the inner activations", INNER_SIGNS, 4))
        for name, edit, words in (
            ("missing", lambda _: None, ("is missing",)),
            ("too few", lambda it: it[1:].contiguous(), (f"expected torch.int32 [{count}], found",)),
            ("too many", lambda it: it.repeat(2), (f"expected torch.int32 [{count}], found",)),
            ("of another dtype", lambda it: it.float(), (f"expected torch.int32 [{count}], found torch.float32",)),
            ("of two dimensions", lambda it: it[None].contiguous(), (f"found torch.int32 [1, {count}]",)),
        )
    ),
    stray(SIGNS.replace(".0.w1", ".1.w1")),
    stray(SIGNS.replace(".0.w1", ".0.w3")),
    Damage("signs without a rotation", ours(lambda it: it.pop("rotation") and None), (SIGNS, "no expert")),
    Attack("rotation without signs", ours(lambda it: it.update(format_version=2, rotation={"input": 64, "inner": 64})),
           (SIGNS, "is missing")),
    Damage("rotation that does not divide the hidden size", rotation(input=128),
           (SHARD, SIGNS, "a rotation whose size divides 64, found 128")),
    Damage("rotation that does not divide the intermediate size", rotation(inner=256),
           (SHARD, INNER_SIGNS, "a rotation whose size divides 128, found 256")),
]  # fmt: skip

OF_ROTATIONS = [
    *(
        Damage(f"rotation of {value!r:.20}", rotation(input=value), ("config.json", "rotation.input", "found"))
        for value in (0, -64, 48, 512, 64.0, 64.5, "64", True, None, [64], 1 << 62, 10**4000)
    ),
    *(
        Damage(f"inner rotation of {value}", config_text('"inner": 128', f'"inner": {value}'),
               ("config.json", "rotation.inner", "found"))
        for value in ("1e999", "-1e999", "NaN", "1.28e2")
    ),
    Damage("rotation of one side", ours(lambda it: it["rotation"].pop("inner") and None),
           ("config.json", "rotation.inner", "required")),
    Damage("rotation with another key", rotation(seed=1), ("config.json", "rotation.seed", "not permitted")),
    Damage("rotation that is a number", ours(lambda it: it.update(rotation=64)), ("config.json", "rotation", "64")),
]  # fmt: skip

IN_VERSION_TWO = [*OF_SCHEMES, *OF_TRELLISES, *OF_SIGNS, *OF_ROTATIONS]
