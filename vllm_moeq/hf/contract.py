"""What the experts of a transformers module compute, from the module itself: its parameters, attributes and code."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import CodeType
from typing import Any

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.hf.activations import recognize
from vllm_moeq.kernels import Activation
from vllm_moeq.kernels.activations import FUNCTIONS

MATRICES = ("gate_up_proj", "down_proj")
BIASES = ("gate_up_proj_bias", "down_proj_bias")
UNGATED = ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias")
"""The tensors of experts without a gate."""

INTEGRATION = "transformers.integrations.moe"
"""The module of transformers' default gate, act(gate)·up."""

COMPUTED: dict[str, tuple[Any, ...]] = {
    "has_gate": (True, False),
    "has_bias": (True, False),
    "is_concatenated": (True, False),
    "is_transposed": (True, False),
    "_is_expert_parallel": (False,),
}
"""What transformers' decorator of experts says of a class → the values with which its experts are computed here."""

HARMLESS = {
    "_is_hf_initialized": "a note that the parameters have values",
    "config": "only the constructor and the choice of an implementation read it",
    "num_experts": "a size, which the matrices have",
    "hidden_dim": "a size, which the matrices have",
    "hidden_size": "a size, which the matrices have",
    "intermediate_dim": "a size, which the matrices have",
    "intermediate_size": "a size, which the matrices have",
    "expert_dim": "a size, which the matrices have",
}
"""Attributes that change no result, and why."""

PLAIN = frozenset(vars(torch.nn.Module()))
"""Attributes that every module has."""


def require_stored(prefix: str, source: torch.nn.Module, marked: bool = True) -> None:
    """Refuse experts that store more, or otherwise, than two stacks of matrices with or without biases.

    Transformers marks the classes whose experts are down(gate(gate_up(x))) times the routing weight, whatever a class
    is called. A class without the marks may do anything. So may a tensor of the gate itself, which nobody would load.

    Args:
        prefix: where the experts are, for the message.
        source: transformers' module of experts.
        marked: whether the marks are required.

    Raises:
        UsageError: there is such a part; the message names it.
    """
    attributes = _attributes(source)
    for name, values in COMPUTED.items() if marked else ():
        if attributes.get(name) not in values:
            expected = " or ".join(map(str, values))
            raise refusal(prefix, source, name, expected, repr(attributes[name]) if name in attributes else "nothing")
    require_tensors(prefix, source, (*MATRICES, *BIASES) if is_gated(source) else UNGATED)
    for name, module in source.named_children():
        if name != "act_fn":
            raise refusal(prefix, source, name, "no module but act_fn", type(module).__name__)


def require_known(prefix: str, source: torch.nn.Module, marked: bool = True) -> None:
    """Refuse experts of which something would be left out.

    An attribute that is neither in the tables of this file nor read by the gate may change the result, unless it is
    a second name of a number that the gate reads.

    Args:
        prefix: where the experts are, for the message.
        source: transformers' module of experts.
        marked: see :func:`require_stored`.

    Raises:
        UsageError: there is such a part; the message names it.
    """
    require_stored(prefix, source, marked)
    attributes, numbers = _attributes(source), _numbers_of_gate(source)
    for name in sorted(set(attributes) - set(COMPUTED) - set(HARMLESS) - {"act_fn"} - _read_by_gate(source)):
        if attributes[name] is not None and attributes[name] is not False and attributes[name] not in numbers:
            raise refusal(prefix, source, name, "experts without it", f"{attributes[name]!r:.80}")


def require_tensors(prefix: str, source: torch.nn.Module, known: Collection[str]) -> None:
    """Refuse experts with a parameter or buffer of another name.

    Raises:
        UsageError: there is one; the message names the first.
    """
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        if name not in known:
            raise refusal(prefix, source, name, "no such tensor", f"one of {list(tensor.shape)}")


def require_computed(prefix: str, source: torch.nn.Module) -> Activation:
    """Return what experts compute between their projections; refuse those that our kernels cannot compute.

    Raises:
        UsageError: they compute something else; the message names the attribute.
    """
    require_known(prefix, source)
    found = activation_of(source)
    if found is not None:
        return found
    if is_gated(source) and not has_default_gate(source):
        attributes = _attributes(source)
        read = ", ".join(f"{it}={attributes[it]!r:.40}" for it in sorted(_read_by_gate(source) & set(attributes)))
        found_instead = f"one with {read}" if read else "another"
        raise refusal(prefix, source, "_apply_gate", f"{' or '.join(FUNCTIONS)} of the gate, times up", found_instead)
    act = _act(source)
    raise refusal(prefix, source, "act_fn", " or ".join(FUNCTIONS), getattr(act, "__name__", type(act).__name__))


def is_gated(source: torch.nn.Module) -> bool:
    """Tell whether the module's experts have a gate; transformers marks those that have none."""
    return _attributes(source).get("has_gate") is not False


def gate_of(source: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function between the projections of a marked module, on tensors in transformers' order."""
    gate: Callable[[torch.Tensor], torch.Tensor] = source._apply_gate if is_gated(source) else source.act_fn
    return gate


def activation_of(
    source: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor] | None = None, gated: bool | None = None
) -> Activation | None:
    """Return the kernels' activation that computes the same as a module's; None if there is none.

    Args:
        source: transformers' module of experts.
        function: see :func:`gate_of`; None takes that.
        gated: whether the function has a gate; None takes what the module says.
    """
    interleaved = _attributes(source).get("is_concatenated") is False
    return recognize(
        function or gate_of(source),
        is_gated(source) if gated is None else gated,
        interleaved,
        _numbers_of_gate(source),
    )


def has_default_gate(source: torch.nn.Module) -> bool:
    """Tell whether the module's gate is transformers' own, act_fn(gate)·up."""
    return getattr(getattr(type(source), "_apply_gate", None), "__module__", None) == INTEGRATION


def _act(source: torch.nn.Module) -> object:
    return vars(source).get("act_fn", source._modules.get("act_fn"))


def _numbers_of_gate(source: torch.nn.Module) -> list[float]:
    """Return the numbers that a class's own gate reads from the module."""
    if has_default_gate(source):
        return []
    attributes = _attributes(source)
    values = (attributes[name] for name in sorted(_read_by_gate(source) & set(attributes)))
    return [float(value) for value in values if type(value) in (int, float)]


def refusal(prefix: str, source: torch.nn.Module, name: str, expected: str, found: str) -> UsageError:
    """Return the error for an attribute of transformers' experts that is not as it has to be."""
    return UsageError(f"{prefix}: transformers' {type(source).__name__}.{name}: expected {expected}, found {found}")


def _attributes(source: torch.nn.Module) -> dict[str, Any]:
    """Return the values that a module has, its own before those of its classes, without methods and torch's own."""
    kinds = type(source).__mro__[: type(source).__mro__.index(torch.nn.Module)]
    found: dict[str, Any] = {}
    for kind in reversed(kinds):
        values = ((name, value) for name, value in vars(kind).items() if not name.startswith("__"))
        found.update((name, value) for name, value in values if not hasattr(value, "__get__"))
    return found | {name: value for name, value in vars(source).items() if name not in PLAIN}


def _read_by_gate(source: torch.nn.Module) -> set[str]:
    """Return what the class's gate reads, among it attributes: transformers' own code computes with them."""
    gate = getattr(type(source), "_apply_gate", None)
    return set() if gate is None else set(_names(gate.__code__))


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function reads, with those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
