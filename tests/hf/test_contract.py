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
from vllm_moeq.hf.contract import COMPUTED, HARMLESS, require_silu
from vllm_moeq.hf.experts import RoutedExperts, packed_experts
from vllm_moeq.hf.layout import PARTS, StoredLayer
from vllm_moeq.kernels import ragged

MODELS = Path(transformers.__file__).parent / "models"
SIZE, EXPERTS = 32, 3
REFUSED = {
    "LongcatFlashExperts": "has_gate",
    "MiniMaxM3VLExperts": "limit",
    "MuseSparkExperts": r"post_expert_norm\.weight",
    "NemotronHExperts": "has_gate",
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


def layer(prefix: str = "model.layers.0.mlp.experts") -> StoredLayer:
    bits = (8, 4, 3)
    return StoredLayer(
        prefix,
        Projections(gate="gate_proj", up="up_proj", down="down_proj"),
        ragged(bits, 2 * SIZE, SIZE, SIZE),
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
    transposed = source.gate_up_proj.shape != (EXPERTS, 2 * SIZE, SIZE)
    with torch.no_grad():
        for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
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
    packed = filled(packed_experts(layer(), source))
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
    "has_gate": False,
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
    for check in (lambda: packed_experts(layer(), source), lambda: require_silu("here", source)):
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
    require_silu("here", source)


@pytest.mark.parametrize("act", [torch.nn.SiLU(), torch.nn.functional.silu, ACT2FN["swish"]])
def test_silu_by_any_name(act: Any) -> None:
    source = mixtral()
    del source.act_fn
    source.act_fn = act
    assert packed_experts(layer(), source).fused
    require_silu("here", source)


class Clamped(torch.nn.SiLU):
    """SiLU in name only."""


@pytest.mark.parametrize("act", [Clamped(), torch.nn.GELU(), torch.nn.functional.gelu, torch.tanh])
def test_another_activation_runs_in_transformers_code_only(act: Any) -> None:
    """The config says SiLU; the function object decides."""
    source = mixtral()
    del source.act_fn
    source.act_fn = act
    assert not packed_experts(layer(), source).fused
    with pytest.raises(UsageError, match=r"here: transformers' MixtralExperts\.act_fn: expected SiLU, found \w+"):
        require_silu("here", source)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("GptOssExperts", "gate_up_proj_bias"), ("DeepseekV4Experts", "_apply_gate"), ("NemotronHExperts", "has_gate")],
)
def test_calibration_refuses_what_only_transformers_code_computes(name: str, attribute: str) -> None:
    module = next(module for module, found in CLASSES if found == name)
    with pytest.raises(UsageError, match=rf"here: transformers' {name}\.{attribute}: expected .*, found"):
        require_silu("here", made(module, name))
