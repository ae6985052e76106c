from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.allocation import rank_experts
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.plan_file import Plan, read_plan
from planner.planning.make import make_plan
from planner.planning.request import PlanOptions, read_overrides
from vllm_moeq.format import CheckpointError, ConfigError, MoeqError, UsageError

LAYERS = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(2)]
DEFAULTS = PlanOptions(Fraction(2), (1, 2, 3))

Change = Callable[..., Any]


def plan_of(folder: Path, **options: Any) -> Plan:
    with SourceModel(folder) as model:
        return make_plan(model, read_layout(model), dataclasses.replace(DEFAULTS, **options), Progress(quiet=True))


def refusal(folder: Path, kind: type[MoeqError], **options: Any) -> str:
    with pytest.raises(kind) as error:
        plan_of(folder, **options)
    return str(error.value)


def tensor(folder: Path, name: str) -> torch.Tensor:
    with SourceModel(folder) as model:
        return model.shards.load(name).double()


def scale_expert(folder: Path, change_tensor: Change, layer: int, expert: int, factor: float) -> None:
    change_tensor(folder, f"{LAYERS[layer]}.{expert}.w1.weight", lambda weight: weight * factor)


def test_router_norms_are_the_rows_norms(tiny_mixtral: Path) -> None:
    router = tensor(tiny_mixtral, "model.layers.1.block_sparse_moe.gate.weight")
    scores = plan_of(tiny_mixtral).scores[LAYERS[1]]["router_norm"]
    assert scores == pytest.approx([float((row @ row) ** 0.5) for row in router], rel=1e-6)


def test_max_var_is_the_largest_variance_of_a_gate_row(tiny_mixtral: Path) -> None:
    gate = tensor(tiny_mixtral, f"{LAYERS[0]}.6.w1.weight")
    variances = ((gate - gate.mean(1, keepdim=True)) ** 2).mean(1)
    found = plan_of(tiny_mixtral).scores[LAYERS[0]]["max_var"][6]
    assert found == pytest.approx(float(variances.max()), rel=1e-5)


@pytest.mark.parametrize("promotion", ["official", "stable"])
def test_the_order_follows_the_scores(mixtral_copy: Path, change_tensor: Change, promotion: str) -> None:
    for expert, factor in ((1, 2.0), (4, 2.5), (6, 5.0)):
        scale_expert(mixtral_copy, change_tensor, 0, expert, factor)
    made = plan_of(mixtral_copy, promotion=promotion)
    expected = {
        prefix: rank_experts(scores["router_norm"], scores["max_var"], 3.0, promotion)
        for prefix, scores in made.scores.items()
    }
    assert made.order == expected


def test_widths_fall_along_the_order(tiny_mixtral: Path) -> None:
    made = plan_of(tiny_mixtral)
    for prefix, order in made.order.items():
        assert [made.experts[prefix][expert] for expert in order] == [3, 3, 2, 2, 2, 2, 1, 1]


def test_promoted_experts_are_listed(mixtral_copy: Path, change_tensor: Change) -> None:
    last = plan_of(mixtral_copy).order[LAYERS[1]][-1]
    scale_expert(mixtral_copy, change_tensor, 1, last, 10.0)
    made = plan_of(mixtral_copy)
    assert made.promoted == {LAYERS[1]: [last]}
    assert made.order[LAYERS[1]][0] == last


def test_a_huge_zeta_promotes_nobody(mixtral_copy: Path, change_tensor: Change) -> None:
    scale_expert(mixtral_copy, change_tensor, 1, 0, 10.0)
    assert plan_of(mixtral_copy, zeta=1e9).promoted == {}


def test_zeta_one_is_the_max_var_method(tiny_mixtral: Path) -> None:
    assert plan_of(tiny_mixtral, zeta=1.0).experts == plan_of(tiny_mixtral, method="max-var").experts


def test_router_norm_alone_sorts_by_norm(tiny_mixtral: Path) -> None:
    made = plan_of(tiny_mixtral, method="router-norm")
    for prefix, order in made.order.items():
        assert order == sorted(range(8), key=made.scores[prefix]["router_norm"].__getitem__)


@pytest.mark.parametrize("average", ["1", "1.3", "1.75", "2", "2.1", "2.26", "2.5", "2.9999", "3"])
def test_the_achieved_average_is_the_largest_below_the_request(tiny_mixtral: Path, average: str) -> None:
    made = plan_of(tiny_mixtral, avg_bits=Fraction(average))
    assert made.achieved_avg_bits == int(Fraction(average) * 16) / 16


def test_the_achieved_average_is_that_of_the_widths(tiny_mixtral: Path) -> None:
    made = plan_of(tiny_mixtral, avg_bits=Fraction("2.3"))
    assert made.achieved_avg_bits == sum(map(sum, made.experts.values())) / 16


def test_fractions_are_carried_to_later_layers(tiny_mixtral: Path) -> None:
    """2.0625 bits of 16 experts are 33 bits: 16 in the first layer and 17 in the second."""
    made = plan_of(tiny_mixtral, avg_bits=Fraction("2.0625"))
    assert [sum(made.experts[prefix]) for prefix in LAYERS] == [16, 17]


def test_global_ranking_lets_layers_compete(mixtral_copy: Path, change_tensor: Change) -> None:
    change_tensor(mixtral_copy, "model.layers.0.block_sparse_moe.gate.weight", lambda weight: weight * 10)
    made = plan_of(mixtral_copy, method="router-norm", ranking="global", bit_choices=(1, 3))
    assert made.experts == {LAYERS[0]: [1] * 8, LAYERS[1]: [3] * 8}


def test_global_ranking_keeps_the_average(tiny_mixtral: Path) -> None:
    assert plan_of(tiny_mixtral, ranking="global", avg_bits=Fraction("2.3")).achieved_avg_bits == 36 / 16


def test_overrides_are_respected(tiny_mixtral: Path) -> None:
    overrides = {f"{LAYERS[0]}.3": 3, f"{LAYERS[0]}.5": 1, f"{LAYERS[1]}.0": 1}
    experts = plan_of(tiny_mixtral, overrides=overrides).experts
    assert (experts[LAYERS[0]][3], experts[LAYERS[0]][5], experts[LAYERS[1]][0]) == (3, 1, 1)


def test_the_others_share_what_overrides_leave(tiny_mixtral: Path) -> None:
    overrides = {f"{LAYERS[0]}.{expert}": 3 for expert in range(4)}
    experts = plan_of(tiny_mixtral, overrides=overrides).experts[LAYERS[0]]
    assert experts == [3, 3, 3, 3, 1, 1, 1, 1]


def test_overrides_that_starve_the_others_are_refused(tiny_mixtral: Path) -> None:
    overrides = {f"{LAYERS[0]}.{expert}": 3 for expert in range(5)}
    message = refusal(tiny_mixtral, UsageError, overrides=overrides)
    assert "--overrides" in message
    assert "leave 1 bits for 3 experts" in message


def test_overrides_of_every_expert_within_the_average_are_kept(tiny_mixtral: Path) -> None:
    overrides = {f"{prefix}.{expert}": 1 for prefix in LAYERS for expert in range(8)}
    assert plan_of(tiny_mixtral, overrides=overrides).achieved_avg_bits == 1


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('{"model.layers.0.block_sparse_moe.experts.8": 3}', "no such expert"),
        ('{"model.layers.2.block_sparse_moe.experts.0": 3}', "no such expert"),
        ('{"model.layers.0.block_sparse_moe.experts.0": 4}', "expected a width among"),
        ('{"model.layers.0.block_sparse_moe.experts.0": "3"}', "expected a width among"),
        ('{"model.layers.0.block_sparse_moe.experts.0": true}', "expected a width among"),
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_override_files_are_refused(tiny_mixtral: Path, tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "overrides.json"
    path.write_text(text)
    with SourceModel(tiny_mixtral) as model, pytest.raises(ConfigError, match=fragment):
        read_overrides(path, read_layout(model), (1, 2, 3))


def test_an_initial_model_ranks_by_the_change_of_norm(tiny_mixtral: Path, initial_mixtral: Path) -> None:
    found = plan_of(tiny_mixtral, initial_model=initial_mixtral).scores[LAYERS[0]]["router_norm"]
    name = "model.layers.0.block_sparse_moe.gate.weight"
    change = tensor(tiny_mixtral, name).norm(dim=1) - tensor(initial_mixtral, name).norm(dim=1)
    assert found == pytest.approx(change.tolist(), abs=1e-6)


def test_a_model_that_is_its_own_initial_model_has_no_change(tiny_mixtral: Path) -> None:
    made = plan_of(tiny_mixtral, initial_model=tiny_mixtral)
    assert made.scores[LAYERS[0]]["router_norm"] == [0.0] * 8
    assert made.near_ties[LAYERS[0]] == [[expert, expert + 1] for expert in range(7)]


def test_an_initial_model_of_another_architecture_is_refused(tiny_mixtral: Path, tiny_qwen3_moe: Path) -> None:
    message = refusal(tiny_mixtral, CheckpointError, initial_model=tiny_qwen3_moe)
    assert "model.layers.0.block_sparse_moe.gate.weight is missing" in message


def test_an_initial_router_of_another_shape_is_refused(
    tiny_mixtral: Path, mixtral_copy: Path, change_tensor: Change
) -> None:
    name = "model.layers.0.block_sparse_moe.gate.weight"
    change_tensor(mixtral_copy, name, torch.zeros(7, 64))
    assert f"tensor {name}: expected [8, 64], found [7, 64]" in refusal(
        tiny_mixtral, CheckpointError, initial_model=mixtral_copy
    )


def test_a_method_without_router_norms_refuses_an_initial_model(tiny_mixtral: Path) -> None:
    message = refusal(tiny_mixtral, UsageError, method="max-var", initial_model=tiny_mixtral)
    assert "--initial-model" in message


def test_near_ties_are_reported(mixtral_copy: Path, change_tensor: Change) -> None:
    def twins(weight: torch.Tensor) -> torch.Tensor:
        weight[5] = weight[2]
        return weight

    change_tensor(mixtral_copy, "model.layers.0.block_sparse_moe.gate.weight", twins)
    assert plan_of(mixtral_copy).near_ties == {LAYERS[0]: [[2, 5]]}


def test_a_damaged_router_is_refused(mixtral_copy: Path, change_tensor: Change) -> None:
    name = "model.layers.1.block_sparse_moe.gate.weight"
    change_tensor(mixtral_copy, name, lambda weight: torch.full_like(weight, float("nan")))
    assert f"{LAYERS[1]}: router_norm is not finite" in refusal(mixtral_copy, CheckpointError)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_uniform_gives_everybody_the_same(tiny_mixtral: Path, bits: int) -> None:
    made = plan_of(tiny_mixtral, method="uniform", avg_bits=Fraction(bits))
    assert made.experts == {prefix: [bits] * 8 for prefix in LAYERS}


def test_uniform_refuses_an_average_between_the_widths(tiny_mixtral: Path) -> None:
    assert "--method uniform" in refusal(tiny_mixtral, UsageError, method="uniform", avg_bits=Fraction("2.5"))


def test_random_follows_its_seed(tiny_mixtral: Path) -> None:
    made = plan_of(tiny_mixtral, method="random", seed=7)
    assert made.order == {prefix: random.Random(7 + i).sample(range(8), 8) for i, prefix in enumerate(LAYERS)}


def test_random_keeps_the_average(tiny_mixtral: Path) -> None:
    assert plan_of(tiny_mixtral, method="random", avg_bits=Fraction("2.25")).achieved_avg_bits == 2.25


@pytest.mark.parametrize("zeta", [0.5, float("nan"), float("inf")])
def test_impossible_zetas_are_refused(tiny_mixtral: Path, zeta: float) -> None:
    assert "--zeta" in refusal(tiny_mixtral, UsageError, zeta=zeta)


def test_plan_files_round_trip(tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    made = plan_of(tiny_qwen3_moe, counts="official", avg_bits=Fraction("1.75"))
    made.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == made


def test_plans_are_deterministic(tiny_mixtral: Path) -> None:
    first, second = (plan_of(tiny_mixtral).model_dump(exclude={"cost"}) for _ in range(2))
    assert first == second
