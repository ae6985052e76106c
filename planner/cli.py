"""The ``moeq`` command: parses flags, calls the planner, prints. Exit status 2 for a user's mistake."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console

from planner.commands.calibrate import calibrate_command
from planner.commands.compare import compare_command
from planner.commands.evaluate import eval_command
from planner.commands.exchange import export_command, import_command
from planner.commands.inspect import inspect_command
from planner.commands.plan import plan_command
from planner.commands.push import push_command
from planner.commands.quantize import quantize_command
from planner.commands.report import report_command
from planner.commands.serve import serve_command
from planner.commands.verify import verify_command
from planner.common.memory import out_of_memory
from vllm_moeq.format import MoeqError

app = typer.Typer(
    name="moeq",
    help="Quantize Mixture-of-Experts models with one bit width per expert, and serve them with vLLM.",
    epilog="Exit status: 0 done; 2 a mistake in flags or files, named in one line; 130 interrupted; 1 our own error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command("inspect")(inspect_command)
app.command("plan")(plan_command)
app.command("quantize")(quantize_command)
app.command("calibrate")(calibrate_command)
app.command("compare")(compare_command)
app.command("verify")(verify_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("report")(report_command)
app.command("push")(push_command)
app.command("eval")(eval_command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve_command)


def main() -> NoReturn:
    """Run the command; print a user's mistake as one line and exit with status 2."""
    try:
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
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
