"""The contract of a scheme, which is one way of storing an expert matrix, and a matrix that is stored by one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.packing import BIT_WIDTHS, WHOLE_ROW
from vllm_moeq.format.tensors import Tensors

Span = tuple[int, int]
"""The first of some rows or columns, and one behind the last."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a stored matrix.

    Attributes:
        dtypes: the dtypes that a file may use, all of one size.
        shape: its sizes. The first dimension runs along the output neurons, so that two matrices with the same inputs
            are stacked by stacking their tensors.
    """

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtypes[0].itemsize


class Scheme(ABC):
    """One way of storing an expert matrix; an object without state.

    Sizes are those of the matrix [rows, columns]: rows are output neurons, columns inputs. ``bits`` is the expert's
    width, ``group_size`` the checkpoint's weights per scale or −1, which a scheme without scales ignores.

    Attributes:
        name: how the table and messages call it.
        suffixes: the last part of its tensors' names, the codes first; no other scheme has the same codes.
        checked: the suffixes of tensors that may hold impossible values; any value of the others is possible.
        widths: the widths that it has.
        row_step: a rank's rows begin and end at multiples of this.
        column_step: the same for its columns.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    checked: ClassVar[tuple[str, ...]] = ()
    widths: ClassVar[tuple[int, ...]] = BIT_WIDTHS
    row_step: ClassVar[int] = 1
    column_step: ClassVar[int] = 1

    @property
    def codes(self) -> str:
        """The suffix of the codes, the one tensor whose size may depend on the width."""
        return self.suffixes[0]

    @abstractmethod
    def layout(
        self, rows: int, columns: int, bits: int, group_size: int, group_offset: int = 0
    ) -> dict[str, TensorLayout]:
        """Return the tensors of a matrix, or of a rank's part of one, by suffix.

        Args:
            rows: output neurons, a multiple of ``row_step``.
            columns: inputs, a multiple of ``column_step``.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.
            group_offset: the position of the part's first column within its group.
        """

    def nbytes(self, rows: int, columns: int, bits: int, group_size: int) -> int:
        """Return the exact bytes of a matrix's tensors in a file; see :meth:`layout`."""
        return sum(tensor.nbytes for tensor in self.layout(rows, columns, bits, group_size).values())

    @abstractmethod
    def read_shape(self, shards: Tensors, base: str, bits: int, group_size: int) -> tuple[int, int]:
        """Find rows and columns of a matrix from the headers of its tensors.

        Args:
            shards: the checkpoint's tensors.
            base: the name of the matrix; its tensors are called ``<base>.<suffix>``.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.

        Raises:
            CheckpointError: the tensor that is missing or from which no shape follows. What remains,
                :meth:`read_matrix` finds by comparing every tensor with :meth:`layout`.
        """

    def read_matrix(
        self, shards: Tensors, prefix: str, expert: int, projection: str, bits: int, group_size: int
    ) -> ExpertMatrix:
        """Check the headers of one matrix's tensors; see :meth:`read_shape`.

        Raises:
            CheckpointError: the first tensor that is missing, or of another dtype or shape than the width implies.
        """
        base = f"{prefix}.{expert}.{projection}"
        if bits not in self.widths:
            raise CheckpointError(
                f"{shards.folder}: {base}: expected one of {', '.join(map(str, self.widths))} bits for the scheme "
                f"{self.name}, found {bits}"
            )
        rows, columns = self.read_shape(shards, base, bits, group_size)
        for suffix, tensor in self.layout(rows, columns, bits, group_size).items():
            info = shards.info(f"{base}.{suffix}")
            if info.dtype not in tensor.dtypes or info.shape != tensor.shape:
                raise CheckpointError(
                    f"{shards.place(f'{base}.{suffix}')}: expected {' or '.join(map(str, tensor.dtypes))} "
                    f"{list(tensor.shape)} for {bits} bits, found {info.dtype} {list(info.shape)}"
                )
        return ExpertMatrix(prefix, expert, projection, bits, rows, columns, group_size, self)

    def check_values(self, values: torch.Tensor, suffix: str, place: str) -> None:  # noqa: ARG002 (for other schemes)
        """Check the values of one tensor, or of a part of it.

        Args:
            values: any float dtype and shape.
            suffix: one of ``checked``.
            place: file and tensor, as the message names them.

        Raises:
            CheckpointError: an impossible value; unless a scheme knows more, one that is NaN or infinite.
        """
        check_finite(values, place)

    @abstractmethod
    def cut(
        self, suffix: str, bits: int, group_size: int, *, rows: Span | None = None, columns: Span | None = None
    ) -> tuple[slice, ...]:
        """Return the index of what a rank needs of a tensor.

        Args:
            suffix: one of ``suffixes``.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.
            rows: the rank's output neurons, multiples of ``row_step``; None: all.
            columns: the rank's inputs, multiples of ``column_step``; None: all. They may begin inside a group.
        """

    @abstractmethod
    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, group_offset: int = 0
    ) -> torch.Tensor:
        """Return the weights of a matrix, or of a rank's part of one.

        Args:
            tensors: its tensors by suffix; their values may have been widened to float32.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.
            group_offset: the position of the part's first column within its group.

        Returns:
            float32 [rows, columns].
        """


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert as the file holds it.

    Attributes:
        prefix: the layer's name in the checkpoint.
        expert: index within the layer.
        projection: the matrix's name in the checkpoint.
        bits: the expert's width.
        rows: output neurons.
        columns: inputs.
        group_size: weights per scale, or −1.
        scheme: how it is stored.
    """

    prefix: str
    expert: int
    projection: str
    bits: int
    rows: int
    columns: int
    group_size: int
    scheme: Scheme

    def name(self, suffix: str) -> str:
        """Return the checkpoint name of one of its tensors."""
        return f"{self.prefix}.{self.expert}.{self.projection}.{suffix}"

    def names(self) -> tuple[str, ...]:
        """Return the checkpoint names of all its tensors, the codes first."""
        return tuple(map(self.name, self.scheme.suffixes))

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """Scales per row, in a scheme that has them."""
        return 1 if self.group_size == WHOLE_ROW else self.columns // self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the file."""
        return self.scheme.nbytes(self.rows, self.columns, self.bits, self.group_size)

    def dequantize(self, shards: Tensors) -> torch.Tensor:
        """Read the matrix.

        Args:
            shards: the checkpoint's tensors.

        Returns:
            float32 [rows, columns].
        """
        tensors = {suffix: shards.load(self.name(suffix)) for suffix in self.scheme.suffixes}
        return self.scheme.dequantize(tensors, self.bits, self.group_size)


def check_finite(values: torch.Tensor, place: str) -> None:
    """Refuse values that no weight can be computed from.

    Args:
        values: any float dtype and shape.
        place: file and tensor, as the message names them.

    Raises:
        CheckpointError: a value that is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{place}: expected finite values, found NaN or infinity")
