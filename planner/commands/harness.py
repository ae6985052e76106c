"""``moeq lm-eval``: lm-eval's own command, with this project's checkpoints known to transformers."""

from __future__ import annotations

import sys

import typer

from planner.evaluation.lm_eval_tasks import require_lm_eval


def lm_eval_command(context: typer.Context) -> None:
    """Run lm-eval's own command, which then reads checkpoints of moeq; all arguments go to lm-eval.

    Its flags are shown by: moeq lm-eval run --help

    Example: moeq lm-eval --model hf --model_args pretrained=Mixtral-8x7B-2.5bit --tasks piqa
    """
    require_lm_eval("moeq lm-eval")
    from lm_eval.__main__ import cli_evaluate

    import vllm_moeq.hf  # noqa: F401  (registers the method)

    sys.argv = ["lm-eval", *context.args]  # lm-eval reads and changes it
    cli_evaluate()
