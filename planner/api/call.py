"""Functions whose arguments are the fields of a dataclass: one place for their names, types, defaults and bounds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from planner.api.docstrings import with_arguments
from planner.api.unread import refuse_unread
from planner.common.mistakes import named_mistakes
from vllm_moeq.format import UsageError

Asked = TypeVar("Asked")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def takes(
    arguments: Callable[Arguments, Asked], command: str
) -> Callable[[Callable[[Asked], Result]], Callable[Arguments, Result]]:
    """Return a decorator for a function of a dataclass: what it makes takes the dataclass's fields as arguments.

    Args:
        arguments: the dataclass; type checkers, ``help`` and the reference show its fields as the arguments.
        command: name of the command whose flags they are.
    """

    def decorate(run: Callable[[Asked], Result]) -> Callable[Arguments, Result]:
        @wraps(run)
        def function(*values: Arguments.args, **named: Arguments.kwargs) -> Result:
            with named_mistakes():
                return run(read(arguments, command, values, named))

        _describe(function, arguments, run)
        return function

    return decorate


def read(
    kind: Callable[..., Asked],
    command: str,
    values: tuple[object, ...],
    named: Mapping[str, object],
    dry_run: bool = False,
) -> Asked:
    """Return the dataclass that some arguments make.

    Args:
        kind: the dataclass.
        command: name of the command whose flags the arguments are.
        values: positional arguments.
        named: keyword arguments.
        dry_run: whether nothing is to be done.

    Raises:
        TypeError: an unknown argument, or a missing one.
        UsageError: an impossible value, or an argument that would be ignored.
    """
    given = inspect.signature(kind).bind(*values, **named).arguments
    for name, value in given.items():
        if isinstance(value, str) and not value:
            raise UsageError(f"{_shown(name)}: expected a value, found an empty one")
    try:
        asked: Asked = _adapter(kind).validate_python(given)
    except ValidationError as error:
        raise UsageError(_problem(error)) from None
    known: Any = asked
    changed = {it.name: _shown(it.name) for it in fields(known) if getattr(known, it.name) != it.default}
    refuse_unread(command, changed, {**vars(known), "dry_run": dry_run})
    return asked


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _shown(name: str) -> str:
    """Return an argument's name as messages have it: a flag's, since both have the same."""
    return f"--{name.replace('_', '-')}"


def _problem(error: ValidationError) -> str:
    """Return the first problem of pydantic's in one line."""
    problem = error.errors(include_url=False)[0]
    text = str(problem["msg"]).removeprefix("Value error, ")
    text = re.sub(r"^Input (should be|is) (greater|less)", r"expected a number \2", text)
    text = re.sub(r"^Input (should be|is)", "expected", text)
    return f"{_shown(str(problem['loc'][0]))}: {text}, found {problem['input']!r:.200}"


def _describe(function: Any, kind: Any, run: Callable[..., Any]) -> None:
    """Give a function the signature and the docstring that people see, from the dataclass of its arguments.

    What is needed comes first, then what only this function has; types have no bounds.
    """
    hints, result = get_type_hints(kind), get_type_hints(run)["return"]
    shown = [item.replace(annotation=hints[item.name]) for item in inspect.signature(kind).parameters.values()]
    own, needed = vars(kind)["__annotations__"], inspect.Parameter.empty
    ordered = sorted(shown, key=lambda item: (item.kind, item.default is not needed, item.name not in own))
    function.__signature__ = inspect.Signature(ordered, return_annotation=result)
    function.__annotations__ = {**{item.name: item.annotation for item in ordered}, "return": result}
    function.__doc__ = with_arguments(run.__doc__, kind, [item.name for item in ordered])
    kind.__init__.__annotations__ |= hints  # those of the bases are texts, which mean something in their files only
    del function.__wrapped__
