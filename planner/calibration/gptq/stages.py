"""Find the linears of a layer that can be calibrated, in the order in which the layer calls them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from planner.calibration.reading.decoder import Decoder, LayerCall, StopReadingError

NEEDS_EXPERTS = "its inputs depend on the routed experts"
NOT_CALLED = "the layer does not call it as a linear"


class ConstantExperts(torch.nn.Module):
    """Stands in for the routed experts, whose outputs no linear before them needs.

    Attributes:
        value: all of its outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0

    def forward(self, hidden: torch.Tensor, _ids: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`planner.calibration.reading.decoder.Decoder.layer`."""
        return torch.full_like(hidden, self.value)


@dataclass(frozen=True)
class Stage:
    """Linears that read the same input.

    Attributes:
        modules: checkpoint name → module, in the order of the calls.
    """

    modules: dict[str, torch.nn.Linear]

    @contextmanager
    def reader(self, call: LayerCall) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield a function from a layer's input [sequences, length, hidden] to these linears' input [tokens, K].

        The layer runs no further than to the first of the linears.
        """
        seen: list[torch.Tensor] = []

        def stop(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen.append(arguments[0].flatten(0, -2))
            raise StopReadingError

        def read(hidden: torch.Tensor) -> torch.Tensor:
            with suppress(StopReadingError):
                call(hidden)
            return seen.pop()

        handle = next(iter(self.modules.values())).register_forward_pre_hook(stop)
        try:
            yield read
        finally:
            handle.remove()


@dataclass(frozen=True)
class Stages:
    """The stages of a layer.

    Attributes:
        stages: in the order of the calls.
        missed: checkpoint name → reason why the linear cannot be calibrated.
    """

    stages: tuple[Stage, ...]
    missed: dict[str, str] = field(default_factory=dict)


def find_stages(
    decoder: Decoder,
    index: int,
    names: Collection[str],
    call: LayerCall,
    experts: ConstantExperts,
    hidden: torch.Tensor,
) -> Stages:
    """Run a layer once, and return the stages of some of its linears.

    Args:
        decoder: the model.
        index: the layer's index.
        names: checkpoint names of the linears.
        call: runs the layer.
        experts: stands in for its routed experts.
        hidden: an input of the layer [sequences, length, hidden].
    """
    modules = {
        name: module
        for path, module in decoder.layers[index].named_modules()
        if isinstance(module, torch.nn.Linear)
        and (name := decoder.row.checkpoint_name(index, f"{path}.weight")) in names
    }
    inputs: dict[str, torch.Tensor] = {}
    with _noting(modules, inputs):
        experts.value = float("nan")
        try:
            call(hidden)
        finally:
            experts.value = 0.0
    clean = bool(torch.isfinite(hidden).all())
    missed = {name: NOT_CALLED for name in names if name not in inputs}
    found: list[tuple[torch.Tensor, dict[str, torch.nn.Linear]]] = []
    for name, value in inputs.items():
        if clean and bool(torch.isnan(value).any()):
            missed[name] = NEEDS_EXPERTS
            continue
        for known, together in found:
            if known.data_ptr() == value.data_ptr() and known.shape == value.shape:
                together[name] = modules[name]
                break
        else:
            found.append((value, {name: modules[name]}))
    return Stages(tuple(Stage(together) for _, together in found), missed)


@contextmanager
def _noting(modules: Mapping[str, torch.nn.Linear], inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Note each module's input at its first call. The tensors are kept, so that no two share their memory by chance."""

    def note(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs.setdefault(name, arguments[0])

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
