"""The table of schemes: every way of storing an expert matrix that checkpoints may use.

A new scheme is a file beside this one with a :class:`Scheme`, and a row of :data:`SCHEMES`. The kernels that can
compute from it say so in ``vllm_moeq/kernels/backends.py``.
"""

from vllm_moeq.format.schemes.base import ExpertMatrix, Scheme, Span, TensorLayout, check_finite
from vllm_moeq.format.schemes.grid import GRID

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (GRID,)}

__all__ = ["GRID", "SCHEMES", "ExpertMatrix", "Scheme", "Span", "TensorLayout", "check_finite"]
