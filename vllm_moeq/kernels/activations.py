"""What experts compute between their projections: one table of functions, and how gate and up are joined."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Function = Callable[[torch.Tensor, float], torch.Tensor]


def _silu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.nn.functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def _gelu_tanh(x: torch.Tensor, _alpha: float) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor, _alpha: float) -> torch.Tensor:
    return torch.relu(x).square()


FUNCTIONS: dict[str, Function] = {"silu": _silu, "gelu_tanh": _gelu_tanh, "relu2": _relu2}
"""Name → the function of the gate, or of up where there is no gate. Kernels number them in this order."""


@dataclass(frozen=True)
class Activation:
    """What experts compute from the outputs of their first projection.

    With a gate that is function(min(gate, limit)) · (clamp(up, −limit, limit) + beta), without one function(up).

    Attributes:
        function: a key of :data:`FUNCTIONS`.
        gated: whether the first projection has gate's rows, then as many of up's; otherwise it has up's alone.
        alpha: the factor inside of SiLU's sigmoid; other functions ignore it.
        limit: the bound of gate and up; infinite for none.
        beta: what is added to up.
    """

    function: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    beta: float = 0.0

    def __call__(self, first: torch.Tensor) -> torch.Tensor:
        """Return the inputs of down [..., intermediate].

        Args:
            first: outputs of the first projection: gate and then up [..., 2·intermediate], or up alone.
        """
        function = FUNCTIONS[self.function]
        if not self.gated:
            return function(first, self.alpha)
        gate, up = first.chunk(2, dim=-1)
        if math.isfinite(self.limit):
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return function(gate, self.alpha) * (up + self.beta)

    def __str__(self) -> str:
        """Return a description in a few words."""
        if not self.gated:
            return f"{self.function} without a gate"
        usual = Activation(self.function)
        more = (f"{key}={value:g}" for key, value in vars(self).items() if value != vars(usual)[key])
        return " ".join((f"{self.function} with a gate", *more))

    @property
    def parts(self) -> int:
        """How many projections are stacked before the activation: gate and up, or up."""
        return 2 if self.gated else 1

    @property
    def number(self) -> int:
        """The function's place in :data:`FUNCTIONS`."""
        return list(FUNCTIONS).index(self.function)

    def numbers(self) -> list[float]:
        """Return all attributes as numbers, the arguments of an operator; :meth:`of` reads them."""
        return [float(self.number), float(self.gated), self.alpha, self.limit, self.beta]

    @classmethod
    def of(cls, numbers: list[float]) -> Activation:
        """Return the activation of some :meth:`numbers`."""
        number, gated, alpha, limit, beta = numbers
        return cls(list(FUNCTIONS)[int(number)], bool(gated), alpha, limit, beta)


SILU = Activation()
"""silu(gate)·up, which nearly all models compute."""
