"""A function fits on a screen and takes few arguments, so that a reader can hold it in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

LINES, PARAMETERS = 60, 12
KERNELS = ROOT / "vllm_moeq" / "kernels" / "triton"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    """Yield all functions of a module, also those inside of others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield node


def lines(function: Function) -> int:
    """Return the lines from ``def`` to the last one; decorators do not count, the docstring does."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameters(function: Function) -> int:
    """Return how many parameters there are, without ``self`` and ``cls``."""
    found = function.args
    every = [*found.posonlyargs, *found.args, *found.kwonlyargs, found.vararg, found.kwarg]
    return sum(1 for parameter in every if parameter is not None and parameter.arg not in ("self", "cls"))


def is_kernel(function: Function) -> bool:
    """Tell whether Triton compiles the function: pointers, strides and tile sizes are parameters there."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def too_large(source: str, kernels: bool = False) -> list[str]:
    """Return the functions that break a limit; bodies of kernels are left out where the folder has some."""
    return [
        f"{function.name}: {lines(function)} lines, {parameters(function)} parameters"
        for function in functions(source)
        if (lines(function) > LINES or parameters(function) > PARAMETERS) and not (kernels and is_kernel(function))
    ]


@pytest.mark.parametrize("package", ["planner", "vllm_moeq"])
def test_functions_are_small(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): large
        for path in sorted(Path(ROOT / package).rglob("*.py"))
        if (large := too_large(path.read_text(), path.is_relative_to(KERNELS)))
    }
    assert not found


def test_the_test_sees_large_functions() -> None:
    names = ", ".join(f"a{number}" for number in range(PARAMETERS))
    body = "    pass\n" * (LINES - 1)
    assert too_large(f"def f(self, {names}):\n{body}") == []
    assert too_large(f"def f({names}, *more):\n    pass\n") == ["f: 2 lines, 13 parameters"]
    assert too_large(f"async def f(x):\n{body}    pass\n") == ["f: 61 lines, 1 parameters"]
    kernel = f"@triton.jit\ndef f({names}, more):\n    pass\n"
    assert too_large(kernel)
    assert not too_large(kernel, kernels=True)
