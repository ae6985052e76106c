from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.kernels.layers import Coding, exact, mixed_layer, random_layer, random_routing
from tests.kernels.rotations import Rotations, random_rotation, rotated, turned
from tests.paths import ROOT
from vllm_moeq.format import GRID, PACKED, TRELLIS_SCHEME, BlockRotation, UsageError
from vllm_moeq.kernels import (
    BACKENDS,
    FALLBACK,
    TABLE,
    PackedExperts,
    PackedMatrices,
    choose,
    choose_linear,
    make_layer,
)
from vllm_moeq.kernels.cpu import build


@pytest.fixture
def packed() -> PackedExperts:
    return random_layer([3, 1, 2], 128, 64, 64)


def rotated_layer(experts: list[Coding], sizes: tuple[int, int]) -> PackedExperts:
    """Return a layer with rotations of these sizes; 0 stands for none."""
    both = (random_rotation(columns, size) if size else None for columns, size in zip((128, 64), sizes, strict=True))
    return turned(mixed_layer(experts, 128, 64), Rotations(*both))


def pretend_on_gpu(packed: PackedExperts) -> None:
    """Let the words look as if they lay on a GPU; nothing is launched."""
    packed.gate_up.tensors[PACKED] = type("Words", (), {"device": torch.device("cuda")})()


@pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there")
def test_a_cpu_gets_the_native_kernel(packed: PackedExperts) -> None:
    assert choose(packed).backend == "native"
    assert choose(packed, "reference").backend == "reference"
    assert make_layer(packed, torch.float32).name == "native"


def test_a_gpu_gets_triton(packed: PackedExperts) -> None:
    pretend_on_gpu(packed)
    assert choose(packed).backend == "triton"


def test_the_table_is_whole() -> None:
    assert BACKENDS == ("auto", "triton", "humming", "native", "reference")
    assert FALLBACK.automatic is None
    assert FALLBACK.dtypes is None
    assert FALLBACK.problem(torch.device("meta")) == ""
    for row in TABLE[:-1]:
        assert row.automatic is not None
        assert row.rotated == (row.name != "humming")
        assert row.schemes == (("grid", "trellis") if row.rotated else ("grid",))


TRELLISES: list[Coding] = [(TRELLIS_SCHEME, 2), (GRID, 3)]


@pytest.mark.parametrize(("experts", "sizes"), [(TRELLISES, (0, 0)), ([(GRID, 3)], (0, 32)), (TRELLISES, (64, 32))])
def test_a_gpu_gets_triton_for_trellises_and_rotated_layers(experts: list[Coding], sizes: tuple[int, int]) -> None:
    packed = rotated_layer(experts, sizes)
    packed.gate_up.tensors[packed.gate_up.matrices.suffixes[0]] = type("W", (), {"device": torch.device("cuda")})()
    assert choose(packed).backend == "triton"
    assert choose(packed, dtype=torch.bfloat16).backend == "triton"
    assert choose(packed, dtype=torch.float32).backend == "reference"


@pytest.mark.parametrize(
    ("experts", "sizes", "message"),
    [
        (TRELLISES, (0, 0), "takes experts of the scheme grid, found trellis"),
        ([(GRID, 3)], (0, 32), "takes experts that are not rotated, found rotated ones"),
    ],
)
def test_humming_refuses(
    experts: list[Coding], sizes: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moeq.kernels.humming.available", lambda: True)
    for ask in (choose, lambda packed, backend: make_layer(packed, torch.float16, backend)):
        with pytest.raises(UsageError, match=f"^VLLM_MOEQ_BACKEND: the humming kernel {message}$"):
            ask(rotated_layer(experts, sizes), "humming")


def as_if_rotated(packed: PackedExperts) -> PackedExperts:
    """Return the layer as if its inputs had to be rotated."""
    first, rotation = packed.gate_up, BlockRotation(torch.zeros(packed.hidden // 32, dtype=torch.int32), 64)
    return PackedExperts(PackedMatrices(first.matrices, *first.tensors.values(), rotation=rotation), packed.down)


@pytest.mark.parametrize("backend", [row.name for row in TABLE if not row.rotated])
def test_a_kernel_that_cannot_rotate_is_refused(
    packed: PackedExperts, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moeq.kernels.humming.available", lambda: True)
    with pytest.raises(
        UsageError, match=f"the {backend} kernel takes experts that are not rotated, found rotated ones"
    ):
        make_layer(as_if_rotated(packed), torch.float16, backend)
    assert choose(packed, backend).backend == backend


def test_auto_passes_over_a_kernel_that_cannot_rotate(packed: PackedExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vllm_moeq.kernels.backends.TABLE", tuple(replace(row, rotated=row is FALLBACK) for row in TABLE)
    )
    choice = choose(as_if_rotated(packed))
    assert (choice.backend, choice.reason) == ("reference", "the native kernel does not take rotated experts")


def test_auto_minds_the_dtype_if_it_is_told(packed: PackedExperts) -> None:
    pretend_on_gpu(packed)
    assert choose(packed, dtype=torch.bfloat16).backend == "triton"
    choice = choose(packed, dtype=torch.float32)
    assert (choice.backend, choice.reason) == ("reference", "the triton kernel does not take torch.float32")


def test_a_device_that_no_kernel_is_for() -> None:
    packed = random_layer([3], 64, 32, 32, device="cpu")
    packed.gate_up.tensors[PACKED] = packed.gate_up.words.to("meta")
    choice = choose(packed)
    assert (choice.backend, choice.reason) == ("reference", "no kernel runs on meta")


def test_native_is_for_cpus(packed: PackedExperts) -> None:
    pretend_on_gpu(packed)
    with pytest.raises(UsageError, match="VLLM_MOEQ_BACKEND=native: expected a CPU, found device cuda"):
        choose(packed, "native")


@pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there")
def test_who_takes_other_linears() -> None:
    for requested in ("auto", "native"):
        row, reason = choose_linear(requested)
        assert row is not None
        assert (row.name, reason) == ("native", "")
    for requested in ("reference", "triton", "cutlass"):
        assert choose_linear(requested) == (None, "VLLM_MOEQ_BACKEND asks for it")


@pytest.mark.parametrize(("group_size", "offset"), [(64, 0), (64, 32), (-1, 0)])
def test_a_compiled_reference_is_one_operator(group_size: int, offset: int) -> None:
    layer = make_layer(random_layer([3, 1, 2], 128, 160, group_size, offset), torch.float32, "reference")
    weights, ids = random_routing(5, 3, 2)
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(0))
    graphs = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(lambda *it: layer(*it), backend=note, fullgraph=True)
    assert torch.equal(compiled(x, weights, ids), layer(x, weights, ids))
    assert graphs == [[torch.ops.vllm_moeq.moe]]


def test_an_unknown_backend_is_refused(packed: PackedExperts) -> None:
    with pytest.raises(UsageError, match=r"VLLM_MOEQ_BACKEND: expected one of auto, triton.*found cutlass"):
        choose(packed, "cutlass")


def test_humming_without_a_gpu_is_refused(packed: PackedExperts) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="humming"):
        make_layer(packed, torch.float16, "humming")


def test_triton_without_gpu_or_interpreter_is_refused() -> None:
    """In its own process: this one has the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = """
import torch
from tests.kernels.layers import random_layer
from vllm_moeq.format import PACKED, UsageError
from vllm_moeq.kernels import make_layer
try:
    make_layer(random_layer([3], 64, 32, 32), torch.float16, "triton")
except UsageError as error:
    print(error)
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.stdout.strip() == "VLLM_MOEQ_BACKEND=triton: expected a GPU and the triton package, found device cpu"


def test_float32_activations_are_refused(packed: PackedExperts) -> None:
    with pytest.raises(UsageError, match=r"--dtype: the triton kernels take float16 or bfloat16, found torch\.float32"):
        make_layer(packed, torch.float32, "triton")


@pytest.mark.parametrize("backend", ["reference", "triton", "native"])
def test_backends_agree_on_rotated_trellises(backend: str) -> None:
    if backend == "native" and build.problem():
        pytest.skip(build.problem())
    packed = rotated_layer([(TRELLIS_SCHEME, 2), (GRID, 3), (TRELLIS_SCHEME, 3)], (64, 32))
    layer = make_layer(packed, torch.float16, backend)
    weights, ids = random_routing(3, 3, 2)
    x = torch.randn((3, 128), generator=torch.Generator().manual_seed(0)).half()
    before_up = rotated(x, packed.gate_up.rotation)
    expected = exact(packed, before_up, weights, ids, lambda inner: rotated(inner, packed.down.rotation))
    assert (layer(x, weights, ids).double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("backend", ["reference", "triton", "native"])
def test_backends_agree(packed: PackedExperts, backend: str) -> None:
    if backend == "native" and build.problem():
        pytest.skip(build.problem())
    layer = make_layer(packed, torch.float16, backend)
    assert layer.name == backend
    weights, ids = random_routing(5, 3, 2)
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(0)).half()
    expected = exact(packed, x, weights, ids)
    assert (layer(x, weights, ids).double() - expected).norm() < 2e-3 * expected.norm()
