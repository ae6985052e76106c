"""The kinds of values in a ``quantization_config`` and in plans, with their bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from vllm_moeq.format.packing import BIT_WIDTHS, CODES_PER_BLOCK

MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_NAMES = 100_000
MAX_LINEARS = 16 * MAX_LAYERS

Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected a text that can be printed")
    return text


Line = Annotated[str, Field(max_length=64), AfterValidator(_printable)]


def _integer(value: Any) -> Any:
    """Refuse ``true`` and 3.0, which Python takes for equal to integers."""
    if type(value) is not int:
        raise ValueError("Input should be an integer")
    return value


Integer = BeforeValidator(_integer)
if TYPE_CHECKING:
    Bits = int
else:
    Bits = Annotated[Literal[BIT_WIDTHS], Integer]
LinearBits = Annotated[Literal[4, 8, 16], Integer]
"""Width of a linear outside the experts; 16 stands for the source's own values."""
Average = Annotated[float, Field(ge=min(BIT_WIDTHS), le=max(BIT_WIDTHS))]
Widths = Annotated[list[Bits], Field(fail_fast=True, min_length=1, max_length=MAX_EXPERTS)]
"""One width per expert. Only the first mistake is reported, because a list of four million would fill the memory."""
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_EXPERTS)]], Field(fail_fast=True, max_length=MAX_EXPERTS)]
GroupSize = Annotated[
    Literal[-1] | Annotated[int, Field(ge=CODES_PER_BLOCK, le=1 << 20, multiple_of=CODES_PER_BLOCK)], Integer
]
"""Weights per scale along the input dimension; −1 means one group per row."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number of tokens, bytes or others. Python's integers have no end, and larger ones are no floats."""
RotationSize = Annotated[Literal[16, 32, 64, 128, 256], Integer]
SchemeNames = Annotated[
    list[Annotated[str, Field(max_length=64)]], Field(fail_fast=True, min_length=1, max_length=MAX_EXPERTS)
]
"""The name of each expert's scheme."""
Threshold = Annotated[float, Field(ge=0, le=1)]
"""A share of a token's largest routing weight; experts with less are skipped. 0 skips none."""


class Strict(BaseModel):
    """A model with no unknown keys, no silent conversions, no infinite numbers and no changes after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
