"""Headers and values of any kind: an encoded source is read, or refused by an error that names a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.model.codecs import find_encoded
from planner.model.matrix import Matrix
from tests.encoded.forms import FORMS, Tensors
from tests.encoded.memory import Memory
from tests.planner.model.codecs.test_forms import settings_of, weights
from vllm_moeq.format import MoeqError

DTYPES = (
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float64,
)  # fmt: skip

SMALL = {name: form.encode(weights(128, 128)) for name, form in FORMS.items()}


def _cut(tensor: torch.Tensor, draw: st.DataObject) -> torch.Tensor:
    axis = draw.draw(st.integers(0, max(0, tensor.ndim - 1)))
    return tensor.narrow(axis, 0, draw.draw(st.integers(1, tensor.shape[axis]))) if tensor.ndim else tensor


def _repeat(tensor: torch.Tensor, draw: st.DataObject) -> torch.Tensor:
    return torch.cat([tensor] * 2, dim=draw.draw(st.integers(0, tensor.ndim - 1))) if tensor.ndim else tensor


def _shape(tensor: torch.Tensor, draw: st.DataObject) -> torch.Tensor:
    count = tensor.numel()
    shapes = [(count,), (1, count), (count, 1), (1, *tensor.shape), (*tensor.shape, 1), tensor.shape[::-1]]
    return tensor.reshape(draw.draw(st.sampled_from(shapes)))


def _dtype(tensor: torch.Tensor, draw: st.DataObject) -> torch.Tensor:
    dtype = draw.draw(st.sampled_from(DTYPES))
    wide = tensor.float() if dtype.is_floating_point else tensor
    return wide.to(torch.float32).to(dtype) if tensor.dtype.itemsize == 1 and dtype is torch.bool else wide.to(dtype)


def _bytes(tensor: torch.Tensor, draw: st.DataObject) -> torch.Tensor:
    count = tensor.numel() * tensor.dtype.itemsize
    noise = torch.randint(256, (count,), generator=torch.Generator().manual_seed(draw.draw(st.integers(0, 99))))
    return noise.to(torch.uint8).view(tensor.dtype).view(tensor.shape)


CHANGES: tuple[Callable[[torch.Tensor, st.DataObject], torch.Tensor], ...] = (_cut, _repeat, _shape, _dtype, _bytes)


def damage(tensors: Tensors, draw: st.DataObject) -> Tensors:
    """Change one or two tensors, or take one away."""
    found = {f"m.{suffix}": tensor for suffix, tensor in tensors.items()}
    for name in draw.draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=2)):
        change = draw.draw(st.sampled_from([*CHANGES, None]))
        if change is None:
            found.pop(name, None)
        elif name in found:
            found[name] = change(found[name], draw).contiguous()
    return found


def read(files: Memory, name: str) -> str | None:
    """Read all weights; return the error of a source that is refused."""
    try:
        for weight in find_encoded(files, settings_of(FORMS[name])).weights.values():
            stack, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
            matrix = Matrix(weight.codec, weight.parts, rows, columns, 0 if stack else None)
            assert matrix.read(files, 0, rows).shape == (rows, columns)
            assert matrix.read(files, rows - 1, rows).shape == (1, columns)
    except MoeqError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FORMS)
@settings(deadline=None, max_examples=30)
@given(draw=st.data())
def test_is_read_or_refused(name: str, draw: st.DataObject) -> None:
    error = read(Memory(damage(SMALL[name], draw)), name)
    assert error is None or "\n" not in error
    assert error is None or "tensor m." in error or error.startswith("folder/config.json: config_groups: ")
