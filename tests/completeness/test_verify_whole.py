"""A checkpoint has every tensor of its architecture's class, and none besides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.architectures import TINY, build, quantize
from tests.folders import edit_tensors
from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import ConfigError, MoeqError

Tensors = dict[str, torch.Tensor]


def edited(folder: Path, copy: Path, change: Callable[[Tensors], Any]) -> Path:
    """Return a copy of a checkpoint with one shard and changed tensors; config.json may change too."""
    shutil.copytree(folder, copy)
    edit_tensors(copy, change)
    return copy


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function: architecture → a source and its quantized checkpoint."""
    root = tmp_path_factory.mktemp("whole")

    def get(name: str) -> tuple[Path, Path]:
        source, output = root / name, root / f"{name}-out"
        if not source.exists():
            build(name, source)
            quantize(source, output)
        return source, output

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
class TestEveryArchitecture:
    def test_is_whole(self, checkpoints: Any, name: str) -> None:
        assert verify_whole(checkpoints(name)[1]).only_experts is None

    def test_nothing_may_be_missing(self, checkpoints: Any, tmp_path: Path, name: str) -> None:
        """The first and the last tensor that is no expert's, and one in the middle."""
        output = checkpoints(name)[1]
        experts = tuple(json.loads((output / "config.json").read_text())["quantization_config"]["experts"])
        names = [
            name for shard in sorted(output.glob("*.safetensors")) for name in load_file(shard)
            if not name.startswith(experts) and not name.endswith(("weight_scale", "weight_shape"))
        ]  # fmt: skip
        for number, gone in enumerate(sorted(names)[:: len(names) // 3]):
            copy = edited(output, tmp_path / str(number), partial(without, gone))
            with pytest.raises(MoeqError, match=rf"{gone.removesuffix('_packed')}({EXPECTED}|_packed is missing)"):
                verify_whole(copy, values=False)
            shutil.rmtree(copy)


EXPECTED = r" is missing: expected \["


def without(name: str, tensors: Tensors) -> None:
    del tensors[name]


def norm(tensors: Tensors) -> torch.Tensor:
    return tensors["model.norm.weight"]


SHAPES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a short norm": (
        lambda tensors: tensors.update({"model.norm.weight": norm(tensors)[:32].clone()}),
        r"tensor model\.norm\.weight: expected \[64\], as in transformers' MixtralForCausalLM, found \[32\]",
    ),
    "a wide head": (
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(129, 64, dtype=torch.bfloat16)}),
        r"tensor lm_head\.weight: expected \[256, 64\]",
    ),
    "a bias": (
        lambda tensors: tensors.update({"model.norm.bias": norm(tensors).clone()}),
        r"model\.safetensors: tensor model\.norm\.bias: expected no such tensor",
    ),
    "a linear twice": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}),
        r"q_proj\.weight: expected it packed or not, found both",
    ),
    "eight bits": (
        lambda tensors: tensors.update({"model.norm.weight": norm(tensors).to(torch.float8_e4m3fn)}),
        r"tensor model\.norm\.weight: expected floats of 16 bits or more, found torch\.float8_e4m3fn",
    ),
    "a fifth layer": (
        lambda tensors: tensors.update({"model.layers.4.input_layernorm.weight": norm(tensors).clone()}),
        r"tensor model\.layers\.4\.input_layernorm\.weight: expected no such tensor",
    ),
}


class TestOneFault:
    @pytest.mark.parametrize("fault", SHAPES)
    def test_is_named(self, quantized_mixtral: Path, tmp_path: Path, fault: str) -> None:
        change, message = SHAPES[fault]
        with pytest.raises(MoeqError, match=message):
            verify_whole(edited(quantized_mixtral, tmp_path / "copy", change), values=False)

    def test_leftovers_of_other_tools_are_none(self, quantized_mixtral: Path, tmp_path: Path) -> None:
        def add(tensors: Tensors) -> None:
            tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

        assert verify_whole(edited(quantized_mixtral, tmp_path / "copy", add)).only_experts is None

    def test_a_tied_head_may_be_there_or_not(self, quantized_mixtral: Path, tmp_path: Path) -> None:
        with_head = edited(quantized_mixtral, tmp_path / "with", lambda _: None)
        without = edited(quantized_mixtral, tmp_path / "without", lambda tensors: tensors.pop("lm_head.weight"))
        for folder in (with_head, without):
            configure(folder, tie_word_embeddings=True)
            verify_whole(folder, values=False)
        with pytest.raises(MoeqError, match=r"tensor lm_head\.weight: expected the values of model\.embed_tokens"):
            verify_whole(with_head)
        edit_tensors(with_head, lambda them: them.update({"lm_head.weight": them["model.embed_tokens.weight"].clone()}))
        verify_whole(with_head)
        configure(without, tie_word_embeddings=False)
        with pytest.raises(MoeqError, match=r"lm_head\.weight is missing"):
            verify_whole(without, values=False)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_classes_that_others_register_do_not_count(quantized_mixtral: Path) -> None:
    """vLLM replaces config classes of transformers by its own."""
    from transformers import AutoConfig, MixtralConfig

    class Other(MixtralConfig):
        def __init__(self, **_: Any) -> None:
            raise ValueError("not this one")

    AutoConfig.register("mixtral", Other, exist_ok=True)
    try:
        assert verify_whole(quantized_mixtral).only_experts is None
    finally:
        AutoConfig.register("mixtral", MixtralConfig, exist_ok=True)


@pytest.mark.parametrize("named", [None, []])
def test_no_architecture(named: Any, quantized_mixtral: Path, tmp_path: Path) -> None:
    """vLLM would build the class without the layer that gives logits."""
    folder = tmp_path / "copy"
    shutil.copytree(quantized_mixtral, folder)
    configure(folder, architectures=named)
    with pytest.raises(ConfigError, match=r"config\.json: architectures: expected the name of the model's class"):
        verify_whole(folder, values=False)


@pytest.mark.parametrize("named", [["MixtralForCausalLM"], ["MIXTRALFORCAUSALLM"]])
def test_architectures_of_the_config(named: Any, quantized_mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized_mixtral, folder)
    configure(folder, architectures=named)
    assert verify_whole(folder, values=False).only_experts is None


@pytest.mark.parametrize("named", ["GPT2LMHeadModel", "NoSuchModel", "PhiMoEForCausalLM", "Qwen3MoeForCausalLM"])
def test_architectures_of_another_model(named: str, quantized_mixtral: Path, tmp_path: Path) -> None:
    """vLLM builds the class that is named, whatever model_type says, and knows more names than transformers."""
    folder = tmp_path / "copy"
    shutil.copytree(quantized_mixtral, folder)
    configure(folder, architectures=["MixtralForCausalLM", named])
    with pytest.raises(MoeqError, match=r"config\.json: architectures: expected a class of model_type mixtral"):
        verify_whole(folder, values=False)


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"num_hidden_layers": 100_000_000},
                r"config\.json: num_hidden_layers: expected a positive integer .*, found 1000",
            ),
            ({"num_hidden_layers": 3}, r"num_hidden_layers: expected 0 to 2 layers, found 3"),
            ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\.\S+: expected no such tensor"),
            ({"num_hidden_layers": float("nan")}, r"num_hidden_layers: expected a number .*, found nan"),
            ({"num_hidden_layers": -1}, r"num_hidden_layers: expected a positive integer .* found -1"),
            ({"num_hidden_layers": "2"}, "num_hidden_layers: expected a positive integer"),
            ({"hidden_size": 0}, "hidden_size: expected a positive integer"),
            ({"vocab_size": 1 << 40}, "vocab_size: expected a positive integer"),
            ({"num_attention_heads": 3}, "config.json: transformers cannot build the model|expected"),
            ({"vision_config": {"num_hidden_layers": 10**9}}, r"vision_config\.num_hidden_layers: expected 0 to 2"),
        ],
    )
    def test_is_compared_with_the_files(
        self, quantized_mixtral: Path, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(quantized_mixtral, folder)
        configure(folder, **changes)
        with pytest.raises(MoeqError, match=message):
            verify_whole(folder, values=False)

    def test_without_a_class_only_experts_are_checked(self, quantized_mixtral: Path, tmp_path: Path) -> None:
        gone = "model.layers.0.input_layernorm.weight"
        folder = edited(quantized_mixtral, tmp_path / "copy", lambda tensors: tensors.pop(gone))
        configure(folder, model_type="mixtral_of_tomorrow")
        assert "no class for model_type 'mixtral_of_tomorrow'" in str(verify_whole(folder).only_experts)

    def test_the_last_norm_is_required_without_a_class_too(self, quantized_mixtral: Path, tmp_path: Path) -> None:
        folder = edited(quantized_mixtral, tmp_path / "copy", lambda tensors: tensors.pop("model.norm.weight"))
        configure(folder, model_type="mixtral_of_tomorrow")
        with pytest.raises(MoeqError, match=r"model\.norm\.weight is missing: expected \[64\]"):
            verify_whole(folder)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_hidden_layers": 3}, "ConfigError"),
        ({"num_hidden_layers": 1}, "CheckpointError"),
        ({"hidden_size": 0}, "ConfigError"),
        ({"hidden_size": 32}, "CheckpointError"),
        ({"vocab_size": 1 << 40}, "ConfigError"),
        ({"vocab_size": 512}, "CheckpointError"),
    ],
)
def test_wrong_sizes_are_found_without_transformers(
    quantized_mixtral: Path, tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    """Importing a class of transformers takes seconds and hundreds of megabytes."""
    folder = tmp_path / "copy"
    shutil.copytree(quantized_mixtral, folder)
    configure(folder, **changes)
    script = (
        "import sys; from pathlib import Path; from vllm_moeq.completeness import verify_whole\n"
        "try: verify_whole(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert run.stdout == f"{error} False\n"
