"""The ``moeq`` command: parses flags, calls the planner, prints. Exit status 2 for a user's mistake."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from planner.commands.given import USAGE_ERROR
from planner.commands.late import LateCommand, Row
from planner.common.shown import shown
from vllm_moeq import __version__

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of a command that hands flags on to another program."""

COMMANDS = {
    "inspect": Row(
        "inspect",
        "inspect_command",
        "Show a model's MoE layers, sizes and router norms, from headers and routers alone.",
    ),
    "plan": Row(
        "plan",
        "plan_command",
        "Choose a width for every expert and write plan.json. With -o, continues a killed run.",
        long=True,
    ),
    "quantize": Row(
        "quantize",
        "quantize_command",
        "Plan, quantize and write a checkpoint that vLLM serves. Continues a killed run.",
        long=True,
    ),
    "calibrate": Row(
        "calibrate",
        "calibrate_command",
        "Run a model over a text and write what each expert saw. Continues a killed run.",
        long=True,
    ),
    "compare": Row(
        "compare",
        "compare_command",
        "Quantize a model by several methods and measure what each costs in quality. Continues a killed run.",
        long=True,
        tasks=True,
    ),
    "verify": Row(
        "verify",
        "verify_command",
        "Check every tensor of a checkpoint: presence, shapes, widths, finite scales.",
        looks=True,
    ),
    "export": Row(
        "exchange",
        "export_command",
        "Write the checkpoint in another format, with exactly the quantized values.",
        long=True,
    ),
    "import": Row(
        "exchange",
        "import_command",
        "Turn a GPTQ checkpoint, with one width per expert or one for all, into one to serve, without requantizing.",
        long=True,
    ),
    "report": Row(
        "report",
        "report_command",
        "Show a checkpoint on one self-contained HTML page, and bring its README.md up to date.",
    ),
    "push": Row(
        "push",
        "push_command",
        "Check a checkpoint's headers, then upload it to the Hugging Face Hub; "
        "the token is HF_TOKEN's or your login's.",
    ),
    "eval": Row(
        "evaluate",
        "eval_command",
        "Measure perplexity on a text, KL divergence to a reference, and accuracy on tasks. Continues a killed run.",
        long=True,
        tasks=True,
    ),
    "lm-eval": Row(
        "harness",
        "lm_eval_command",
        "Run lm-eval's own command, which then reads checkpoints of moeq; all arguments go to lm-eval.",
        tasks=True,
        settings={**PASSED_ON, "allow_interspersed_args": False},  # a --help behind a word is its
    ),
    "serve": Row(
        "serve",
        "serve_command",
        "Check a checkpoint's headers, then serve it with vLLM's OpenAI server; further flags go to vLLM.",
        settings=PASSED_ON,
    ),
    "bench": Row(
        "bench",
        "bench_command",
        "Serve a checkpoint with vLLM, send requests, print tokens per second and waiting times. Compares two models.",
        behind="vLLM's",
    ),
    "env": Row(
        "env",
        "env_command",
        "Print versions, processor, memory, GPUs and the kernel that runs on them, for a report of a fault.",
    ),
}
"""Name → module, function and summary, in the order of ``moeq --help``."""

EXIT_CODES = (
    "Exit status: 0 done; 2 a mistake in flags or files, named in one line; 130 interrupted; 143 terminated; "
    "1 our own error."
)


class Commands(TyperGroup):
    """All commands, none of which is imported before it is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, row in COMMANDS.items():
            self.add_command(LateCommand(name, row))


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


app = typer.Typer(
    name="moeq",
    cls=Commands,
    help="Quantize Mixture-of-Experts models with one bit width per expert, and serve them with vLLM.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    callback=_flags_of_moeq,
)


def main() -> NoReturn:
    """Run the command; print a user's mistake as one line and exit with status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII has no sign for "times"
    try:
        sys.exit(app(prog_name="moeq", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        mistake = _usage(error) if isinstance(error, USAGE_ERROR) else _mistake(error)
        if mistake is None:
            raise
        if mistake:
            Console(stderr=True, highlight=False).print(
                f"error: {shown(mistake)}", soft_wrap=True, markup=False, emoji=False
            )
        sys.exit(2)


def _output_fails() -> bool:
    """Tell whether the standard output takes nothing. Then send the rest to nowhere, else Python fails at the end."""
    try:
        sys.stdout.flush()
        os.write(1, b"\n")  # after an error the buffer is empty
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


def _usage(error: Any) -> str:
    """Return the parser's complaint in one line; an empty one where it has printed the help instead."""
    path = error.ctx.command_path if error.ctx is not None else "moeq"
    message = " ".join(error.format_message().split()).removesuffix(".")
    return message and f"{path}: {message[0].lower()}{message[1:]} (see {path} --help)"


def _mistake(error: Exception) -> str | None:
    """Return a user's mistake, or a lack of memory, in one line; None for an error of ours."""
    from planner.common.mistakes import named_mistakes
    from vllm_moeq.format import MoeqError

    if isinstance(error, OSError) and error.filename is None and _output_fails():
        return f"cannot write to the standard output ({error.strerror})"
    try:
        with named_mistakes():
            raise error
    except MoeqError as mistake:
        return str(mistake)
    except Exception:
        return None
