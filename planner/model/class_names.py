"""The names on disk of what is inside a layer of transformers' class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_moeq.completeness import saved
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class SavedNames:
    """The tensors of a layer: those of all layers together, where layers differ.

    Attributes:
        stack: name on disk of the list of layers.
        saved: name in a layer of the class → (name in a layer on disk → shape): several where the file splits it.
        plain: names in a layer of the class of matrices that are no linear's weight.
    """

    stack: str
    saved: Mapping[str, Mapping[str, tuple[int, ...]]]
    plain: frozenset[str]

    @classmethod
    def of(cls, model: Any, stack: str, where: str) -> SavedNames:
        """Return the names of a list of layers of transformers' model.

        Args:
            model: transformers' model.
            stack: name of the list in the model.
            where: the model's config.json, for messages.

        Raises:
            UsageError: a file has layers under several names.
        """
        state = model.state_dict(keep_vars=True)
        stacks: dict[str, None] = {}
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        plain = set()
        for name, tensor in state.items():
            inside = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", name)
            if inside is None or inside[2] in found:
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            if tensor.ndim == 2 and not isinstance(owner, torch.nn.Linear):
                plain.add(inside[2])
            parts = {}
            for stored, value in saved(model, {name: tensor.detach()}).items():
                place = re.fullmatch(rf"(.*?)\.?\b{inside[1]}\.(.+)", stored)
                if place is None:
                    raise UsageError(f"{where}: {name}: expected a layer's number in its name on disk, found {stored}")
                stacks[place[1]] = None
                parts[place[2]] = tuple(value.shape)
            found[inside[2]] = parts
        if len(stacks) != 1:
            raise UsageError(f"{where}: {stack}: expected one list of layers on disk, found {' and '.join(stacks)}")
        return cls(next(iter(stacks)), found, frozenset(plain))

    def one(self, name: str) -> str:
        """Return the name on disk of a tensor that the file does not split."""
        return next(iter(self.saved[name]))

    def kept(self, router: str) -> tuple[str, ...]:
        """Return the endings of names on disk of matrices that are no linear's weight, besides the router's."""
        names = (stored for name in sorted(self.plain - {router}) for stored in self.saved[name])
        return tuple(f".{stored}" for stored in names if stored.endswith(".weight"))

    def renamed(self, experts: str, prefix: str) -> tuple[tuple[str, str], ...]:
        """Return pairs (name in the class, name on disk) of modules and tensors whose names differ.

        Args:
            experts: name of the module of experts in the class.
            prefix: prefix of its tensors on disk.
        """
        pairs = {} if experts == prefix else {experts: prefix}
        single = {name: next(iter(parts)) for name, parts in self.saved.items() if len(parts) == 1}
        moved = {name: stored for name, stored in single.items() if not name.startswith(f"{experts}.")}
        for name, stored in moved.items():
            (parent, _, leaf), (new_parent, _, new_leaf) = name.rpartition("."), stored.rpartition(".")
            if name == stored:
                continue
            together = leaf == new_leaf and all(
                other.startswith(f"{parent}.") == moved[other].startswith(f"{new_parent}.") for other in moved
            )
            pairs.update({parent: new_parent} if together else {name: stored})
        # The longest names first: the first that fits counts.
        return tuple(sorted(pairs.items(), key=lambda pair: -len(pair[0])))
