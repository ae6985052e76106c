"""Layers that return, read or share more than hidden states."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from planner.calibration.reading.boundary import FORMS, LayerStub, in_any_form, same
from vllm_moeq.format import UsageError

HIDDEN = torch.arange(24.0).reshape(2, 3, 4)


def whole(output: Any) -> torch.Tensor:
    return output + 0


def first(output: Any) -> torch.Tensor:
    return output[0] + 0


def pair(output: Any) -> torch.Tensor:
    hidden, _ = output
    return hidden + 0


def triple(output: Any) -> torch.Tensor:
    hidden, _, _ = output
    return hidden + 0


@pytest.mark.parametrize("take", [whole, first, pair, triple])
def test_a_model_gets_hidden_states_in_the_form_that_it_takes(take: Callable[[Any], torch.Tensor]) -> None:
    """Two sequences must not be taken for the two parts of a tuple."""

    def run(form: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        stub = LayerStub(torch.nn.Identity(), form)
        return take(stub(HIDDEN, position_ids=None))

    found = in_any_form(run)
    assert torch.equal(found, HIDDEN)
    assert type(found) is torch.Tensor


def test_another_error_of_the_model_is_not_hidden() -> None:
    def run(_form: Callable[[torch.Tensor], Any]) -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        in_any_form(run)


def test_a_stub_notes_its_arguments_and_has_the_layers_attributes() -> None:
    layer = torch.nn.Identity()
    layer.block_type = "mamba"  # type: ignore[assignment]
    stub = LayerStub(layer, FORMS[0])
    stub(HIDDEN, 3, mask=None)
    assert stub.block_type == "mamba"
    assert (stub.positional, stub.named) == ((3,), {"mask": None})
    assert not list(stub.parameters())
    with pytest.raises(AttributeError):
        stub.nothing  # noqa: B018


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_layers_may_write_for_later_layers_but_not_read(kind: Callable[[], Any]) -> None:
    stub = LayerStub(torch.nn.Identity(), FORMS[0])
    stub(HIDDEN, shared=kind())
    stub.named["shared"]["keys"] = HIDDEN
    with pytest.raises(UsageError, match=r"its layers read what earlier layers computed \(keys\)"):
        stub.named["shared"]["keys"]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (HIDDEN, HIDDEN + 0, True),
        (HIDDEN, HIDDEN + 1, False),
        ((HIDDEN, None), [HIDDEN, None], True),
        ((HIDDEN,), (HIDDEN, None), False),
        ({"a": HIDDEN}, {"a": HIDDEN + 1}, False),
        ({"a": HIDDEN}, {"b": HIDDEN}, False),
        (None, HIDDEN, False),
        (None, None, True),
    ],
)
def test_arguments_are_compared_by_value(one: Any, other: Any, equal: bool) -> None:
    assert same(one, other) is equal
