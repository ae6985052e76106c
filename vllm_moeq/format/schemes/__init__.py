"""The table of schemes: every way of storing an expert matrix that checkpoints may use.

To add a scheme, write a :class:`Scheme` in a file beside this one, add it to :data:`SCHEMES`, and name it in
``vllm_moeq/kernels/backends.py`` for each kernel that can compute from it; the reference can. A checkpoint uses it once
a format version says so (:meth:`MoeqConfig.scheme`).
"""

from vllm_moeq.format.schemes.base import ExpertMatrix, Scheme, Span, TensorLayout, check_finite
from vllm_moeq.format.schemes.grid import GRID
from vllm_moeq.format.schemes.trellis import TRELLIS_SCHEME

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (GRID, TRELLIS_SCHEME)}

__all__ = ["GRID", "SCHEMES", "TRELLIS_SCHEME", "ExpertMatrix", "Scheme", "Span", "TensorLayout", "check_finite"]
