"""Widths of single linears, format version 2, that do not fit."""

from __future__ import annotations

from tests.attacks.damages.attack import SHARD, Attack
from tests.attacks.forge import ATTENTION, OUTPUT, TENSOR, ours, widths

OF_LINEARS = [
    Attack("linear of three bits", widths({OUTPUT: 3}), ("config.json", f"linear.widths.{OUTPUT}", "found 3")),
    Attack("linear of true bits", widths({OUTPUT: True}), ("config.json", f"linear.widths.{OUTPUT}", "found True")),
    Attack("linear of other words", widths({OUTPUT: 8}), (SHARD, f"{OUTPUT}.weight_packed", "do not fit 8 bits")),
    Attack("all linears of other words", ours(lambda it: it["linear"].update(bits=8)),
           (SHARD, "weight_packed", "do not fit 8 bits")),
    Attack("linear of two widths", widths({OUTPUT: 4}), ("config.json", OUTPUT, "another width than linear.bits")),
    Attack("linear that is not there", widths({"model.layers.7.self_attn.o_proj": 8}),
           ("config.json", "model.layers.7.self_attn.o_proj.weight_packed is missing")),
    Attack("linear that is not packed", widths({"model.norm": 8}), ("config.json", "model.norm.weight_packed")),
    Attack("linear that is an expert's", widths({TENSOR: 8}), ("config.json", TENSOR, "outside the experts")),
    Attack("linear that is a path", widths({"../o_proj": 8}), ("config.json", "linear.widths", "../o_proj")),
    Attack("width of an unquantized linear", widths({"lm_head": 8}), ("config.json", "lm_head", "unquantized")),
    Attack("packed linear that is unquantized", ours(lambda it: it["unquantized"].append(OUTPUT)),
           (SHARD, f"{OUTPUT}.weight_packed", "unquantized")),
    Attack("widths within what vLLM joins", widths({ATTENTION: 8}),
           ("config.json", ATTENTION, "as vLLM joins them, found")),
    Attack("widths in version 1", widths({OUTPUT: 8}, 1), ("config.json", "format_version: expected 2", "found 1")),
    Attack("version 2 without its keys", ours(lambda it: it.update(format_version=2)),
           ("config.json", "format_version: expected 1", "found 2")),
    Attack("a hundred thousand linears", widths({f"l{i}": 3 for i in range(100_000)}),
           ("config.json", "linear.widths", "16384 keys")),
    Attack("as many mistakes as may be", widths({f"l{i}": 3 for i in range(16_384)}),
           ("config.json", "linear.widths.l0", "found 3")),
]  # fmt: skip
