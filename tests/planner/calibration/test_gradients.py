"""Gradients taken layer by layer, and the second-order terms made of them, against autograd on the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.calibration.kl.gradients import backward
from planner.calibration.kl.second_order import WEIGHT, elementwise, isotropic, projected, second_order
from planner.calibration.reading.expert import ExpertWeights
from planner.calibration.reading.rounded import rounded
from planner.common.progress import Progress
from tests.paths import MIXTRAL, MODELS, SHIPPED
from tests.planner.calibration.layers import reading
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.kernels import SILU

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
QUIET = Progress(quiet=True)
TERMS = {"projected": projected, "isotropic": isotropic, "gemq": elementwise}


@dataclass
class Whole:
    """The same model in memory, in float64; something may be added to the output of each layer's experts.

    Attributes:
        added: layer index → what is added [tokens, hidden].
        seen: layer index → what the experts were called with: inputs, expert ids, weights.
    """

    folder: Path
    added: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float64, experts_implementation="eager"
        )
        self.model.requires_grad_(False)
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp.experts.register_forward_hook(
                lambda _module, inputs, output, index=index: self._note(index, inputs, output)
            )

    def _note(self, index: int, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self.seen[index] = tuple(value.detach() for value in inputs)
        return output + self.added[index] if index in self.added else output

    def likely(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [sequences, length, vocabulary]."""
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.double().log_softmax(dim=-1)

    def gradients(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return ∂(−Σ log p(next token)) / ∂(output of the experts) of each layer [tokens, hidden]."""
        size = (tokens.numel(), self.model.config.hidden_size)
        layers = range(len(self.model.model.layers))
        self.added = {index: torch.zeros(size, dtype=torch.float64, requires_grad=True) for index in layers}
        loss = -self.likely(tokens)[:, :-1].gather(2, tokens[:, 1:, None]).sum()
        found = torch.autograd.grad(loss, list(self.added.values()))
        self.added = {}
        return list(found)

    def expert(self, index: int, number: int) -> ExpertWeights:
        """Return one expert's matrices, float32."""
        fused = self.model.model.layers[index].mlp.experts
        gate, up = fused.gate_up_proj[number].float().chunk(2)
        return ExpertWeights((gate, up), fused.down_proj[number].float())


def random_tokens(folder: Path, sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    return torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=["tiny_mixtral", "tiny_qwen3_moe", *SHIPPED])
def folder(request: pytest.FixtureRequest) -> Path:
    name = str(request.param)
    return Path(request.getfixturevalue(name)) if name.startswith("tiny") else MODELS / name


def test_gradients_of_every_layer_are_those_of_autograd(folder: Path, tmp_path: Path) -> None:
    tokens = random_tokens(folder, 3, 40)
    whole = Whole(folder)
    expected = whole.gradients(tokens)
    with reading(folder, tokens, tmp_path) as read:
        decoder, store = read.decoder, read.store
        steps = []
        for step in backward(decoder, store, tokens, "text", 0):
            steps.append(step.index)
            inputs, ids, weights = whole.seen[step.index]
            assert relative(step.routed.outputs, expected[step.index]) < 1e-4
            assert relative(step.routed.inputs, inputs) < 1e-4
            assert torch.equal(step.routed.ids, ids)
            assert torch.allclose(step.routed.weights.double(), weights.double(), atol=1e-5)
    assert steps == list(reversed(range(len(expected))))


def test_neither_batches_nor_further_sequences_of_the_store_matter(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(tiny_mixtral, 5, 40)
    expected = Whole(tiny_mixtral).gradients(tokens[:3])
    with reading(tiny_mixtral, tokens, tmp_path) as read:
        decoder, store = read.decoder, read.store
        monkeypatch.setattr("planner.calibration.reading.routed.ROWS", 80)  # two sequences at a time
        monkeypatch.setattr("planner.calibration.kl.gradients.LOGITS", 256 * 7)
        for step in backward(decoder, store, tokens[:3], "text", 0):
            assert relative(step.routed.outputs, expected[step.index]) < 1e-4


def test_sampled_labels_follow_the_seed(tiny_mixtral: Path, tmp_path: Path) -> None:
    tokens = random_tokens(tiny_mixtral, 2, 20)
    with reading(tiny_mixtral, tokens, tmp_path) as read:
        decoder, store = read.decoder, read.store
        one, same, other = (
            next(backward(decoder, store, tokens, "sampled", seed)).routed.outputs.clone() for seed in (1, 1, 2)
        )
    assert torch.equal(one, same)
    assert relative(other, one.double()) > 0.1


@pytest.mark.parametrize("index", [0, 2])
def test_squared_projections_average_to_the_second_order_divergence(index: int, tmp_path: Path) -> None:
    """One token of each sequence has its experts' output changed: ½ Δzᵀ(diag p − p pᵀ)Δz, over what follows."""
    folder, hidden, place, seeds = MIXTRAL, MIXTRAL_SIZES.hidden, 5, 16
    step = 1e-4  # transformers' norms round to float32: smaller differences drown
    tokens = random_tokens(folder, 64, 12)
    whole = Whole(folder)
    change = torch.zeros(*tokens.shape, hidden, dtype=torch.float64)
    change[:, place] = torch.randn(64, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        probabilities = whole.likely(tokens).exp()
        ends = []
        for sign in (1, -1):
            whole.added[index] = sign * step * change.flatten(0, 1)
            ends.append(whole.likely(tokens))
        moved = (ends[0] - ends[1]) / (2 * step)  # of log-probabilities: as that of logits but for a constant
        mean = (probabilities * moved).sum(dim=-1)
        exact = float(((probabilities * moved.square()).sum(dim=-1) - mean.square()).sum() / 2)
    with reading(folder, tokens, tmp_path) as read:
        decoder, store = read.decoder, read.store
        found = []
        for seed in range(seeds):
            routed = next(s for s in backward(decoder, store, tokens, "sampled", seed) if s.index == index).routed
            found.append(float(projected(routed.outputs, change.flatten(0, 1)).sum()))
    estimates = torch.tensor(found, dtype=torch.float64)
    error = float(estimates.std()) / seeds**0.5
    assert error < 0.1 * exact
    assert abs(float(estimates.mean()) - exact) < 4 * error


@pytest.mark.parametrize("folder", ["tiny_qwen3_moe", MIXTRAL.name], indirect=True)
def test_terms_are_those_of_a_direct_computation(folder: Path, tmp_path: Path) -> None:
    tokens, widths = random_tokens(folder, 3, 40), (1, 2, 4)
    whole = Whole(folder)
    gradients = whole.gradients(tokens)
    with reading(folder, tokens, tmp_path) as read:
        decoder, store = read.decoder, read.store
        sums = second_order(decoder, store, tokens, widths, TERMS, "text", 0, QUIET, first=1)
        layers = decoder.moe
    for index, layer in layers.items():
        every, some = sums[layer.prefix]
        inputs, ids, weights = whole.seen[index]
        for number in range(layer.num_experts):
            places, slots = (ids == number).nonzero(as_tuple=True)
            share = weights[places, slots].double()
            assert float(every[WEIGHT][number]) == pytest.approx(float(share.sum()), rel=1e-4)
            exact = whole.expert(index, number)
            before = output(exact, inputs[places])
            for bits in widths:
                change = share[:, None] * (output(rounded(exact, bits), inputs[places]) - before)
                gradient = gradients[index][places]
                expected = {
                    "projected": (gradient * change).sum(dim=1) ** 2 / 2,
                    "isotropic": (gradient**2).sum(dim=1) * (change**2).sum(dim=1) / 2,
                    "gemq": (gradient * change).square().sum(dim=1),
                }
                for name, values in expected.items():
                    assert float(every[f"{name}_{bits}"][number]) == pytest.approx(float(values.sum()), rel=1e-3)
                    early = float(values[places < tokens.shape[1]].sum())
                    assert float(some[f"{name}_{bits}"][number]) == pytest.approx(early, rel=1e-3)


def output(expert: ExpertWeights, inputs: torch.Tensor) -> torch.Tensor:
    """Return what an expert makes of its inputs, in float64."""
    return expert.to(torch.float64)(inputs, SILU)
