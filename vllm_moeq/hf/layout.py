"""The shapes and widths of each MoE layer in a checkpoint, read from headers before memory is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_moeq.format import MoeqConfig, Projections, Rotated, ShardSet, expert_matrices
from vllm_moeq.kernels import RaggedMatrices, ragged

PARTS = ("gate_up", "down")
"""The two parts of a layer: gate and up stacked, and down."""


@dataclass(frozen=True)
class StoredLayer:
    """One MoE layer of the checkpoint.

    Attributes:
        prefix: the layer's name, with which the names of its experts' tensors begin.
        projections: the names of an expert's matrices.
        gate_up: the layout of [E, 2·intermediate, hidden], gate's rows first; [E, intermediate, hidden] without ``up``.
        down: the layout of [E, hidden, intermediate].
        rotated: the rotations of :data:`PARTS` in whose basis the experts are stored; None where there is none.
        threshold: a share of a token's largest routing weight; experts with less are skipped. 0 skips none.
    """

    prefix: str
    projections: Projections
    gate_up: RaggedMatrices
    down: RaggedMatrices
    rotated: tuple[Rotated | None, Rotated | None]
    threshold: float

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.gate_up.bits)

    @property
    def weights(self) -> int:
        """Number of weights of all experts."""
        return self.experts * sum(part.rows * part.columns for part in (self.gate_up, self.down))

    def matrices(self, part: str) -> RaggedMatrices:
        """Return the layout of one of :data:`PARTS`."""
        return self.gate_up if part == "gate_up" else self.down

    def rotation(self, part: str) -> Rotated | None:
        """Return the rotation of the inputs of one of :data:`PARTS`."""
        return self.rotated[PARTS.index(part)]

    def names(self, part: str) -> tuple[str, ...]:
        """Return the projections that are stacked in one of :data:`PARTS`, in order."""
        down = self.projections.down
        return (down,) if part == "down" else tuple(name for name in self.projections.names() if name != down)


def read_layers(shards: ShardSet, config: MoeqConfig) -> Iterator[StoredLayer]:
    """Yield the layers in the order of the config.

    Raises:
        CheckpointError: an expert's tensor is missing or misshapen.
    """
    shapes = {
        (matrix.prefix, matrix.projection): (matrix.rows, matrix.columns)
        for matrix in expert_matrices(shards, config)
        if matrix.expert == 0
    }
    names = config.projections
    for prefix, bits in config.experts.items():
        rows, columns = shapes[prefix, names.gate]
        stacked = rows if names.up is None else 2 * rows
        schemes = [config.scheme(prefix, expert) for expert in range(len(bits))]
        yield StoredLayer(
            prefix,
            names,
            ragged(bits, stacked, columns, config.group_size, schemes=schemes),
            ragged(bits, *shapes[prefix, names.down], config.group_size, schemes=schemes),
            (config.rotated(prefix, names.gate), config.rotated(prefix, names.down)),
            (config.odp or {}).get(prefix, 0.0),
        )
