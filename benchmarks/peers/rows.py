"""The rows of the table: which peer quantizes to how many bits with which options, and what its format stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.storage import Storage, ggml, gptq, hqq, ours, trellis

TORCH = "torch==2.13.0"
"""GPTQModel brings a newer one."""


@dataclass(frozen=True)
class Peer:
    """A package that quantizes.

    Attributes:
        module: its process, among ``benchmarks/peers/processes``.
        requirements: what pip installs for it.
    """

    module: str
    requirements: tuple[str, ...]


PEERS = {
    "hqq": Peer("by_hqq", ("hqq==0.2.8.post1", TORCH)),
    "gptqmodel": Peer("by_gptqmodel", ("gptqmodel==7.7.0",)),
    "auto-round": Peer("by_autoround", ("auto-round==0.16.1", TORCH)),
    "llama.cpp": Peer("by_llama", ("llama-cpp-python==0.3.36", "safetensors==0.8.0")),
}
OURS = "ours"
"""The peer that quantizes in this environment."""

PLAN = "ours, kl plan"
"""The label of the rows that ratios refer to."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        label: what the table calls it.
        peer: a name in :data:`PEERS`, or :data:`OURS`.
        bits: width of the codes; that of the peers beside a plan.
        storage: what the format stores.
        options: what its process understands; for ours the keywords of ``planner.plan``, and
            ``calibration`` of ``planner.quantize``.
    """

    label: str
    peer: str
    bits: int
    storage: Storage
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of its files."""
        text = f"{self.label} {self.storage.bits:.4f}".lower()
        words = "".join(letter if letter.isalnum() else "-" for letter in text)
        return "-".join(filter(None, words.split("-")))


BLOCK = 256
BLOCK_BYTES = {
    2: {"IQ2_XXS": 66, "IQ2_XS": 74, "IQ2_S": 82, "Q2_K": 84},
    3: {"IQ3_XXS": 98, "IQ3_S": 110, "Q3_K": 110},
}
"""Types of llama.cpp with two or three bits per code → bytes of a block. The library's sizes are compared with them."""

RECIPES: dict[str, dict[str, Any]] = {
    "50 steps": {"sym": False, "recipe": {"iters": 50}},
    "200 steps": {"sym": False, "recipe": {"iters": 200}},
    "best": {"sym": True, "recipe": {"iters": 1000, "enable_alg_ext": True}},
}
"""AutoRound's light and default recipes with zero points, which are better here than without and take no more bits, and
the one that its README recommends for two bits."""


def rows(bits: int) -> list[Row]:
    """Return the rows of a width: other packages, ours with equal widths, and a plan at the total bits of each."""
    others = [
        Row("HQQ", "hqq", bits, hqq(bits)),
        Row("GPTQModel", "gptqmodel", bits, gptq(bits)),
        Row("GPTQModel, searched scales", "gptqmodel", bits, gptq(bits), {"sym": False, "mse": 2.0}),
        *(Row(f"AutoRound, {label}", "auto-round", bits, gptq(bits), options) for label, options in RECIPES.items()),
        *(Row(f"llama.cpp {name}, imatrix", "llama.cpp", bits, ggml(BLOCK, size), {"type": name, "bytes": size})
          for name, size in BLOCK_BYTES[bits].items()),
        *(Row(f"ours, {calibration} GPTQ, uniform", OURS, bits, ours(bits),
              {"avg_bits": bits, "method": "uniform", "bits": str(bits), "calibration": calibration})
          for calibration in ("symmetric", "asymmetric")),
    ]  # fmt: skip
    plans = [plan_row(bits, total) for total in sorted({row.storage.bits for row in others})]
    return [*others, *plans, trellis_row(bits, gptq(bits).bits)]


def plan_row(bits: int, total: float) -> Row:
    """Return our plan with some total bits per weight."""
    average = total - ours(0).bits
    return Row(PLAN, OURS, bits, ours(average), {"avg_bits": average, "method": "kl"})


def trellis_row(bits: int, total: float) -> Row:
    """Return our plan with trellis codes and some total bits per weight."""
    average = total - trellis(0).bits
    return Row(f"{PLAN}, trellis", OURS, bits, trellis(average),
               {"avg_bits": average, "method": "kl", "scheme": "trellis"})  # fmt: skip


def all_rows() -> list[Row]:
    """Return the rows of every width."""
    return [row for bits in BLOCK_BYTES for row in rows(bits)]
