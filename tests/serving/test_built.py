"""Every architecture that vLLM has on the CPU, built and loaded in this process: each linear by its own width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from vllm.config import LoadConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.model_loader import get_model_loader

from planner.evaluation.vllm_server import free_port
from tests.architectures import build as build_source
from tests.architectures import quantize
from tests.serving.test_architectures import BFLOAT16, SERVED
from tests.serving.test_options import build, config_of
from tests.tiers import thorough_rows
from vllm_moeq.format import ShardSet, joined, load_config
from vllm_moeq.format.linears import WORDS
from vllm_moeq.serving.linear_method import PackedLinearMethod

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_rank(quantized_mixtral: Path) -> Iterator[None]:
    with set_current_vllm_config(config_of(quantized_mixtral)):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()


def stored(folder: Path) -> Counter[int]:
    """Return width → number of linears in the checkpoint; those that vLLM joins are one."""
    config = load_config(folder)
    experts = tuple(f"{prefix}." for prefix in config.experts)
    with ShardSet(folder) as shards:
        names = [name.removesuffix(f".{WORDS}") for name in shards.tensors if name.endswith(f".{WORDS}")]
    names = [name for name in names if not name.startswith(experts)]
    return Counter(config.linear.bits_of(group[0]) for group in {joined(name, names) for name in names})


def width(module: Any) -> int | None:
    """Return the width of a layer that our method runs, or vLLM's for packed linears; None of any other."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, PackedLinearMethod):
        return method.linear.bits
    return module.scheme.num_bits if isinstance(method, CompressedTensorsLinearMethod) else None


CASES: list[tuple[str, Literal["float32", "bfloat16"]]] = [
    *((name, "bfloat16" if name in BFLOAT16 else "float32") for name in SERVED),
    ("mixtral", "bfloat16"),
]
IN_EVERY_RUN = [("mixtral", "bfloat16"), *((name, "float32") for name in ("deepseek_v3", "ernie4_5_moe"))]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("name", "dtype"), thorough_rows(CASES, IN_EVERY_RUN))
def test_each_linear_is_loaded_with_its_width(name: str, dtype: Literal["float32", "bfloat16"], tmp_path: Path) -> None:
    """A name that vLLM has otherwise would get the width of the rest, and its words would not fit."""
    build_source(name, tmp_path / "source")
    folder = quantize(tmp_path / "source", tmp_path / "quantized")
    config = config_of(folder, dtype)
    model = build(config)
    found = Counter(bits for bits in map(width, model.modules()) if bits is not None)
    assert found == stored(folder)
    assert set(found) == {4, 8}
    with set_current_vllm_config(config):
        get_model_loader(LoadConfig()).load_weights(model, config.model_config)
