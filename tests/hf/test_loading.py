"""What from_pretrained refuses, and how its arguments and a model's methods treat packed experts."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralForCausalLM

import vllm_moeq.hf
from tests.by_hand import quantize_by_hand
from tests.conftest import WIDTHS
from tests.hf.conftest import Pair, dense_of, logits
from vllm_moeq.format import (
    PACKED,
    SCALE,
    ZERO,
    CheckpointError,
    ConfigError,
    ShardSet,
    UsageError,
    load_config,
    verify,
)
from vllm_moeq.format.strangers import NOT_ALONE
from vllm_moeq.hf import MoeqQuantizationConfig, RoutedExperts
from vllm_moeq.kernels import VARIABLE
from vllm_moeq.kernels.cpu import build

pytestmark = pytest.mark.compiler

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1"
Change = Callable[..., Any]


def load(folder: Path, dtype: torch.dtype | str = torch.float32, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)


def experts(model: Any) -> list[RoutedExperts]:
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def test_transformers_alone_refuses(quantized_mixtral: Path) -> None:
    """It gave the experts random weights, and only warned."""
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, quantized_mixtral], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert NOT_ALONE["transformers_weights"] in done.stderr.splitlines()[-1]
    assert "import vllm_moeq.hf" in done.stderr.splitlines()[-1]


def test_a_checkpoint_that_does_not_say_so_is_read_too(quantized_copy: Path, change_config: Change) -> None:
    assert not vars(load(quantized_copy).config).keys() & NOT_ALONE.keys()
    change_config(quantized_copy, lambda config: config.pop("transformers_weights"))
    assert experts(load(quantized_copy))


@pytest.mark.parametrize("suffix", [PACKED, SCALE, ZERO])
def test_a_missing_tensor_is_named(suffix: str, quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{EXPERT}.{suffix}", None)
    with pytest.raises(CheckpointError, match=f"{EXPERT}.{suffix} is missing"):
        load(quantized_copy)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_tensor_that_is_no_experts_is_named(name: str, quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, name, None)
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing: expected \["):
        load(quantized_copy)


def test_a_misshapen_tensor_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{EXPERT}.{PACKED}", lambda tensor: tensor[:, :-1].contiguous())
    with pytest.raises(CheckpointError, match=f"{EXPERT}.{PACKED}: expected"):
        load(quantized_copy)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_impossible_scale_is_named(value: float, quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{EXPERT}.{SCALE}", lambda tensor: tensor.fill_(value))
    with pytest.raises(CheckpointError, match=f"{EXPERT}.{SCALE}: expected (finite|no scale of 0)"):
        load(quantized_copy)


def test_experts_of_another_size_than_the_models(quantized_copy: Path, change_config: Change) -> None:
    change_config(quantized_copy, lambda config: config.update(intermediate_size=96))
    with pytest.raises(
        CheckpointError,
        match=r"experts\.0\.w\d\.weight: expected \[64, 96\], as in .*MixtralForCausalLM, found \[64, 128\]",
    ):
        load(quantized_copy)


def test_a_layer_that_the_model_does_not_have(quantized_copy: Path, change_config: Change) -> None:
    change_config(quantized_copy, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.\S+: expected no such tensor"):
        load(quantized_copy)


def test_a_layer_that_the_checkpoint_does_not_have(quantized_copy: Path, change_config: Change) -> None:
    change_config(quantized_copy, lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"num_hidden_layers: expected 0 to 2 layers, found 3"):
        load(quantized_copy)


def test_another_tensor_of_another_shape_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, "model.norm.weight", lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected \[64\], as in .*, found \[63\]"):
        load(quantized_copy)


def test_only_checkpoints_of_ours_and_only_folders(quantized_mixtral: Path, tiny_mixtral: Path) -> None:
    config = MoeqQuantizationConfig(**load_config(quantized_mixtral).model_dump())
    with pytest.raises(UsageError, match="moeq quantize"):
        load(tiny_mixtral, quantization_config=config)
    with pytest.raises(UsageError, match="state_dict"):
        MixtralForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(quantized_mixtral), state_dict={"lm_head.weight": torch.zeros(1)}
        )


def test_saving_and_training_are_refused(quantized_mixtral: Path, tmp_path: Path) -> None:
    model = load(quantized_mixtral)
    with pytest.raises(ValueError, match="moeq and is not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert not model.hf_quantizer.is_trainable
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_config_is_the_checkpoints(quantized_mixtral: Path) -> None:
    config = load(quantized_mixtral).config
    assert config.quantization_config.moeq == load_config(quantized_mixtral)
    assert MoeqQuantizationConfig(**config.to_dict()["quantization_config"]).moeq == load_config(quantized_mixtral)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_else_has_the_dtype_that_was_asked_for(dtype: torch.dtype, quantized_mixtral: Path) -> None:
    model = load(quantized_mixtral, dtype, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.device == torch.device("cpu")
    for module in experts(model):
        assert {buffer.dtype for buffer in module.buffers()} == {torch.int32, torch.float16}
    assert logits(model).isfinite().all()


def test_without_a_dtype_it_is_the_configs(quantized_mixtral: Path) -> None:
    for model in (load(quantized_mixtral, "auto"), AutoModelForCausalLM.from_pretrained(quantized_mixtral)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_cast_leaves_packed_experts_as_they_are(quantized_mixtral: Path) -> None:
    model, other = load(quantized_mixtral), load(quantized_mixtral)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for module, same in zip(experts(model), experts(other), strict=True):
        for buffer, expected in zip(module.buffers(), same.buffers(), strict=True):
            assert buffer.dtype == expected.dtype
            assert torch.equal(buffer, expected)
    expected = logits(other)
    assert (logits(model) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("backend", ["reference", None])
def test_buffers_move_with_the_model(
    quantized_mixtral: Path, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    """With the reference at any time, with the others until they have taken the experts over."""
    model = load(quantized_mixtral)
    if backend:
        monkeypatch.setenv(VARIABLE, backend)
        logits(model)
    assert {buffer.device.type for module in experts(model.to("meta")) for buffer in module.buffers()} == {"meta"}


def test_scales_that_need_more_than_float16(quantized_copy: Path, change_tensor: Change) -> None:
    """Bfloat16 reaches further: such scales and zeros are kept in float32, those of the other buffer are not."""
    for suffix in (SCALE, ZERO):
        change_tensor(quantized_copy, f"{EXPERT}.{suffix}", lambda tensor: (tensor.float() * 1e-7).bfloat16())
    module = experts(load(quantized_copy))[1]
    assert module.packed("gate_up").scales.dtype == module.packed("gate_up").zeros.dtype == torch.float32
    assert module.packed("down").scales.dtype == torch.float16
    with ShardSet(quantized_copy) as shards:
        assert torch.equal(module.packed("gate_up").scales[3, :128], shards.load(f"{EXPERT}.{SCALE}").float())


def test_weak_experts_are_skipped_where_the_checkpoint_says_so(quantized_copy: Path, change_config: Change) -> None:
    whole = logits(load(quantized_copy))
    prefixes = list(load_config(quantized_copy).experts)
    change_config(quantized_copy, lambda it: it["quantization_config"].update(odp={prefixes[0]: 1.0}))
    skipping = load(quantized_copy)
    assert [module.layer.threshold for module in experts(skipping)] == [1.0, 0.0]
    first = skipping.model.layers[0].mlp.experts
    seen: list[torch.Tensor] = []

    def note(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return hidden * weights.sum()

    first._fused = note
    assert not torch.equal(logits(skipping), whole)
    assert (seen[0] >= 0).sum(dim=-1).tolist() == [1] * 48


def test_the_model_without_a_head(quantized_mixtral: Path) -> None:
    base, model = AutoModel.from_pretrained(quantized_mixtral, dtype=torch.float32), load(quantized_mixtral)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("bits", [8, 16])
def test_other_widths_of_linears(bits: int, tiny_mixtral: Path, tmp_path: Path) -> None:
    quantized = quantize_by_hand(tiny_mixtral, tmp_path / "quantized", lambda _: WIDTHS, linear_bits=bits)
    pair: Pair = dense_of(quantized, tmp_path / "dense", "mixtral")
    found, expected = logits(load(pair.quantized)), logits(load(pair.dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_linear_that_transformers_would_split(quantized_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    import vllm_moeq.hf.names as names

    split = WeightConverter("self_attn.q_proj.weight", ["a.weight", "b.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda _: [split])
    with pytest.raises(UsageError, match=r"q_proj\.weight: .*--linear-bits 16"):
        names.Names(MixtralForCausalLM(AutoConfig.from_pretrained(quantized_mixtral))).require_whole(
            ["model.layers.0.self_attn.q_proj.weight"]
        )


def test_the_fused_kernel(quantized_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Triton's interpreter without a GPU: agrees with the reference, and gives the loaded buffers back."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv(VARIABLE, "reference")
    reference = experts(load(quantized_mixtral, torch.bfloat16, device_map=device))[0]
    torch.manual_seed(0)
    x, ids, weights = torch.randn(1, 64).bfloat16(), torch.tensor([[3, 0]]), torch.rand(1, 2)
    x, ids, weights = x.to(device), ids.to(device), weights.to(device)
    expected = reference(x, ids, weights)
    monkeypatch.setenv(VARIABLE, "triton")
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    fused = experts(load(quantized_mixtral, torch.bfloat16, device_map=device))[0]
    for dtype in (torch.bfloat16, torch.float32):
        found = fused(x.to(dtype), ids, weights)
        assert found.dtype == dtype
        assert (found.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    assert not any(buffer.numel() for buffer in fused.buffers())
    fused.to(device)
    with pytest.raises(UsageError, match=f"its kernel keeps the experts on {device}"):
        fused.to("meta")


def test_float32_does_not_run_in_a_gpu_s_kernel(quantized_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    module = experts(load(quantized_mixtral))[0]
    module(torch.ones(1, 64), torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert module._kernel is not None
    assert module._kernel.name == "reference"


def test_the_native_kernel_takes_the_experts_over(quantized_mixtral: Path) -> None:
    if build.problem():
        pytest.skip(build.problem())
    model = load(quantized_mixtral)
    logits(model)
    assert {getattr(module._kernel, "name", None) for module in experts(model)} == {"native"}
    assert not any(buffer.numel() for module in experts(model) for buffer in module.buffers())
    with pytest.raises(UsageError, match="its kernel keeps the experts on cpu"):
        model.to("meta")


def test_neither_vllm_nor_the_planner_is_needed() -> None:
    files = list(Path(vllm_moeq.hf.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in modules if name.split(".")[0] in ("vllm", "planner", "vllm_moeq")}
    rooms = ("format", "completeness", "kernels", "hf")
    assert {".".join(name.split(".")[:2]) for name in ours} == {f"vllm_moeq.{it}" for it in rooms}


def test_a_relative_folder_and_several_shards(quantized_mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quantized_mixtral.parent)
    assert len(list(quantized_mixtral.glob("*.safetensors"))) > 1
    model = load(Path(quantized_mixtral.name))
    size = sum(buffer.nbytes for module in experts(model) for buffer in module.buffers())
    assert size == verify(quantized_mixtral, values=False).expert_bytes
