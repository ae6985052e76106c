"""Backends that run a model for lm-eval: transformers in this process, or vLLM's OpenAI server in another one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.common.install import require
from planner.common.progress import Progress
from planner.evaluation.vllm_server import Server, cpu_environment
from vllm_moeq.completeness import cannot_load


@dataclass(frozen=True)
class TaskBackend:
    """One way of running a model for lm-eval. The experts of a moeq checkpoint stay packed in all of them.

    Attributes:
        sequences: number of sequences at a time, unless asked for otherwise.
        open: yields a model for lm-eval, given the folder, the names of devices, the sequences at a time, a folder for
            logs and what shows the progress. Raises MoeqError where the model cannot be loaded.
        several_devices: whether it splits a model among devices; otherwise it takes the first.
    """

    sequences: int
    open: Callable[[Path, Sequence[str], int, Path | None, Progress | None], AbstractContextManager[Any]]
    several_devices: bool = False


@contextmanager
def _in_transformers(
    folder: Path, devices: Sequence[str], batch_size: int, _store: Path | None, _progress: Progress | None
) -> Iterator[Any]:
    """See :attr:`TaskBackend.open`: in this process, in float32 on a CPU and in bfloat16 on a GPU."""
    from lm_eval.models.huggingface import HFLM

    import vllm_moeq.hf  # noqa: F401  (registers the method)

    device = devices[0]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # it is the one of config.json
            # The path is absolute because transformers would look up a relative one on the Hub too. The log-softmax is
            # float32 because different choices may get equal values in bfloat16.
            model = HFLM(
                str(folder.resolve()), device=device, dtype=dtype, softmax_dtype=torch.float32,
                batch_size=batch_size, trust_remote_code=False,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise cannot_load(folder, error) from None
    yield model


@contextmanager
def _in_vllm(
    folder: Path, devices: Sequence[str], batch_size: int, store: Path | None, progress: Progress | None
) -> Iterator[Any]:
    """See :attr:`TaskBackend.open`: in a server of its own, in the dtype of config.json."""
    require("--backend vllm", ("vllm",), "gpu")
    from planner.evaluation.lm_eval_server import ServedModel

    with tempfile.TemporaryDirectory() as temporary:
        log = (store or Path(temporary)) / "server.log"
        flags, environment = _placement(devices)
        if progress is not None:
            progress.line(f"starting vLLM, log in {log}")
        with Server(folder.resolve(), log, ["--max-model-len", "auto", *flags], environment) as server:
            yield ServedModel(server.url, folder, batch_size, progress or Progress(quiet=True))


def _placement(devices: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return vLLM's flags and environment variables for some devices. GPUs ignore the variables of the CPU backend."""
    environment = cpu_environment()
    if devices[0] == "cpu":
        # Compiling takes longer than it saves: the experts are a single operator to vLLM's compiler.
        return ([] if torch.cuda.is_available() else ["--enforce-eager"]), environment
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    indices = [torch.device(name).index or 0 for name in devices]
    chosen = [visible[index] if index < len(visible) and visible[index] else str(index) for index in indices]
    return ["--tensor-parallel-size", str(len(devices))], {**environment, "CUDA_VISIBLE_DEVICES": ",".join(chosen)}


TASK_BACKENDS = {
    "transformers": TaskBackend(8, _in_transformers),  # it pads sequences to the longest one
    "vllm": TaskBackend(64, _in_vllm, several_devices=True),
}
DEFAULT_TASK_BACKEND = "transformers"
