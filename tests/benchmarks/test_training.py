"""The training of the small models: its text, its balance, and a training that was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.models import fit as fitting
from benchmarks.models.architectures import LARGE, NAMES, architecture
from benchmarks.models.balance import layer_balance, shares
from benchmarks.models.corpus import limited
from benchmarks.models.even_routers import even, least_shares
from benchmarks.models.fit import SEQUENCE, Training, batches, fit
from benchmarks.models.train_model import main

pytestmark = pytest.mark.slow

TRAINING = Training(steps=3, batch=1, seed=5, checkpoint=2)


def small(name: str) -> PreTrainedModel:
    """Return a model of two thin layers before training."""
    torch.manual_seed(TRAINING.seed)
    config = architecture(name)
    config.num_hidden_layers, config.vocab_size, config.intermediate_size = 2, 256, 64
    return AutoModelForCausalLM.from_config(config)


def stream() -> torch.Tensor:
    return torch.randint(256, (6 * SEQUENCE,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_training_continues_to_the_same_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed, resumed = small(name), small(name), small(name)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    fit(whole, stream(), TRAINING, tmp_path / "whole")
    taken: list[int] = []

    def step(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return take_step(*arguments)

    take_step = fitting.take_step
    monkeypatch.setattr(fitting, "take_step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, stream(), TRAINING, tmp_path / "state")
    fit(resumed, stream(), TRAINING, tmp_path / "state")
    assert len(taken) == 4  # the third step again
    found = resumed.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.equal(found[key], value), key
        assert not torch.equal(before[key], value), key


def test_batches_depend_on_the_seed_alone() -> None:
    first, again = (torch.stack(list(batches(stream(), TRAINING))) for _ in range(2))
    assert first.shape == (3, 1, SEQUENCE)
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.stack(list(batches(stream(), replace(TRAINING, seed=6)))))


def test_layers_are_balanced_each_for_itself() -> None:
    first = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    apart = [first, first.roll(1, dims=1), first.roll(2, dims=1), first.roll(3, dims=1)]
    even = [9.0 * torch.eye(4).repeat(2, 1)] * 4
    assert float(layer_balance(apart, 1)) == pytest.approx(4, rel=0.01)
    assert float(layer_balance(even, 1)) == pytest.approx(1)
    assert torch.equal(shares(apart, 1), torch.eye(4))
    assert torch.equal(shares(even, 1), torch.full((4, 4), 0.25))


def test_the_larger_model_is_a_mixtral_of_170_million_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(LARGE))
    assert 100e6 < sum(parameter.numel() for parameter in model.parameters()) < 300e6
    assert list(limited(["ab", "c", "d"], 3)) == ["ab", "c"]


def test_an_output_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}: the output exists already; choose another or delete it"
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_a_router_that_starves_an_expert_is_evened_and_nothing_else_changes(name: str) -> None:
    model, tokens = small(name), stream()
    routers = [key for key in model.state_dict() if key.endswith(".mlp.gate.weight")]
    with torch.no_grad():
        for key in routers:
            model.state_dict()[key][0] = 0.0  # between those that a token likes and those that it does not
            model.state_dict()[key][1:] *= 50
    before = {key: value.clone() for key, value in model.state_dict().items()}
    least = least_shares(model, tokens)
    even(model, tokens.view(-1, SEQUENCE), steps=20, weight=5.0, learning_rate=0.05)
    assert all(after > first for first, after in zip(least, least_shares(model, tokens), strict=True))
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert sorted(changed) == sorted(routers)
