"""What a model hands to its decoder layers and takes from them, whatever form it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from vllm_moeq.format import UsageError

FORMS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda hidden: hidden.as_subclass(_Whole),
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)
"""Forms in which a layer may return its hidden states, the usual one first."""


class _TakenApartError(Exception):
    """A model takes its layer's output apart, so that it is no tensor."""


class _Whole(torch.Tensor):
    """A tensor that a model must not take apart: the parts would be sequences."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch.nn.Parameter's

    def __iter__(self) -> Iterator[torch.Tensor]:
        raise _TakenApartError

    def __getitem__(self, key: Any) -> torch.Tensor:
        if isinstance(key, int):
            raise _TakenApartError
        return super().__getitem__(key)


class Shared(dict[Any, Any]):
    """Stands in for a dictionary in which layers leave tensors for later ones: they may write, but not read.

    Layers run one after the other over all batches, so that another batch's tensors would lie there.
    """

    def __getitem__(self, key: Any) -> Any:
        raise UsageError(f"its layers read what earlier layers computed ({key}); expected hidden states alone")


class LayerStub(torch.nn.Module):
    """Stands in for a decoder layer: it notes its arguments, and returns its input in one of :data:`FORMS`.

    Args:
        original: the layer, whose other attributes a model may read.
        form: how the output is returned.
    """

    def __init__(self, original: torch.nn.Module, form: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.__dict__["original"] = original  # no submodule: its weights are not this module's
        self.form = form
        self.hidden = torch.empty(0)
        self.positional: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, hidden: torch.Tensor, *positional: Any, **named: Any) -> Any:
        """Return the input."""
        self.hidden = hidden.as_subclass(torch.Tensor)
        self.positional = tuple(map(_closed, positional))
        self.named = {name: _closed(value) for name, value in named.items()}
        return self.form(self.hidden)


def _closed(value: Any) -> Any:
    """Return an argument; in place of a dictionary that a layer may write to, one that cannot be read."""
    return Shared() if isinstance(value, Mapping) and not value else value


def in_any_form(
    run: Callable[[Callable[[torch.Tensor], Any]], Any],
) -> Any:
    """Return the result of running a model whose layers are stubs, in the first form that it takes.

    Args:
        run: runs the model with stubs of a form.
    """
    for form in FORMS[:-1]:
        try:
            return run(form)
        except _TakenApartError:
            continue
        except ValueError as error:
            if "to unpack" not in str(error):
                raise
    return run(FORMS[-1])


def same(one: Any, other: Any) -> bool:
    """Tell whether two arguments of a layer are equal, tensors by their values."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other)
