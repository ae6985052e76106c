"""This script estimates the time of a layer for up to 16 tokens from counts of bytes, instructions and launches.

    python -m benchmarks.kernels.time_model

Nothing here was timed. A launch takes as long as its slower stream, of bytes or of instructions, and what passes before
the first weight arrives. Instructions per weight are those that benchmarks/kernels/kernel_static.py counts for sm_90.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernels.kernel_static import NUMBERS
from benchmarks.kernels.routing import MODELS, Shape, activation_bytes, expert_bytes
from vllm_moeq.kernels.triton.codings import planes_in, set_of
from vllm_moeq.kernels.triton.layer import PROGRAMS
from vllm_moeq.kernels.triton.schedule import FEW, FEW_TOKENS, Block, Schedule, schedule_few, splits_for

LANES, SCHEDULERS, REGISTERS = 32, 4, 65536
"""Of a warp; schedulers and registers of a multiprocessor, of all these cards."""

ROUND_TRIP = 0.7
"""Microseconds of a load from memory that others wait for: assumed."""

ROUND_TRIPS = 2
"""Of a program before its first weight: the record of its pair, the words."""

OTHER_ROUND_TRIPS = 5
"""Of the small launches: before gate and up an expert and its row of the table, at the end an expert, its parts and an
output."""


BLOCK = 256
"""Inputs of a block of weights, the least that a part of the input dimension has."""


@dataclass(frozen=True)
class Card:
    """A GPU, by its maker's data sheet.

    Attributes:
        name: its name for people.
        words: parts of the name that torch gives it; all of them must be there.
        multiprocessors: how many.
        clock: GHz that it keeps under load: the boost clock of the data sheet.
        bandwidth: of memory, GB/s.
        shared: KiB of shared memory of a multiprocessor.
        tensor: TFLOP/s of dense bfloat16 products with sums in float32.
        launch: microseconds of a launch inside a CUDA graph: assumed.
    """

    name: str
    words: tuple[str, ...]
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int
    tensor: float
    launch: float = 1.5

    @property
    def issues(self) -> float:
        """Instructions of single lanes in a second."""
        return self.multiprocessors * SCHEDULERS * LANES * self.clock * 1e9


CARDS = (
    Card("H100 SXM", ("H100", "HBM3"), 132, 1.755, 3350, 228, 989),  # NVIDIA H100 data sheet and Hopper white paper
    Card("H200", ("H200",), 132, 1.755, 4800, 228, 989),  # NVIDIA H200 data sheet; the chip is the H100's
    Card("A100 80 SXM", ("A100-SXM", "80GB"), 108, 1.41, 2039, 164, 312),  # NVIDIA A100 data sheet, Ampere white paper
    Card("L40S", ("L40S",), 142, 2.52, 864, 100, 362),  # NVIDIA L40S data sheet
    Card("RTX 4090", ("RTX 4090",), 128, 2.52, 1008, 100, 165),  # NVIDIA Ada white paper
)

INSTRUCTIONS: dict[str, tuple[float, float, float]] = {
    "grid1": (1.20, 1.83, 3.76),
    "grid2": (1.25, 1.87, 3.77),
    "grid3": (1.48, 2.11, 3.91),
    "grid4": (1.52, 2.07, 3.78),
    "trellis1": (5.31, 5.68, 6.59),
    "trellis2": (5.34, 5.73, 6.64),
    "trellis3": (5.49, 5.87, 6.84),
    "trellis4": (5.37, 5.78, 6.70),
}
"""Coding → instructions per weight with 8, 16 and 64 tokens of a program, of the table in docs/benchmarks.md."""

RINGS = "trellis"
PROGRAM = ((254, 86.0), (255, 56.1), (255, 41.5), (246, 50.0))
"""Registers of a thread and KiB of shared memory of the variants for few tokens, the most that was counted."""


@dataclass(frozen=True)
class Estimate:
    """The estimate of a layer; the launches are gate and up, and down.

    Attributes:
        launches: microseconds of each of the two.
        others: microseconds of the small launches around them.
    """

    launches: tuple[float, float]
    others: float

    @property
    def layer(self) -> float:
        """Microseconds of the layer."""
        return sum(self.launches) + self.others


def card_named(name: str) -> Card | None:
    """Return the card that torch calls so, or None for an unknown one."""
    return next((card for card in CARDS if all(word in name for word in card.words)), None)


def launch_us(card: Card, moved: float, issued: float, programs: float, schedule: Schedule) -> float:
    """Return the microseconds of one launch.

    Args:
        card: the GPU.
        moved: bytes.
        issued: instructions of single lanes.
        programs: how many work.
        schedule: the variant.
    """
    registers, shared = PROGRAM[FEW.index(schedule)]
    resident = min(REGISTERS // (registers * schedule.warps * LANES), int(card.shared // shared))
    together = min(programs / card.multiprocessors, resident) * schedule.warps
    busy = min(1.0, together / SCHEDULERS)  # a scheduler without a warp issues nothing
    streaming = max(moved / (card.bandwidth * 1e9), issued / (card.issues * busy)) * 1e6
    return streaming + ROUND_TRIPS * ROUND_TRIP + card.launch


def estimate(card: Card, codings: Sequence[str], visited: float, tokens: int, shape: Shape, group: int) -> Estimate:
    """Estimate a layer whose visited experts have these codings in equal parts.

    Args:
        card: the GPU.
        codings: names of :data:`INSTRUCTIONS`.
        visited: experts that have tokens.
        tokens: up to FEW_TOKENS.
        shape: the layer.
        group: weights per scale of a grid; a trellis has a scale per row.

    Raises:
        ValueError: more tokens than the counts are for.
    """
    if not 1 <= tokens <= FEW_TOKENS:
        raise ValueError(f"expected 1 to {FEW_TOKENS} tokens, found {tokens}")
    schedule = schedule_few(tokens, Block(planes_in(set_of(NUMBERS[name] for name in codings)), 4 * BLOCK // group))
    number = int(tokens > FEW[0].tokens)
    weights = 3 * shape.hidden * shape.intermediate
    each = visited / len(codings)
    rings = any(name.startswith(RINGS) for name in codings)
    moved = sum(
        each * expert_bytes(int(name[-1]), shape, max(shape.hidden, shape.intermediate) if RINGS in name else group)
        for name in codings
    )
    issued = sum(each * weights * INSTRUCTIONS[name][number] for name in codings)
    rest = activation_bytes(tokens, shape) / 2
    tiles = visited * shape.hidden / 64
    splits = splits_for(round(tiles), -(-shape.intermediate // BLOCK), PROGRAMS)
    up = launch_us(card, moved * 2 / 3 + rest, issued * 2 / 3, visited * 2 * shape.intermediate / 64, schedule)
    down = launch_us(card, moved / 3 + rest, issued / 3, tiles * splits, schedule)
    others = 3 if rings else 2  # arrangements or sums before, the reduction after
    trips = OTHER_ROUND_TRIPS + others - 2
    return Estimate((up, down), others * card.launch + trips * ROUND_TRIP)


def estimate_grids(device: str, bits: Sequence[int], tokens: int, shape: Shape, group: int) -> float | None:
    """Return the microseconds of a layer of grids, or None for an unknown card, or what was not counted.

    Args:
        device: the card, as torch calls it.
        bits: widths of all experts.
        tokens: of the batch, spread evenly.
        shape: the layer.
        group: weights per scale.
    """
    card, codings = card_named(device), [f"grid{width}" for width in bits]
    if card is None or tokens > FEW_TOKENS or not set(codings) <= set(INSTRUCTIONS):
        return None
    return estimate(card, codings, visited_by(tokens, shape), tokens, shape, group).layer


def visited_by(tokens: int, shape: Shape) -> float:
    """Return the expected number of experts that independent tokens visit evenly."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def main() -> None:
    """Print the table of docs/benchmarks.md."""
    names = ("grid2", "grid3", "trellis2", "trellis3")
    print("| layer | tokens | card | " + " | ".join(names) + " |\n|---|---:|---|" + "---:|" * len(names))
    for model in ("mixtral-8x7b", "qwen3-30b-a3b"):
        for tokens in (1, 16):
            for card in CARDS:
                visited = visited_by(tokens, MODELS[model])
                found = (estimate(card, [name], visited, tokens, MODELS[model], 128).layer for name in names)
                print(f"| {model} | {tokens} | {card.name} | " + " | ".join(f"{us:.0f}" for us in found) + " |")


if __name__ == "__main__":
    main()
