"""The interface of a scheme (a way of storing an expert matrix), and a matrix stored by a scheme."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_moeq.format.errors import CheckpointError
from vllm_moeq.format.packing import BIT_WIDTHS, WHOLE_ROW
from vllm_moeq.format.rotation import Rotated
from vllm_moeq.format.tensors import Tensors

Span = tuple[int, int]
"""A range of rows or columns: the first, and one behind the last."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """One tensor of a stored matrix.

    Attributes:
        dtypes: the dtypes that a file may use; all have the same size.
        shape: the tensor's shape. The first dimension runs along the output neurons, so that two matrices with the
            same inputs are stacked by stacking their tensors.
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

    A matrix is [rows, columns]: rows are output neurons, columns are inputs. ``bits`` is the expert's width.
    ``group_size`` is the checkpoint's number of weights per scale, or −1; a scheme without scales ignores it.

    Attributes:
        name: the scheme's name in the table and in messages.
        suffixes: the last parts of its tensors' names, the codes first. No other scheme has the same suffix for codes.
        checked: the suffixes of the tensors that may hold invalid values; in the others every value is valid.
        widths: the widths in bits that it supports.
        row_step: the rows of a rank begin and end at multiples of this.
        column_step: the columns of a rank begin and end at multiples of this.
        grouped: whether a row has a scale per group, so that ``group_size`` means something.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    checked: ClassVar[tuple[str, ...]] = ()
    widths: ClassVar[tuple[int, ...]] = BIT_WIDTHS
    row_step: ClassVar[int] = 1
    column_step: ClassVar[int] = 1
    grouped: ClassVar[bool] = True

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same scheme, maybe unpickled in another process."""
        return isinstance(other, Scheme) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def codes(self) -> str:
        """The suffix of the codes, the only tensor whose size may depend on the width."""
        return self.suffixes[0]

    @abstractmethod
    def layout(
        self, rows: int, columns: int, bits: int, group_size: int, group_offset: int = 0
    ) -> dict[str, TensorLayout]:
        """Return the tensors of a matrix, or of a rank's part of it, by suffix.

        Args:
            rows: output neurons, a multiple of ``row_step``.
            columns: inputs, a multiple of ``column_step``.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.
            group_offset: the position of the part's first column within its group.
        """

    def nbytes(self, rows: int, columns: int, bits: int, group_size: int) -> int:
        """Return the exact number of bytes of a matrix's tensors in a file; see :meth:`layout`."""
        return sum(tensor.nbytes for tensor in self.layout(rows, columns, bits, group_size).values())

    @abstractmethod
    def read_shape(self, shards: Tensors, base: str, bits: int, group_size: int) -> tuple[int, int]:
        """Return the rows and columns of a matrix, from the headers of its tensors.

        Args:
            shards: the checkpoint's tensors.
            base: the name of the matrix; its tensors are called ``<base>.<suffix>``.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.

        Raises:
            CheckpointError: a tensor is missing, or no shape follows from it. :meth:`read_matrix` finds the other
                mistakes.
        """

    def read_matrix(
        self, shards: Tensors, prefix: str, expert: int, projection: str, bits: int, group_size: int
    ) -> ExpertMatrix:
        """Check the headers of one matrix's tensors; see :meth:`read_shape`.

        Raises:
            CheckpointError: the scheme does not have this width, or a tensor is missing or does not fit it.
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
            place: the file and the tensor, as the message names them.

        Raises:
            CheckpointError: a value is NaN or infinite. A scheme may refuse further values.
        """
        check_finite(values, place)

    @abstractmethod
    def cut(
        self, suffix: str, bits: int, group_size: int, *, rows: Span | None = None, columns: Span | None = None
    ) -> tuple[slice, ...]:
        """Return the index that selects a rank's part of a tensor.

        Args:
            suffix: one of ``suffixes``.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.
            rows: the rank's output neurons, multiples of ``row_step``; None selects all.
            columns: the rank's inputs, multiples of ``column_step``; None selects all. They may begin inside a group.
        """

    @abstractmethod
    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, group_offset: int = 0
    ) -> torch.Tensor:
        """Return the weights of a matrix, or of a rank's part of it.

        Args:
            tensors: the tensors by suffix; floating ones may have been widened to float32.
            bits: one of ``widths``.
            group_size: weights per scale, or −1.
            group_offset: the position of the part's first column within its group.

        Returns:
            The weights, float32 [rows, columns].
        """


@dataclass(frozen=True)
class ExpertMatrix:
    """One projection of one expert as the file holds it.

    Attributes:
        prefix: the layer's name in the checkpoint.
        expert: the expert's index within the layer.
        projection: the matrix's name in the checkpoint.
        bits: the expert's width.
        rows: output neurons.
        columns: inputs.
        group_size: weights per scale, or −1.
        scheme: how the matrix is stored.
        rotated: the rotation of its inputs in whose basis it is stored; None if it is not rotated.
    """

    prefix: str
    expert: int
    projection: str
    bits: int
    rows: int
    columns: int
    group_size: int
    scheme: Scheme
    rotated: Rotated | None = None

    def name(self, suffix: str) -> str:
        """Return the name in the checkpoint of the tensor with this suffix."""
        return f"{self.prefix}.{self.expert}.{self.projection}.{suffix}"

    def names(self) -> tuple[str, ...]:
        """Return the names in the checkpoint of all its tensors, the codes first, and its layer's signs last."""
        own = tuple(map(self.name, self.scheme.suffixes))
        return own if self.rotated is None else (*own, self.rotated.name)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """Scales per row, in a scheme with scales."""
        return 1 if self.group_size == WHOLE_ROW else self.columns // self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the file, without its layer's signs."""
        return self.scheme.nbytes(self.rows, self.columns, self.bits, self.group_size)

    def dequantize(self, shards: Tensors) -> torch.Tensor:
        """Read and dequantize the matrix, in the basis of the model.

        Args:
            shards: the checkpoint's tensors.

        Returns:
            The weights, float32 [rows, columns].
        """
        tensors = {suffix: shards.load(self.name(suffix)) for suffix in self.scheme.suffixes}
        weights = self.scheme.dequantize(tensors, self.bits, self.group_size)
        return weights if self.rotated is None else self.rotated.undo(weights, shards.load(self.rotated.name))


MAX_MAGNITUDE = 65504.0
"""The largest float of a checkpoint, float16's largest number: a model's are far below, and larger ones overflow."""


def check_finite(values: torch.Tensor, place: str, most: float = MAX_MAGNITUDE) -> None:
    """Refuse values that are not finite, or so large that a model's activations overflow.

    Args:
        values: any float dtype and shape.
        place: the file and the tensor, as the message names them.
        most: the largest magnitude.

    Raises:
        CheckpointError: a value is NaN or infinite, or larger.
    """
    if not values.numel():
        return
    wide = values if values.dtype.itemsize > 1 else values.float()  # torch cannot ask eight bits
    largest = max(abs(float(bound)) for bound in torch.aminmax(wide))
    if not math.isfinite(largest):
        raise CheckpointError(f"{place}: expected finite values, found NaN or infinity")
    if largest > most:
        raise CheckpointError(f"{place}: expected values up to {most:g}, found {largest:g}")
