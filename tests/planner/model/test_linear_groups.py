"""Which linears must share a width; tests/planner/model/test_architectures.py asks every architecture."""

from __future__ import annotations

from planner.model.layout import Layout
from planner.model.linear_groups import linear_groups

MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")
DENSE = ("down_proj", "gate_proj", "up_proj")


def layout_of(*linears: str) -> Layout:
    """Return the layout of a model of eleven layers with these linears."""
    blocks = tuple(f"model.layers.{index}" for index in range(11))
    return Layout("deepseek_v3", blocks, (), tuple(f"{name}.weight" for name in sorted(linears)), ())


def test_what_vllm_joins_is_one_group() -> None:
    layer = "model.layers.0"
    names = [f"{layer}.self_attn.{name}" for name in MLA] + [f"{layer}.mlp.{name}" for name in DENSE]
    kinds = {group.kind for group in linear_groups(layout_of(*names))}
    assert kinds == {
        ("q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",), ("o_proj",), ("gate_proj", "up_proj"),
        ("down_proj",),
    }  # fmt: skip


def test_groups_come_in_the_order_of_layers() -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(11) for part in "qkvo"]
    groups = linear_groups(layout_of(*names))
    assert [group.index for group in groups] == sorted(2 * list(range(11)))
    assert groups[-1].bases == tuple(f"model.layers.10.self_attn.{part}_proj" for part in "qkv")


def test_equal_names_of_different_parents_stay_apart() -> None:
    shared = [f"model.layers.3.mlp.{parent}.{name}" for parent in ("one", "other") for name in DENSE]
    assert len(linear_groups(layout_of(*shared))) == 4
