"""Backends that run a model for lm-eval: transformers in this process, or vLLM's OpenAI server in another one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from planner.common.progress import Progress
from planner.evaluation.vllm_server import Server, cpu_environment
from vllm_moeq.format import ConfigError, UsageError

Backend = Literal["transformers", "vllm"]

SEQUENCES = {"transformers": 8, "vllm": 64}
"""Number of sequences at a time. transformers pads them to the longest one; vLLM batches them without padding."""


@contextmanager
def open_model(
    folder: Path,
    backend: Backend,
    devices: Sequence[str],
    batch_size: int | None,
    store: Path | None,
    progress: Progress | None,
) -> Iterator[Any]:
    """Yield a model for lm-eval.

    transformers computes in float32 on a CPU and in bfloat16 on a GPU. vLLM computes in the dtype of config.json, on
    the kind of device that it was built for. The experts of a moeq checkpoint stay packed in both.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        backend: ``transformers`` or ``vllm``.
        devices: names of devices; transformers takes the first, vLLM splits the model among all GPUs.
        batch_size: sequences at a time; None for :data:`SEQUENCES`.
        store: folder for vLLM's log; None for a temporary folder.
        progress: shows the progress; None shows none.

    Raises:
        MoeqError: the model cannot be loaded, vLLM is not installed, or its server does not start.
    """
    size = batch_size or SEQUENCES[backend]
    if backend == "transformers":
        yield _in_transformers(folder, devices[0], size)
        return
    if find_spec("vllm") is None:
        raise UsageError("--backend vllm: vLLM is not installed: pip install 'vllm-moeq[gpu]' (README: for CPUs)")
    from planner.evaluation.lm_eval_server import ServedModel

    with tempfile.TemporaryDirectory() as temporary:
        log = (store or Path(temporary)) / "server.log"
        flags, environment = _placement(devices)
        if progress is not None:
            progress.line(f"starting vLLM, log in {log}")
        with Server(folder.resolve(), log, ["--max-model-len", "auto", *flags], environment) as server:
            yield ServedModel(server.url, folder, size, progress or Progress(quiet=True))


def _in_transformers(folder: Path, device: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    import vllm_moeq.hf  # noqa: F401  (registers the method)

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # it is the one of config.json
            # The path is absolute because transformers would look up a relative one on the Hub too. The log-softmax is
            # float32 because different choices may get equal values in bfloat16.
            return HFLM(
                str(folder.resolve()), device=device, dtype=dtype, softmax_dtype=torch.float32,
                batch_size=batch_size, trust_remote_code=False,
            )  # fmt: skip
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it ({error})") from None


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
