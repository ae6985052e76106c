"""The ``moeq`` command: parses flags, calls the planner, prints. Exit status 2 for a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from planner.commands.calibrate import calibrate_command
from planner.commands.compare import compare_command
from planner.commands.evaluate import eval_command
from planner.commands.exchange import export_command, import_command
from planner.commands.flatten import flattened
from planner.commands.inspect import inspect_command
from planner.commands.plan import plan_command
from planner.commands.push import push_command
from planner.commands.quantize import quantize_command
from planner.commands.report import report_command
from planner.commands.serve import serve_command
from planner.commands.verify import verify_command
from planner.common.interrupts import interruptible
from planner.common.memory import out_of_memory
from vllm_moeq import __version__
from vllm_moeq.format import MoeqError

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect_command,
    "plan": plan_command,
    "quantize": quantize_command,
    "calibrate": calibrate_command,
    "compare": compare_command,
    "verify": verify_command,
    "export": export_command,
    "import": import_command,
    "report": report_command,
    "push": push_command,
    "eval": eval_command,
}
"""Name → function, in the order of ``moeq --help``. ``serve`` follows: its further flags are vLLM's."""

EXIT_CODES = (
    "Exit status: 0 done; 2 a mistake in flags or files, named in one line; 130 interrupted; 143 terminated; "
    "1 our own error."
)


def build_app() -> typer.Typer:
    """Return the command with all subcommands."""
    made = typer.Typer(
        name="moeq",
        help="Quantize Mixture-of-Experts models with one bit width per expert, and serve them with vLLM.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_flags_of_moeq)
    for name, function in COMMANDS.items():
        made.command(name)(flattened(function))
    theirs = {"allow_extra_args": True, "ignore_unknown_options": True}
    made.command("serve", context_settings=theirs)(flattened(serve_command))
    return made


def _print_version(wanted: bool) -> None:
    """Print the version number and end."""
    if wanted:
        print(__version__)
        raise typer.Exit


def _flags_of_moeq(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the flags of ``moeq`` itself."""


app = build_app()


def main() -> NoReturn:
    """Run the command; print a user's mistake as one line and exit with status 2."""
    try:
        with interruptible():
            app(prog_name="moeq")
    except MoeqError as error:
        line = " ".join(str(error).splitlines())  # names come from files and may hold anything
        Console(stderr=True, highlight=False).print(f"error: {line}", soft_wrap=True, markup=False)
        sys.exit(2)
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        line = "error: not enough memory; what is finished is kept"
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
        sys.exit(2)
    sys.exit(0)
