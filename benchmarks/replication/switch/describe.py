"""This module makes the task of ``run.py``: a sentence that describes a Python function by its syntax.

It replaces the paper's CNN/Daily Mail. A docstring's first line would be a better summary, but a model that trains for
minutes on one core learns little more than how such lines begin.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

CALLS = 40
"""Names of called functions that a sentence may mention: the most frequent ones of the training files."""

MENTIONED = 2
NUMBERS = ("no arguments", "one argument", "two arguments", "three arguments")

Function = ast.FunctionDef | ast.AsyncFunctionDef

DOES: tuple[tuple[tuple[type[ast.AST], ...], str], ...] = (
    ((ast.Import, ast.ImportFrom), "imports modules"),
    ((ast.For, ast.AsyncFor), "loops"),
    ((ast.While,), "repeats"),
    ((ast.If, ast.IfExp), "tests conditions"),
    ((ast.With, ast.AsyncWith), "enters a context"),
    ((ast.Assert,), "asserts"),
    ((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "collects values"),
    ((ast.Lambda,), "defines a lambda"),
    ((ast.JoinedStr,), "formats strings"),
    ((ast.Await,), "awaits"),
    ((ast.Yield, ast.YieldFrom), "yields values"),
    ((ast.Delete,), "deletes"),
    ((ast.Global, ast.Nonlocal), "changes outer variables"),
)


class Example(NamedTuple):
    """One function.

    Attributes:
        source: its code without docstring and comments.
        target: a sentence that describes it.
    """

    source: str
    target: str


def functions(text: str) -> Iterator[Function]:
    """Yield the functions of a file, without their docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escape sequences in other people's code
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, Function):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            yield node


def common_calls(nodes: Iterable[Function]) -> list[str]:
    """Return the names that are called most often."""
    named = (name for node in nodes for name in _calls(node))
    counts = Counter(name for name in named if name[0] != "_" and not name.endswith("Error"))  # those are raised
    return sorted(counts, key=lambda name: (-counts[name], name))[:CALLS]


def describe(node: Function, known: Iterable[str]) -> str:
    """Return the sentence.

    Args:
        node: a function without its docstring.
        known: names of called functions that may be mentioned.
    """
    found = list(ast.walk(node))
    parts = [phrase for kinds, phrase in DOES if any(isinstance(one, kinds) for one in found)]
    handlers = [one.type for one in found if isinstance(one, ast.ExceptHandler)]
    if handlers:
        parts.append(f"catches {_exception(handlers[0])}")
    stored = (one for one in found if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store))
    if any(stored):
        parts.append("sets attributes")
    called = [name for name in dict.fromkeys(_calls(node)) if name in known][:MENTIONED]
    if called:
        parts.append(f"calls {' and '.join(called)}")
    raised = [one.exc for one in found if isinstance(one, ast.Raise)]
    if raised:
        parts.append(f"raises {_exception(raised[0])}")
    values = [one.value for one in found if isinstance(one, ast.Return) and one.value is not None]
    parts.append(f"returns {_value(values)}" if values else "returns nothing")
    return f"{_kind(node)} with {_arguments(node)} that {', '.join(parts)}."


def _kind(node: Function) -> str:
    names = {one.id for one in node.decorator_list if isinstance(one, ast.Name)}
    first = node.args.args[0].arg if node.args.args else ""
    for name, kind in (("property", "Property"), ("classmethod", "Class method"), ("staticmethod", "Static method")):
        if name in names:
            return kind
    kind = "method" if first == "self" else "function"
    return f"Asynchronous {kind}" if isinstance(node, ast.AsyncFunctionDef) else kind.capitalize()


def _arguments(node: Function) -> str:
    arguments = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
    return NUMBERS[count] if count < len(NUMBERS) else "many arguments"


def _calls(node: Function) -> list[str]:
    """Return the names that are called, in the order of the source."""
    calls = [one for one in ast.walk(node) if isinstance(one, ast.Call)]
    calls.sort(key=lambda one: (one.lineno, one.col_offset))
    functions_called = (one.func for one in calls)
    return [
        one.attr if isinstance(one, ast.Attribute) else one.id
        for one in functions_called
        if isinstance(one, ast.Attribute | ast.Name)
    ]


def _exception(node: ast.expr | None) -> str:
    named = node.func if isinstance(node, ast.Call) else node
    return named.id if isinstance(named, ast.Name) and named.id.endswith("Error") else "an exception"


def _value(values: list[ast.expr]) -> str:
    """Return what kind of value is returned last."""
    last = values[-1]
    if isinstance(last, ast.Compare | ast.BoolOp) or (isinstance(last, ast.Constant) and isinstance(last.value, bool)):
        return "a truth value"
    kinds: tuple[tuple[type[ast.expr], str], ...] = (
        (ast.Call, "the result of a call"),
        (ast.Attribute, "an attribute"),
        (ast.Constant, "a constant"),
        (ast.Name, "a variable"),
        (ast.Tuple, "a tuple"),
    )
    return next((name for kind, name in kinds if isinstance(last, kind)), "an expression")
