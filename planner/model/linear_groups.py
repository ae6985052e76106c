"""The linears outside the experts in groups of one width: vLLM joins the members of a group to one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from planner.model.layout import Layout
from vllm_moeq.format import joined

SUFFIX = ".weight"


@dataclass(frozen=True)
class LinearGroup:
    """Linears that must have one width.

    Attributes:
        index: number of their layer among all layers of the model.
        names: their names in the checkpoint.
    """

    index: int
    names: tuple[str, ...]

    @property
    def kind(self) -> tuple[str, ...]:
        """What the linears are called in every layer."""
        return tuple(name.removesuffix(SUFFIX).rpartition(".")[2] for name in self.names)

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of the linears without ``.weight``, as configs and plans have them."""
        return tuple(name.removesuffix(SUFFIX) for name in self.names)


def linear_groups(layout: Layout) -> tuple[LinearGroup, ...]:
    """Return the groups of a model, each linear in one of them, in the order of layers and of the first names."""
    bases = dict.fromkeys(name.removesuffix(SUFFIX) for name in layout.linears)
    groups = dict.fromkeys(tuple(f"{base}{SUFFIX}" for base in joined(name, bases)) for name in bases)
    places = {block: index for index, block in enumerate(layout.blocks)}
    found = [LinearGroup(places[layout.block_of(names[0]) or ""], names) for names in groups]
    return tuple(sorted(found, key=lambda group: (group.index, group.names)))
