"""vLLM's options that cannot work are refused while the model is built: its own configs and layers, no server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig, WeightTransferConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig, UVAOffloadConfig
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading

from planner.evaluation.vllm_server import free_port
from vllm_moeq.format import UsageError
from vllm_moeq.serving.options import OPTIONS, check_options

pytestmark = pytest.mark.slow


def config_of(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", **flags: Any) -> VllmConfig:
    return EngineArgs(
        model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, **flags
    ).create_engine_config()


@pytest.fixture(scope="module")
def served(quantized_mixtral: Path) -> VllmConfig:
    return config_of(quantized_mixtral)


@pytest.fixture(scope="module")
def one_rank(served: VllmConfig) -> Iterator[None]:
    with set_current_vllm_config(served):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()


def build(config: VllmConfig, prefix: str = "") -> torch.nn.Module:
    config.compilation_config.static_forward_context.clear()  # names of an earlier test's layers
    with set_current_vllm_config(config):
        return initialize_model(config, prefix=prefix)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("--enable-lora", {"lora_config": LoRAConfig(max_lora_rank=8)}, "adapters cannot .*--lora-target-modules"),
    ("--enable-lora", {"lora_config": LoRAConfig(target_modules=["q_proj", "model.layers.0.mlp.experts"])}, "adapters"),
    ("--load-format", {"load_config": LoadConfig(load_format="sharded_state")}, "expected auto"),
    ("--load-format", {"load_config": LoadConfig(load_format="tensorizer")}, "expected auto"),
    ("--cpu-offload-gb", {"offload_config": OffloadConfig(uva=UVAOffloadConfig(cpu_offload_gb=1))}, "on the device"),
    (
        "--offload-group-size",
        {"offload_config": OffloadConfig(prefetch=PrefetchOffloadConfig(offload_group_size=2))},
        "on the device",
    ),
    ("--weight-transfer-config", {"weight_transfer_config": WeightTransferConfig()}, "cannot be replaced"),
]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("flag", "changes", "reason"), WRONG)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    flag: str, changes: dict[str, Any], reason: str, served: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(served, name, value)
    with pytest.raises(UsageError, match=f"^{flag}: .*{reason}"):
        build(served)


def test_load_balancing_is_refused(served: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.parallel_config, "enable_eplb", True)
    with pytest.raises(UsageError, match=r"^--enable-eplb: "):
        check_options(served)


def test_adapters_of_linears_pass(served: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "lora_config", LoRAConfig(max_lora_rank=8, target_modules=["q_proj", "v_proj"]))
    check_options(served)


def test_every_option_is_one_of_vllms(served: VllmConfig) -> None:
    """A path that vLLM renames would silently be no check."""
    for option in OPTIONS:
        place: Any = served
        for name in option.path.split("."):
            place = getattr(place, name)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_formats_that_work_load_all_experts_and_refuse_to_load_again(served: VllmConfig, load_format: str) -> None:
    model = build(served)
    record_metadata_for_reloading(model)
    with set_current_vllm_config(served):
        get_model_loader(LoadConfig(load_format=load_format)).load_weights(model, served.model_config)
        process_weights_after_loading(model, served.model_config, torch.device("cpu"))
        experts = next(it for it in model.modules() if isinstance(it, RoutedExperts))
        assert experts.quant_method._kernel is not None
        with pytest.raises(UsageError, match=r"^reload_weights: packed experts cannot be replaced"):
            reload_weights(served, model, None, None, True)


@pytest.mark.usefixtures("one_rank")
def test_a_draft_model_is_built_under_its_own_prefix(served: VllmConfig) -> None:
    alone, draft = build(served), build(served, prefix="draft_model")
    methods = [type(getattr(it, "quant_method", None)).__name__ for it in alone.modules()]
    assert methods == [type(getattr(it, "quant_method", None)).__name__ for it in draft.modules()]
    assert methods.count("MoeqMoEMethod") == 2


@pytest.mark.parametrize("prefix", ["mtp", "deepseek_mtp", "ernie_mtp"])
def test_layers_that_were_left_out_are_no_draft(
    prefix: str, quantized_copy: Path, change_config: Callable[[Path, Callable[[dict[str, Any]], None]], None]
) -> None:
    """vLLM takes them for every checkpoint of these families, whatever its config.json announces."""
    change_config(
        quantized_copy, lambda it: it.update(model_type="ernie4_5_moe", architectures=["Ernie4_5_MoeForCausalLM"])
    )
    with pytest.raises(UsageError, match=r"^--speculative-config: expected a draft that is a model of its own"):
        config_of(quantized_copy, speculative_config={"method": prefix, "num_speculative_tokens": 1})
