from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_moeq.format import BIT_WIDTHS, BlockRotation, dequantize, pack
from vllm_moeq.kernels import PackedExperts, PackedMatrices, dense_expert, moe, ragged
from vllm_moeq.kernels.operator import arguments

HIDDEN, INTERMEDIATE, TOKENS = 128, 256, 9
MIXED = [1, 2, 3, 4, 8]


@dataclass(frozen=True)
class Matrices:
    """One projection of every expert: codes, scales, zeros, and the words as the kernel takes them."""

    bits: list[int]
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def kernel(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        words = [pack(codes, bits).flatten() for codes, bits in zip(self.codes, self.bits, strict=True)]
        return torch.cat(words), self.scales, self.zeros

    def exact(self, expert: int) -> torch.Tensor:
        size = self.codes.shape[2] // self.scales.shape[2]
        scale, zero = (t[expert].double().repeat_interleave(size, dim=1) for t in (self.scales, self.zeros))
        return (self.codes[expert].double() - zero) * scale


@dataclass(frozen=True)
class Layer:
    """A layer with random codes."""

    bits: list[int]
    group_size: int
    w13: Matrices
    w2: Matrices

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return moe(x, weights, ids, self.packed())

    def packed(self, offset: int = 0, sizes: tuple[int, int] = (0, 0)) -> PackedExperts:
        """Return the layer as the operator takes it, maybe rotated in blocks of some sizes."""
        hidden, intermediate, size = self.w13.codes.shape[2], self.w2.codes.shape[2], self.group_size
        first = ragged(self.bits, 2 * intermediate, hidden, size)
        second = ragged(self.bits, hidden, intermediate, size, offset)
        turned = [
            BlockRotation(torch.zeros(it.columns // 32, dtype=torch.int32), size) if size else None
            for it, size in zip((first, second), sizes, strict=True)
        ]
        return PackedExperts(
            PackedMatrices(first, *self.w13.kernel(), rotation=turned[0]),
            PackedMatrices(second, *self.w2.kernel(), rotation=turned[1]),
        )

    def exact(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Token by token and expert by expert, in float64."""
        result = torch.zeros(x.shape, dtype=torch.float64)
        for token in range(x.shape[0]):
            for slot in range(ids.shape[1]):
                expert = int(ids[token, slot])
                if expert < 0:
                    continue
                gate, up = (self.w13.exact(expert) @ x[token].double()).chunk(2)
                hidden = gate * torch.sigmoid(gate) * up
                result[token] += float(weights[token, slot]) * (self.w2.exact(expert) @ hidden)
        return result


def matrices(bits: list[int], rows: int, columns: int, group_size: int, seed: int) -> Matrices:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size < 0 else columns // group_size
    codes = torch.stack([torch.randint(0, 2**b, (rows, columns), generator=generator) for b in bits]).to(torch.uint8)
    steps = torch.tensor([2.0**b - 1 for b in bits])[:, None, None]
    scales = (0.5 + torch.rand(len(bits), rows, groups, generator=generator)) * 0.2 / steps
    zeros = (0.3 + 0.4 * torch.rand(len(bits), rows, groups, generator=generator)) * steps
    return Matrices(bits, codes, scales.half(), zeros.half())


def layer(bits: list[int], group_size: int = 64, intermediate: int = INTERMEDIATE) -> Layer:
    w13 = matrices(bits, 2 * intermediate, HIDDEN, group_size, seed=1)
    return Layer(bits, group_size, w13, matrices(bits, HIDDEN, intermediate, group_size, seed=2))


def inputs(experts: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weights, ids = torch.rand(TOKENS, experts, generator=generator).topk(min(2, experts), dim=1)
    return x, weights, ids


def assert_near(found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < tolerance


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_identity_times_an_expert_is_its_weights_bit_for_bit(bits: int, group_size: int) -> None:
    down = matrices([2, bits], 96, HIDDEN, group_size, seed=4)
    layout = ragged([2, bits], 96, HIDDEN, group_size)
    product = torch.eye(HIDDEN) @ dense_expert(layout, 1, *down.kernel(), torch.float32).T
    assert torch.equal(product, dequantize(down.codes[1], down.scales[1], down.zeros[1]).T)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_bfloat16_weights_are_rounded_once(bits: int) -> None:
    down = matrices([bits], 96, HIDDEN, 64, seed=5)
    found = dense_expert(ragged([bits], 96, HIDDEN, 64), 0, *down.kernel(), torch.bfloat16)
    assert torch.equal(found, dequantize(down.codes[0], down.scales[0], down.zeros[0]).bfloat16())


@pytest.mark.parametrize("bits", [*([b] * 3 for b in BIT_WIDTHS), MIXED, [8, 1, 3, 3, 2, 1, 4, 2]])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_layer_is_near_float64(bits: list[int], group_size: int, dtype: torch.dtype, tolerance: float) -> None:
    subject = layer(bits, group_size)
    x, weights, ids = inputs(len(bits), dtype)
    found = subject.run(x, weights, ids)
    assert found.dtype == dtype
    assert_near(found, subject.exact(x, weights, ids), tolerance)


def test_bfloat16_scales_and_zeros() -> None:
    half = layer(MIXED)
    w13, w2 = (Matrices(m.bits, m.codes, m.scales.bfloat16(), m.zeros.bfloat16()) for m in (half.w13, half.w2))
    subject = Layer(MIXED, half.group_size, w13, w2)
    x, weights, ids = inputs(len(MIXED))
    assert_near(subject.run(x, weights, ids), subject.exact(x, weights, ids), 1e-5)


@pytest.mark.parametrize("expert", range(5))
def test_all_tokens_on_one_expert(expert: int) -> None:
    subject = layer(MIXED)
    x, weights, _ = inputs(len(MIXED))
    ids = torch.full((TOKENS, 1), expert)
    assert_near(subject.run(x, weights[:, :1], ids), subject.exact(x, weights[:, :1], ids), 1e-5)


def test_experts_with_one_token_and_with_none() -> None:
    subject = layer(MIXED)
    x, weights, _ = inputs(len(MIXED))
    ids = torch.full((TOKENS, 1), 4)
    ids[3] = 0
    assert_near(subject.run(x, weights[:, :1], ids), subject.exact(x, weights[:, :1], ids), 1e-5)


def test_a_token_may_choose_one_expert_twice() -> None:
    subject = layer(MIXED)
    x, weights, _ = inputs(len(MIXED))
    ids = torch.full((TOKENS, 2), 2)
    assert_near(subject.run(x, weights, ids), subject.exact(x, weights, ids), 1e-5)


def test_tokens_without_a_local_expert_are_zero() -> None:
    subject = layer(MIXED)
    x, weights, ids = inputs(len(MIXED))
    ids[2] = ids[5] = -1
    found = subject.run(x, weights, ids)
    assert found.abs().amax(dim=1).eq(0).tolist() == [row in (2, 5) for row in range(TOKENS)]


def test_one_local_expert_of_two_counts_alone() -> None:
    subject = layer(MIXED)
    x, weights, ids = inputs(len(MIXED))
    ids[::2, 0] = -1
    assert_near(subject.run(x, weights, ids), subject.exact(x, weights, ids), 1e-5)


def test_no_tokens() -> None:
    subject = layer(MIXED)
    assert subject.run(*(t[:0] for t in inputs(len(MIXED)))).shape == (0, HIDDEN)


def test_int32_ids_mean_the_same() -> None:
    subject = layer(MIXED)
    x, weights, ids = inputs(len(MIXED))
    assert torch.equal(subject.run(x, weights, ids.int()), subject.run(x, weights, ids))


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_of_the_intermediate_dimension_add_up(group_size: int, dtype: torch.dtype) -> None:
    """384 columns in groups of 128: the second half begins in the middle of a group."""
    intermediate, half = 384, 192
    whole = layer(MIXED, group_size, intermediate)
    x, weights, ids = inputs(len(MIXED), dtype)
    total = torch.zeros(TOKENS, HIDDEN)
    for begin in (0, half):
        rows = [*range(begin, begin + half), *range(intermediate + begin, intermediate + begin + half)]
        w13 = Matrices(MIXED, *(t[:, rows] for t in (whole.w13.codes, whole.w13.scales, whole.w13.zeros)))
        size = intermediate if group_size < 0 else group_size
        groups = slice(begin // size, -(-(begin + half) // size))
        codes = whole.w2.codes[:, :, begin : begin + half]
        w2 = Matrices(MIXED, codes, whole.w2.scales[..., groups], whole.w2.zeros[..., groups])
        part = Layer(MIXED, group_size, w13, w2)
        total += moe(x, weights, ids, part.packed(begin % size)).float()
    assert_near(total, whole.exact(x, weights, ids), 1e-5 if dtype == torch.float32 else 1e-2)


def test_an_offset_selects_the_groups_of_the_slice() -> None:
    down = matrices([3], 64, 256, 128, seed=6)
    words = pack(down.codes[0, :, 96:224], 3).flatten()
    found = dense_expert(ragged([3], 64, 128, 128, 96), 0, words, down.scales, down.zeros, torch.float32)
    assert torch.equal(found, dequantize(down.codes[0], down.scales[0], down.zeros[0])[:, 96:224])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_equals_an_eager_one(backend: str) -> None:
    subject = layer(MIXED)
    x, weights, ids = inputs(len(MIXED))
    compiled = torch.compile(lambda x: subject.run(x * 2, weights, ids) + 1, backend=backend, fullgraph=False)
    assert torch.equal(compiled(x), subject.run(x * 2, weights, ids) + 1)


def test_the_compiler_sees_one_operator() -> None:
    subject = layer(MIXED)
    x, weights, ids = inputs(len(MIXED))
    packed = subject.packed()
    compiled = torch.compile(lambda x: moe(x, weights, ids, packed), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), subject.run(x, weights, ids))


def test_the_operator_is_well_formed() -> None:
    subject = layer(MIXED)
    operator = torch.ops.vllm_moeq.moe.default
    for sizes in ((0, 0), (32, 32), (0, 32)):
        described = arguments(subject.packed(sizes=sizes), torch.empty(0))
        results = torch.library.opcheck(operator, (*inputs(len(MIXED)), *described))
        assert set(results.values()) == {"SUCCESS"}


def test_the_result_is_no_view_of_the_input() -> None:
    subject = layer(MIXED)
    x, weights, ids = inputs(len(MIXED))
    before = x.clone()
    subject.run(x, weights, ids).zero_()
    assert torch.equal(x, before)


def test_the_buffer_is_as_long_as_its_widths() -> None:
    layout = ragged(MIXED, 10, 64, 32)
    assert layout.num_words == 10 * 64 * sum(MIXED) // 32
    assert layout.offsets[:3] == (0, 20, 60)
