"""The seam of all encodings: how the values of a stored matrix are read, given the tensors that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

VALUES = "values"
"""The role of the tensor that holds the values or codes."""

Parts = Mapping[str, torch.Tensor]
"""Role → the tensor that the file holds in this role for one matrix."""


class UnreadableError(ValueError):
    """Values that no file of an encoding holds.

    Attributes:
        role: the role of the tensor that holds them.
    """

    def __init__(self, role: str, expected: str, found: object) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.role = role


@dataclass(frozen=True, slots=True)
class Codec:
    """A way of storing one matrix. This base class stores the values unchanged.

    Attributes:
        dtype: dtype of the decoded values; None for the file's.
        shared: roles of the tensors that all matrices of a stored stack share.
        exchanged: whether the stored tensor's last two dimensions are exchanged.
    """

    dtype: torch.dtype | None = None
    shared: frozenset[str] = frozenset()
    exchanged: bool = False

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """Return the rows ``first``, ``first + step``, … below ``last``; encoded ones as float32.

        Raises:
            UnreadableError: a part holds values that cannot be decoded.
        """
        values = parts[VALUES]
        return (values.mT if self.exchanged else values)[first:last:step]

    def turned(self) -> Codec | None:
        """Return the codec that reads the matrices transposed, or None if the encoding cannot be read so."""
        return replace(self, exchanged=True)


PLAIN = Codec()
