"""A row of the table of encodings: by which names and dtypes it is known, and how a weight gets its codec."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from planner.model.codecs.codec import VALUES, Codec
from planner.model.codecs.settings import Settings
from vllm_moeq.format import CheckpointError, TensorInfo
from vllm_moeq.format.tensors import Tensors

WEIGHT = ".weight"


def stored_name(weight: str, suffix: str) -> str:
    """Return the name of a tensor of a weight: a suffix with a dot takes the place of ``.weight``."""
    return weight.removesuffix(WEIGHT) + suffix if suffix.startswith(".") else weight + suffix


@dataclass(frozen=True, slots=True)
class Stored:
    """The headers of the tensors that together hold a weight.

    Attributes:
        files: the stored tensors.
        weight: the weight's name.
        names: role → name of the stored tensor.
    """

    files: Tensors
    weight: str
    names: Mapping[str, str]

    def info(self, role: str) -> TensorInfo:
        """Return the header of a tensor."""
        return self.files.info(self.names[role])

    def refuse(self, role: str, expected: str) -> NoReturn:
        """Refuse a tensor for its header.

        Raises:
            CheckpointError: always.
        """
        info, shown = self.info(role), str(self.info(role).dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{self.files.place(self.names[role])}: expected {expected}, found {shown} {list(info.shape)}"
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """A weight's codec, and the shape of the decoded weight: [outputs, inputs], or a stack of such."""

    codec: Codec
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoding:
    """One way in which files hold a weight.

    Attributes:
        values: suffix of the tensor that holds the values or codes, see :func:`stored_name`; empty if that tensor has
            the weight's own name.
        dtypes: dtypes of the values.
        bind: returns a weight's codec and shape, from headers alone.
        needed: role → suffixes of which one must be there.
        optional: the same of tensors that a weight may lack.
    """

    values: str
    dtypes: tuple[torch.dtype, ...]
    bind: Callable[[Stored, Settings], Bound]
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def weight_of(self, name: str) -> str | None:
        """Return the name of the weight whose values a stored tensor may hold, or None by its name alone."""
        if not name.endswith(self.values):
            return None
        base = name.removesuffix(self.values)
        return base + WEIGHT if self.values.startswith(".") else base

    def missing(self, weight: str, known: Container[str]) -> str | None:
        """Return the name of a tensor that a weight needs and the file lacks, or None."""
        for suffixes in self.needed.values():
            names = [stored_name(weight, suffix) for suffix in suffixes]
            if not any(name in known for name in names):
                return names[0]
        return None

    def gather(self, weight: str, files: Tensors) -> Stored:
        """Return the headers of a weight's tensors, none of which are missing.

        Raises:
            CheckpointError: the file has two tensors for one role.
        """
        names = {VALUES: stored_name(weight, self.values)}
        for role, suffixes in (*self.needed.items(), *self.optional.items()):
            found = [name for suffix in suffixes if (name := stored_name(weight, suffix)) in files.tensors]
            if len(found) > 1:
                raise CheckpointError(f"{files.place(found[1])}: expected one of it and {found[0]}, found both")
            if found:
                names[role] = found[0]
        return Stored(files, weight, names)
