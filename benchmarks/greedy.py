"""Greedy tokens of a tiny model: as vLLM serves its checkpoint, and as transformers computes its dense export.

Both are in float32, where two ways to the same sum differ by a millionth and random models have no ties.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.families import classes
from planner.common.progress import Progress
from planner.evaluation.vllm_server import cpu_environment
from planner.exchange.dense import export_dense

PROMPTS = [[(7 * number + 13 * place) % 2000 + 5 for place in range(12)] for number in range(4)]
NEW_TOKENS = 12
PATIENCE = 300
"""Seconds that vLLM may take from its start to the last token."""

LIMITS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True, "skip_tokenizer_init": False}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
NOISE = re.compile(r"\x1b\[[0-9;]*m|/\S+/")
"""Colours and folders, which have no place in a table."""

_KEPT: dict[str, Any] = {}
"""What lives as long as the process: declared operators."""

OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""Declares the operators without which torchvision cannot be imported. PyPI's wheel has them in a library for CUDA,
which does not load beside a torch for CPUs; vLLM's classes for images import torchvision, and texts need none of it."""

Tokens = list[list[int]]

SAME, AS_DENSE = "yes", "yes: as vLLM's dense model, which transformers' differs from"


class ServingError(Exception):
    """vLLM cannot serve a checkpoint; the message is its reason in one line."""


def declare_operators() -> None:
    """Declare torchvision's operators where it is installed without them, here and in the processes begun later."""
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore] # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:  # its operators do not exist
        folder = tempfile.mkdtemp(prefix="operators-")
        Path(folder, "sitecustomize.py").write_text(OPERATORS)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        exec(OPERATORS, _KEPT)


def served(folder: Path, dtype: str = "float32", more: Mapping[str, Any] | None = None) -> Tokens:
    """Return the tokens that vLLM gives, in a process of its own that leaves no memory behind.

    Args:
        folder: the checkpoint.
        dtype: dtype of the activations.
        more: other arguments of vLLM's ``LLM``.

    Raises:
        ServingError: vLLM refuses the checkpoint, or does not answer in time.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), {**LIMITS, "dtype": dtype, **(more or {})}, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(PATIENCE) else f"no answer within {PATIENCE} s"
    except EOFError:
        answer = "the process ended without an answer"
    finally:
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise ServingError(answer)
    return [list(row) for row in answer]


def _serve(folder: str, arguments: dict[str, Any], answer: Connection) -> None:
    os.environ.update({**cpu_environment(), **ENVIRONMENT})
    try:
        from vllm import LLM, SamplingParams
        from vllm.triton_utils import dispatcher

        # Of everything imported, vLLM reads the attributes; one object of llvmlite, which its class for Kimi K2.5
        # imports with numba, answers with a function, and vLLM fails on it.
        dispatcher.vars = _attributes  # type: ignore[attr-defined]
        model = LLM(folder, **arguments)
        how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        found = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], how, use_tqdm=False)
        answer.send([list(one.outputs[0].token_ids) for one in found])
    except BaseException as error:  # what vLLM's classes raise is what the table has to say
        answer.send(_reason(error))
        raise


def _attributes(value: object) -> Mapping[str, Any]:
    """Return an object's attributes as ``vars`` does, none where they are no mapping."""
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


def _reason(error: BaseException) -> str:
    """Return an exception in one line; one without a message, such as an assertion, by the line that raised it."""
    said = NOISE.sub("", str(error)).strip().splitlines()
    said = [one.strip() for one in said if "Value error, " in one] or said  # in what pydantic says, the cause
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {said[0] if said else line:.300}"


@torch.no_grad()
def expected(name: str, checkpoint: Path, dense: Path) -> Tokens:
    """Return the tokens that transformers gives for the dense export of a family's checkpoint.

    Args:
        name: the family.
        checkpoint: the quantized checkpoint.
        dense: folder to write the export to.
    """
    if not dense.exists():
        export_dense(checkpoint, dense, Progress(quiet=True), torch.float32)
    config, kind = classes(name)
    model = kind.from_pretrained(dense, config=config, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def compare(name: str, checkpoint: Path, dense: Path) -> str:
    """Return whose tokens vLLM gives: "yes" for transformers', or else what it gives for the same values in float32.

    Args:
        name: the family.
        checkpoint: the quantized checkpoint.
        dense: folder to write its dense export to.

    Raises:
        ServingError: vLLM refuses the checkpoint.
    """
    mine = served(checkpoint)
    if mine == expected(name, checkpoint, dense):
        return SAME
    if mine == served(dense):
        return AS_DENSE
    raise ServingError("other tokens than those of its dense export")
