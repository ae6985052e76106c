"""Every architecture from its own layout on disk to a valid checkpoint, and back to one that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.exact import advance
from planner.calibration.reading.routed import first_hidden
from planner.common.progress import Progress
from planner.exchange.dense import export_dense
from planner.model.architectures import ARCHITECTURES
from planner.model.layout import Layout, read_layout
from planner.model.linear_groups import linear_groups
from planner.model.source import SourceModel
from tests.architectures import EXPERTS, FP4, TINY, build, quantize
from vllm_moeq.format import CheckpointError, ShardSet, UsageError, expert_matrices, load_config, split_width, verify

pytestmark = pytest.mark.slow

Moeq = Callable[..., Any]


@dataclass(frozen=True)
class Made:
    """A row's tiny checkpoint, and transformers' model that it was saved from."""

    name: str
    folder: Path
    model: Any

    @property
    def exact(self) -> bool:
        """Whether the file holds the model's own values."""
        return TINY[self.name].convert is None


@pytest.fixture(scope="module", params=TINY)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return Made(request.param, folder, build(request.param, folder))


@pytest.fixture
def source(made: Made) -> Iterator[SourceModel]:
    with SourceModel(made.folder) as model:
        yield model


@pytest.fixture
def layout(source: SourceModel) -> Layout:
    return read_layout(source)


def expert_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return transformers' tensors of routed experts, biases left out."""
    return {
        name: tensor.detach()
        for name, tensor in model.named_parameters()
        if ".experts." in name and not name.endswith("bias")
    }


def matrices_of(name: str, parameters: dict[str, torch.Tensor], block: str, expert: int) -> dict[str, torch.Tensor]:
    """Return an expert's matrices [outputs, inputs] as transformers' code uses its tensors."""
    if name == "switch_transformers":
        base = next(key for key in parameters if key.startswith(f"{block}.")).split(".experts.")[0]
        return {p: parameters[f"{base}.experts.expert_{expert}.{p}.weight"] for p in ("wi", "wo")}
    mine = {key.rsplit(".", 1)[1]: value[expert] for key, value in parameters.items() if f".{block}." in f".{key}"}
    gate_up, down = mine["gate_up_proj"], mine["down_proj"]
    if name.startswith(("llama4", "gpt_oss")):  # x @ W
        gate_up, down = gate_up.mT, down.mT
    gate, up = (gate_up[::2], gate_up[1::2]) if name.startswith("gpt_oss") else gate_up.chunk(2)
    return {"gate": gate, "up": up, "down": down}


def test_inspection_lists_all_experts_and_routers(made: Made, moeq: Moeq) -> None:
    outcome = moeq("inspect", made.folder, "--json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert facts["expert_parameters"] == sum(tensor.numel() for tensor in expert_parameters(made.model).values())
    assert len(facts["layers"]) == TINY[made.name].moe_layers
    assert all(layer["experts"] == len(layer["router_norm"]) == EXPERTS for layer in facts["layers"])
    on_disk = sum(info.nbytes for info in ShardSet(made.folder).tensors.values())
    assert facts["bytes"] == pytest.approx(on_disk, rel=1e-3)  # a scale of a partial block counts as a whole one


def test_every_matrix_is_what_transformers_multiplies_with(made: Made, source: SourceModel, layout: Layout) -> None:
    parameters = expert_parameters(made.model)
    for layer in layout.layers:
        block = layer.block.removeprefix("language_model.").removeprefix("model.")
        for expert in range(EXPERTS):
            expected = matrices_of(made.name, parameters, block, expert)
            for projection, value in zip(layer.projections.names(), expected.values(), strict=True):
                found = source.shards.load(layer.weight(expert, projection))
                assert found.dtype == torch.bfloat16
                assert tuple(found.shape) == layer.shapes[projection] == tuple(value.shape)
                if made.exact:
                    assert torch.equal(found, value)
                else:
                    error = (found.float() - value.float()).norm() / value.float().norm()
                    assert error < (0.03 if "fp8" in made.name else 0.15)


def test_parts_of_a_matrix_are_parts_of_the_whole(source: SourceModel, layout: Layout) -> None:
    layer = layout.layers[-1]
    for projection in layer.projections.names():
        name = layer.weight(5, projection)
        whole = source.shards.load(name)
        assert torch.equal(source.shards.map(name), whole)
        assert torch.equal(source.shards.read_rows(name, 17, 90), whole[17:90])
        assert torch.equal(source.shards.read_rows(name, 0, 1), whole[:1])


def test_every_router_is_the_models(made: Made, source: SourceModel, layout: Layout) -> None:
    state = list(made.model.state_dict().values())
    for layer in layout.layers:
        found = source.shards.load(layer.router)
        assert found.shape[0] == EXPERTS
        assert any(value.shape == found.shape and torch.equal(value, found) for value in state)


def test_every_tensor_is_an_expert_a_linear_or_kept(made: Made, source: SourceModel, layout: Layout) -> None:
    experts = [
        layer.weight(expert, projection)
        for layer in layout.layers
        for expert in range(layer.num_experts)
        for projection in layer.projections.names()
    ]
    assert sorted([*experts, *layout.linears, *layout.kept]) == sorted(source.shards.tensors)
    assert not any(
        name.endswith(("shared_expert_gate.weight", "relative_attention_bias.weight")) for name in layout.linears
    )
    assert not any("vision" in name for name in layout.linears)
    weights = sum(source.shards.info(name).numel for name in source.shards.tensors)
    saved = {id(tensor): tensor.numel() for tensor in made.model.state_dict(keep_vars=True).values()}
    if made.exact:
        assert weights == sum(saved.values())


def test_a_plan_a_valid_checkpoint_and_back(made: Made, moeq: Moeq, tmp_path: Path) -> None:
    import transformers

    outcome = moeq("plan", made.folder, "--avg-bits", "2.5", "-o", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    quantized = quantize(made.folder, tmp_path / "quantized")
    summary = verify(quantized)
    assert summary.experts == EXPERTS * TINY[made.name].moe_layers
    dense = tmp_path / "dense"
    export_dense(quantized, dense, Progress(quiet=True), torch.float32)
    model_class = type(made.model)
    loaded, info = model_class.from_pretrained(dense, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(loaded, transformers.PreTrainedModel)
    with ShardSet(quantized) as shards, SourceModel(dense) as source:
        for matrix in expert_matrices(shards, load_config(quantized)):
            name = f"{matrix.prefix}.{matrix.expert}.{matrix.projection}.weight"
            assert torch.equal(source.shards.load(name), matrix.dequantize(shards))


@pytest.mark.parametrize("made", [name for name, tiny in TINY.items() if tiny.convert is None], indirect=True)
def test_the_config_alone_tells_the_same_sizes(made: Made, moeq: Moeq, tmp_path: Path) -> None:
    """Of models in sixteen bits, that is, as transformers makes them."""
    (tmp_path / "config.json").write_text((made.folder / "config.json").read_text())
    flags = ("--avg-bits", "2.5", "--group-size", 32, "--dry-run", "--json")
    alone, whole = (moeq("plan", folder, *flags) for folder in (tmp_path, made.folder))
    assert alone.code == whole.code == 0, alone.err
    assert json.loads(alone.out)["sizes"]["expert_bytes"] == json.loads(whole.out)["sizes"]["expert_bytes"]


def test_every_row_has_a_tiny_checkpoint() -> None:
    assert {name.split("-")[0] for name in TINY} == set(ARCHITECTURES)


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "gpt-oss"
    build("gpt_oss-mxfp4", folder)
    with SourceModel(folder) as source, ShardSet(folder) as files:
        stored = "model.layers.1.mlp.experts.gate_up_proj"
        blocks, scales = files.load(f"{stored}_blocks"), files.load(f"{stored}_scales")
        expected = convert_moe_packed_tensors(blocks, scales)  # [experts, hidden, gate and up]
        for expert in range(EXPERTS):
            gate = source.shards.load(f"model.layers.1.mlp.experts.{expert}.gate_proj.weight")
            up = source.shards.load(f"model.layers.1.mlp.experts.{expert}.up_proj.weight")
            assert torch.equal(gate, expected[expert].mT[::2])
            assert torch.equal(up, expected[expert].mT[1::2])
    assert FP4[-1] == 6


def test_fp8_blocks_are_values_times_their_scale(tmp_path: Path) -> None:
    folder = tmp_path / "deepseek"
    build("deepseek_v3-fp8", folder)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    with SourceModel(folder) as source, ShardSet(folder) as files:
        values, scales = files.load(name), files.load(f"{name}_scale_inv")
        found = source.shards.load(name)
        for row, column in ((0, 0), (3, 60), (255, 1), (130, 63)):
            expected = float(values[row, column]) * float(scales[row // 128, column // 128])
            assert float(found[row, column]) == pytest.approx(expected, rel=2**-8)


def test_fp8_scales_of_another_shape_are_refused(tmp_path: Path, change_tensor: Callable[..., Any]) -> None:
    folder = tmp_path / "deepseek"
    build("deepseek_v3-fp8", folder)
    name = "model.layers.1.self_attn.kv_b_proj.weight_scale_inv"
    change_tensor(folder, name, lambda tensor: tensor[:1].contiguous())
    with pytest.raises(CheckpointError, match=r"kv_b_proj.weight_scale_inv: expected scales of float8_e4m3fn"):
        SourceModel(folder)


def test_eight_bits_without_block_scales_are_refused(tmp_path: Path, change_tensor: Callable[..., Any]) -> None:
    folder = tmp_path / "deepseek"
    build("deepseek_v3-fp8", folder)
    change_tensor(folder, "model.layers.1.self_attn.kv_b_proj.weight_scale_inv", None)
    with SourceModel(folder) as source, pytest.raises(UsageError, match=r"kv_b_proj\.weight is in a way that cannot"):
        read_layout(source)


def test_layers_for_speculative_decoding_are_left_out(
    tmp_path: Path, change_config: Callable[..., Any], moeq: Moeq
) -> None:
    folder = tmp_path / "glm"
    build("glm4_moe", folder)
    change_config(folder, lambda config: config.update(num_hidden_layers=1, first_k_dense_replace=0))
    with SourceModel(folder) as source, pytest.raises(CheckpointError, match="expected routers"):
        read_layout(source)
    build("qwen3_moe", tmp_path / "qwen")
    change_config(tmp_path / "qwen", lambda it: it.update(num_hidden_layers=1, num_nextn_predict_layers=1))
    with SourceModel(tmp_path / "qwen") as source:
        found = read_layout(source)
    assert [layer.block for layer in found.layers] == ["model.layers.0"]
    assert found.left_out
    assert all(name.startswith("model.layers.1.") for name in found.left_out)
    outcome = moeq("quantize", tmp_path / "qwen", "--group-size", 32, "-o", tmp_path / "out")
    assert outcome.code == 0
    assert f"note: {len(found.left_out)} tensors of layers for speculative decoding are left out" in outcome.err


@pytest.mark.parametrize("name", ["gpt_oss", "switch_transformers"])
def test_what_cannot_be_served_is_said_before_the_work(name: str, tmp_path: Path, moeq: Moeq) -> None:
    folder = tmp_path / "model"
    build(name, folder)
    reason = ARCHITECTURES[name].unserved
    assert reason is not None
    outcome = moeq("plan", folder, "--avg-bits", "2.5")
    assert outcome.code == 0
    assert f"note: vLLM cannot serve it: {reason}" in outcome.err
    text = tmp_path / "text.txt"
    text.write_text("words " * 4000)
    if ARCHITECTURES[name].uncalibrated is None:
        return
    refused = moeq("quantize", folder, "--data", text, "-o", tmp_path / "out")
    assert refused.code == 2
    assert "cannot be calibrated" in refused.err
    assert not (tmp_path / "out").exists()


CALIBRATED = [name for name in TINY if name in ARCHITECTURES and ARCHITECTURES[name].uncalibrated is None]


@pytest.mark.parametrize("name", CALIBRATED)
def test_layer_by_layer_the_model_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """One layer in memory at a time, its experts run apart: the same logits."""
    folder = tmp_path / "model"
    model = type(build(name, folder)).from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(5, 2000, (2, 24), generator=torch.Generator().manual_seed(1))
    with SourceModel(folder) as source:
        decoder = Decoder(source, read_layout(source), torch.device("cpu"), torch.float32)
        store = first_hidden(decoder, tokens, tmp_path)
        for index in range(len(decoder)):
            advance(decoder, index, store.load(index), store.create(index + 1), store)
            store.complete(index + 1)
        with decoder.head() as head:
            logits = head(store.load(len(decoder)))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    assert (logits - expected).norm() / expected.norm() < 1e-5


def test_each_linear_is_in_one_group_with_all_that_vllm_joins(layout: Layout) -> None:
    groups = linear_groups(layout)
    assert sorted(name for group in groups for name in group.names) == sorted(layout.linears)
    for group in groups:
        assert {layout.block_of(name) for name in group.names} == {layout.blocks[group.index]}
    assert split_width({base: number for number, group in enumerate(groups) for base in group.bases}) is None
