"""Read from transformers' class where a model has its experts and routers: such a model needs no row of the table.

The class is built on the meta device. Experts are one module with a stack of matrices per projection, and the router is
the other weight beside them with a row per expert. Names on disk follow from transformers' own table of renamings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from planner.model.architectures import Architecture, Fused, Stack
from planner.model.class_names import SavedNames
from planner.model.computed import computed
from vllm_moeq.format import Projections, UsageError

INSIDE = re.compile(r"(.+?)\.(\d+)\.(.+)")
"""A name inside a numbered layer: the list of layers, the layer's index, and the rest."""

EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")
"""The name on disk of one expert's matrix: the experts' prefix, the expert's number, and the projection."""

PLAIN = (".indexer.wk.weight", ".indexer.weights_proj.weight")
"""Endings of names on disk of linears that vLLM does not quantize: DeepSeek's choice of the tokens to attend to."""

PROJECTIONS = {
    "gate_up_proj": Projections(gate="gate_proj", up="up_proj", down="down_proj"),
    "up_proj": Projections(gate="up_proj", down="down_proj"),
}
"""The first of two fused tensors → names in the output of the projections of an expert, with a gate and without."""


@dataclass(frozen=True)
class Experts:
    """The modules of experts of a model, one in each of some layers.

    Attributes:
        stack: name of the list of layers.
        inside: name of the module within a layer.
        module: the first of them.
        index: the layer that has it.
    """

    stack: str
    inside: str
    module: torch.nn.Module
    index: int

    @property
    def first(self) -> str:
        """Name of the parameter that holds gate and up, or up alone."""
        return "gate_up_proj" if getattr(self.module, "has_gate", True) else "up_proj"

    @property
    def count(self) -> int:
        """Number of experts of a layer."""
        return int(self.module.get_parameter("down_proj").shape[0])

    @property
    def hidden(self) -> int:
        """Number of inputs of an expert."""
        outputs, inputs = self.module.get_parameter("down_proj").shape[1:]
        return int(inputs if getattr(self.module, "is_transposed", False) else outputs)


def read_structure(model: Any, model_type: str, where: str) -> Architecture:
    """Return where transformers' model has its experts and routers, and what its experts compute.

    Args:
        model: transformers' model, on any device.
        model_type: what config.json calls it.
        where: the model's config.json, for messages.

    Raises:
        UsageError: it has none, or what it has does not fit; the message names the module or the attribute.
    """
    experts = _find_experts(model, where)
    names = SavedNames.of(model, experts.stack, where)
    does = computed(f"{where}: {experts.stack}.{experts.index}.{experts.inside}", experts.module)
    router = _find_router(model, experts, where)
    prefix, projections, fused = _storage(experts, names, where)
    known = (
        f"{model_type} has no row of its own and was recognized by transformers' {type(model).__name__}: "
        f"{experts.count} experts in {experts.inside} ({type(experts.module).__name__}, {does.words}), router {router}"
    )
    return Architecture(
        router=names.one(router),
        experts=prefix,
        projections=projections,
        fused=fused,
        stacks=(Stack(layers=names.stack, length=len(model.get_submodule(experts.stack))),),
        renamed=names.renamed(experts.inside, prefix),
        kept=(*names.kept(router), *PLAIN),
        uncalibrated=does.uncalibrated,
        unserved=does.unserved,
        unloaded=does.unloaded,
        num_experts=experts.count,
        recognized=known,
    )


def _find_experts(model: Any, where: str) -> Experts:
    """Return the modules of experts.

    Raises:
        UsageError: there are none, or several in a layer, or several lists of layers have some.
    """
    found: dict[tuple[str, str], Experts] = {}
    for name, module in model.named_modules():
        place = INSIDE.fullmatch(name)
        if place is not None and _has_stacks(module):
            found.setdefault((place[1], place[3]), Experts(place[1], place[3], module, int(place[2])))
    if not found:
        raise UsageError(
            f"{where}: transformers' {type(model).__name__}: expected a module of experts in numbered layers, with "
            "gate_up_proj or up_proj and down_proj of three dimensions, found none"
        )
    if len(found) > 1:
        places = " and ".join(f"{stack}.N.{inside}" for stack, inside in found)
        raise UsageError(
            f"{where}: transformers' {type(model).__name__}: expected one module of experts per layer, found {places}"
        )
    experts = next(iter(found.values()))
    shapes = {name: list(it.shape) for name, it in experts.module.named_parameters(recurse=False)}
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise UsageError(
            f"{where}: {experts.stack}.{experts.index}.{experts.inside}: transformers' "
            f"{type(experts.module).__name__}: expected tensors of as many experts, found "
            f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
        )
    return experts


def _has_stacks(module: torch.nn.Module) -> bool:
    """Tell whether a module holds the matrices of experts: two or more stacks of matrices."""
    return sum(it.ndim == 3 for it in module.parameters(recurse=False)) > 1


def _find_router(model: Any, experts: Experts, where: str) -> str:
    """Return the name of the router's weight within a layer.

    It is searched in the experts' block, then around it: in some models the block is the layer itself.

    Raises:
        UsageError: there is none, or there are several.
    """
    layer = model.get_submodule(f"{experts.stack}.{experts.index}")
    blocks = experts.inside.split(".")[:-1]
    candidates: list[str] = []
    for end in range(len(blocks), -1, -1):
        block = ".".join(blocks[:end])
        candidates = list(_rows_per_expert(layer, block, experts))
        if candidates:
            break
    if len(candidates) == 1:
        return candidates[0]
    raise UsageError(
        f"{where}: transformers' {type(model).__name__}: expected one router of shape [{experts.count}, "
        f"{experts.hidden}] beside {experts.inside}, found {' and '.join(candidates) or 'none'}"
    )


def _rows_per_expert(layer: torch.nn.Module, block: str, experts: Experts) -> Iterator[str]:
    """Yield the names of weights with a row per expert in a block.

    A part of the block that also maps back to the hidden size is a shared expert or an attention, however many
    neurons it has.
    """
    dot = f"{block}." if block else ""
    for child, module in layer.get_submodule(block).named_children():
        shapes = {name: tuple(it.shape) for name, it in module.named_parameters()}
        back = any(len(shape) == 2 and shape[0] == experts.hidden for shape in shapes.values())
        if f"{dot}{child}" == experts.inside or (back and experts.count != experts.hidden):
            continue
        yield from (
            f"{dot}{child}.{name}" for name, shape in shapes.items() if shape == (experts.count, experts.hidden)
        )


def _storage(experts: Experts, names: SavedNames, where: str) -> tuple[str, Projections, Fused | None]:
    """Return the experts' prefix on disk, their projections, and the fused tensors; None where each has its own.

    Raises:
        UsageError: transformers stores them in another way.
    """
    gate_up = names.saved[f"{experts.inside}.{experts.first}"]
    down = names.saved[f"{experts.inside}.down_proj"]
    if len(gate_up) == 1 and len(down) == 1 and len(next(iter(gate_up.values()))) == 3:
        return _fused(experts, next(iter(gate_up)), next(iter(down)))
    found = [EXPERT.fullmatch(name) for name in (*gate_up, *down)]
    places = dict.fromkeys((it[1], it[3]) for it in found if it is not None)
    prefixes, projections = {prefix for prefix, _ in places}, [projection for _, projection in places]
    wanted = 3 if experts.first == "gate_up_proj" else 2
    if None in found or len(prefixes) != 1 or len(projections) != wanted:
        raise UsageError(
            f"{where}: {experts.stack}.N.{experts.inside}: expected a matrix per expert on disk, or all in two "
            f"tensors, found {next(iter(gate_up))}"
        )
    up = projections[1] if wanted == 3 else None
    return prefixes.pop(), Projections(gate=projections[0], up=up, down=projections[-1]), None


def _fused(experts: Experts, gate_up: str, down: str) -> tuple[str, Projections, Fused]:
    own = (experts.first, "down_proj")
    parents = {name.rpartition(".")[0] for name in (gate_up, down)}
    leaves = tuple(name.rpartition(".")[2] for name in (gate_up, down))
    prefix = parents.pop() if len(parents) == 1 and leaves == own else experts.inside
    fused = Fused(
        gate_up=gate_up,
        down=down,
        transposed=bool(getattr(experts.module, "is_transposed", False)),
        interleaved=not getattr(experts.module, "is_concatenated", True),
    )
    return prefix, PROJECTIONS[experts.first], fused
