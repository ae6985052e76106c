"""Every class of experts that transformers has: computed as its own code does, or refused with the attribute's name."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from vllm_moeq.format import PACKED, SCALE, Projections, UsageError
from vllm_moeq.hf.contract import COMPUTED, HARMLESS, is_gated, require_computed
from vllm_moeq.hf.experts import RoutedExperts, packed_experts
from vllm_moeq.hf.layout import PARTS, StoredLayer
from vllm_moeq.kernels import SILU, Activation, ragged

MODELS = Path(transformers.__file__).parent / "models"
SIZE, EXPERTS = 32, 3
REFUSED = {
    "LongcatFlashExperts": "has_gate",
    "MuseSparkExperts": r"post_expert_norm\.weight",
    "Step3p7Experts": "has_gate",
}
"""The classes that cannot be loaded, and the attribute that the message names."""


def classes() -> Iterator[tuple[str, str]]:
    """Yield module and name of every class of experts in transformers' sources."""
    for path in sorted(MODELS.rglob("modeling_*.py")):
        text = path.read_text()
        if "gate_up_proj" not in text and "use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Experts"):
                source = ast.unparse(node)
                if "use_experts_implementation" in source or "self.gate_up_proj" in source:
                    yield ".".join(("transformers.models", *path.relative_to(MODELS).with_suffix("").parts)), node.name


CLASSES = list(classes())

SWIGLU_OAI, CLAMPED = Activation(alpha=1.702, limit=7.0, beta=1.0), Activation(limit=10.0)
IN_KERNELS = {
    "DeepseekV4Experts": CLAMPED,
    "DiffusionGemmaTextExperts": Activation("gelu_tanh"),
    "Gemma4TextExperts": Activation("gelu_tanh"),
    "Glm5NextTextExperts": CLAMPED,
    "GptOssExperts": SWIGLU_OAI,
    "HYV4Experts": CLAMPED,
    "MiniMaxM3VLExperts": SWIGLU_OAI,
    "NemotronHExperts": Activation("relu2", gated=False),
    "OpenAIPrivacyFilterExperts": SWIGLU_OAI,
}
"""What the kernels compute of a class, where it is not silu(gate)·up."""


def made(module: str, name: str) -> torch.nn.Module:
    """Return an instance with experts of 32 inputs and outputs, from the class's own config."""
    namespace = importlib.import_module(module)
    kind = getattr(namespace, name)
    init = inspect.unwrap(kind.__init__)
    annotation = inspect.signature(init, eval_str=True).parameters["config"].annotation
    config = first_config(namespace) if annotation is inspect.Parameter.empty else annotation().get_text_config()
    for attribute in init.__code__.co_names:
        if isinstance(getattr(config, attribute, None), list):
            continue  # one for text, one for images: an argument says which
        if "size" in attribute or "dim" in attribute:
            setattr(config, attribute, SIZE)
        elif ("expert" in attribute and "num" in attribute) or attribute.startswith("n_"):
            setattr(config, attribute, EXPERTS)
    config._experts_implementation = "eager"
    more = {it: SIZE for it in inspect.signature(init).parameters if it == "intermediate_size"}
    return kind(config, **more).eval()


def first_config(namespace: Any) -> Any:
    """Return the config of a module's first model, for classes that do not say which they take."""
    found = (it.config_class for it in vars(namespace).values() if getattr(it, "config_class", None))
    return next(found)().get_text_config()


def layer(prefix: str = "model.layers.0.mlp.experts", gated: bool = True) -> StoredLayer:
    bits = (8, 4, 3)
    plain = Projections(gate="up_proj", down="down_proj")
    return StoredLayer(
        prefix,
        Projections(gate="gate_proj", up="up_proj", down="down_proj") if gated else plain,
        ragged(bits, (1 + gated) * SIZE, SIZE, SIZE),
        ragged(bits, SIZE, SIZE, SIZE),
        (None, None),
        0.0,
    )


def filled(module: RoutedExperts) -> RoutedExperts:
    """Give packed experts random codes, and scales with which activations stay near 1."""
    for part in PARTS:
        for suffix in module.layer.matrices(part).suffixes:
            buffer = module.get_buffer(f"{part}_{suffix}")
            if suffix == PACKED:
                buffer.random_(-(2**31), 2**31 - 1)
            else:
                buffer.fill_(0.02 if suffix == SCALE else 4.0)
    return module


def copy_weights(packed: RoutedExperts, source: Any) -> None:
    """Give transformers' module the values of the packed experts, in its own layout."""
    first = "gate_up_proj" if hasattr(source, "gate_up_proj") else "up_proj"
    transposed = getattr(source, first).shape[1:] == (SIZE, 2 * SIZE)
    with torch.no_grad():
        for name, part in ((first, "gate_up"), ("down_proj", "down")):
            for expert in range(EXPERTS):
                dense = packed.packed(part).dense(expert, torch.float32)
                if packed.interleaved and part == "gate_up":
                    dense = torch.stack(dense.chunk(2), dim=1).flatten(0, 1)
                getattr(source, name)[expert].copy_(dense.mT if transposed else dense)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize(("module", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_class_is_computed_or_refused(module: str, name: str) -> None:
    torch.manual_seed(0)
    source = made(module, name)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if name in REFUSED:
        with pytest.raises(UsageError, match=rf"{name}\.{REFUSED[name]}: expected .*, found "):
            packed_experts(layer(), source)
        return
    packed = filled(packed_experts(layer(gated=is_gated(source)), source))
    assert packed.known == IN_KERNELS.get(name, SILU)
    copy_weights(packed, source)
    if name == "Llama4TextExperts":
        arguments: tuple[torch.Tensor, ...] = (torch.randn(EXPERTS * 5, SIZE) * 2,)
    else:
        ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(5)])
        arguments = (torch.randn(5, SIZE) * 2, ids, torch.rand(5, 2))
    with torch.no_grad():
        expected, found = source(*arguments), packed(*arguments)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def mixtral(**changes: Any) -> Any:
    """Return Mixtral's experts with other attributes."""
    source: Any = made("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")
    for name, value in changes.items():
        setattr(source, name, value)
    return source


CHANGES: dict[str, Any] = {
    "swiglu_limit": 7.0,
    "limit": 0,
    "alpha": 1.702,
    "_is_expert_parallel": True,
    "scale_inputs": True,
    "forward": torch.nn.functional.silu,
    "post_norm": torch.nn.LayerNorm(SIZE),
    "shared": torch.nn.Identity(),
    "gate_bias": torch.nn.Parameter(torch.zeros(3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_be_left_out_is_refused_by_name(name: str) -> None:
    source = mixtral(**{name: CHANGES[name]})
    for check in (lambda: packed_experts(layer(), source), lambda: require_computed("here", source)):
        with pytest.raises(UsageError, match=rf"transformers' MixtralExperts\.{name}\S*: expected .*, found ") as error:
            check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*COMPUTED, *HARMLESS])
def test_every_row_of_the_tables_is_there(name: str) -> None:
    sources = (made(*it) for it in CLASSES if it[1] in ("MixtralExperts", "GptOssExperts", "Llama4TextExperts"))
    assert name == "_is_hf_initialized" or any(hasattr(source, name) for source in sources)


def test_a_value_of_the_class_counts_as_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    source = mixtral()
    monkeypatch.setattr(type(source), "input_scale", 2.0, raising=False)
    with pytest.raises(UsageError, match=r"MixtralExperts\.input_scale: expected experts without it, found 2\.0"):
        packed_experts(layer(), source)


def test_flags_that_say_no_are_nothing() -> None:
    source = mixtral(has_something=False, limit=None)
    assert packed_experts(layer(), source).fused
    assert require_computed("here", source) == SILU


@pytest.mark.parametrize("act", [torch.nn.SiLU(), torch.nn.functional.silu, ACT2FN["swish"]])
def test_silu_by_any_name(act: Any) -> None:
    source = mixtral()
    del source.act_fn
    source.act_fn = act
    assert packed_experts(layer(), source).fused
    assert require_computed("here", source) == SILU


class Clamped(torch.nn.SiLU):
    """SiLU in name only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return SiLU of numbers up to a limit that only this class knows."""
        return super().forward(x.clamp(max=250.0))


@pytest.mark.parametrize("act", [Clamped(), torch.nn.GELU(), torch.nn.functional.gelu, torch.tanh])
def test_another_activation_runs_in_transformers_code_only(act: Any) -> None:
    """The config says SiLU; the function object decides."""
    source = mixtral()
    del source.act_fn
    source.act_fn = act
    assert not packed_experts(layer(), source).fused
    message = r"here: transformers' MixtralExperts\.act_fn: expected silu or gelu_tanh or relu2, found \w+"
    with pytest.raises(UsageError, match=message):
        require_computed("here", source)


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu_new", "relu2"])
def test_a_function_is_recognized_by_what_it_computes(act: str) -> None:
    source = mixtral(act_fn=ACT2FN[act])
    packed = packed_experts(layer(), source)
    assert packed.known == require_computed("here", source) == Activation("relu2" if act == "relu2" else "gelu_tanh")


def instance(name: str) -> Any:
    return made(next(module for module, found in CLASSES if found == name), name)


def test_a_limit_that_the_gate_uses_otherwise_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's own code decides, whatever attributes are called."""
    source = instance("DeepseekV4Experts")

    def gate(self: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        result: torch.Tensor = self.act_fn(first).clamp(max=self.limit) * second
        return result

    monkeypatch.setattr(type(source), "_apply_gate", gate)
    message = r"here: transformers' DeepseekV4Experts\._apply_gate: expected .*, found one with .*limit=10"
    with pytest.raises(UsageError, match=message):
        require_computed("here", source)
    assert not packed_experts(layer(), source).fused


@pytest.mark.parametrize(("name", "stored"), [("NemotronHExperts", True), ("MixtralExperts", False)])
def test_a_checkpoint_with_another_number_of_projections_is_refused(name: str, stored: bool) -> None:
    with pytest.raises(
        UsageError, match=rf"{name}\.has_gate: expected {stored}, as in the checkpoint, found {not stored}"
    ):
        packed_experts(layer(gated=stored), instance(name))


def test_a_mark_that_its_tensors_do_not_bear_out_is_refused() -> None:
    with pytest.raises(UsageError, match=r"MixtralExperts\.gate_up_proj: expected no such tensor"):
        packed_experts(layer(), mixtral(has_gate=False))
