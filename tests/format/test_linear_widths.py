"""Widths of single linears: what they say, which version they need, and which are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.format.test_schema import PREFIX, VALID, changed, refusal
from vllm_moeq.format import Linear, parse_config, version_for
from vllm_moeq.format.fields import MAX_LINEARS

NAMES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qkvo"]
WIDTHS = st.sampled_from([4, 8, 16])
SETTINGS = st.builds(
    lambda bits, widths: Linear(bits=bits, widths=widths), WIDTHS, st.dictionaries(st.sampled_from(NAMES), WIDTHS)
)


def with_widths(widths: object, bits: int = 4, version: object = 2) -> dict[str, Any]:
    """Return a configuration with widths of single linears."""
    return {**changed({"bits": bits, "group_size": 128, "widths": widths}, "linear"), "format_version": version}


@given(SETTINGS)
def test_what_is_stored_says_the_same_widths(linear: Linear) -> None:
    stored = linear.stored(f"{name}.weight" for name in NAMES)
    unquantized = [name for name in NAMES if linear.bits_of(name) == 16]
    for name in NAMES:
        found = 16 if name in unquantized else stored.bits_of(f"{name}.weight")
        assert found == linear.bits_of(name) == linear.alone(name).bits
    assert stored.stored(name for name in NAMES if name not in unquantized) == stored


@given(SETTINGS)
def test_what_is_stored_is_read_back_in_the_lowest_version(linear: Linear) -> None:
    stored = linear.stored(NAMES)
    unquantized = [name for name in NAMES if linear.bits_of(name) == 16]
    config = {
        **changed(json.loads(stored.model_dump_json()), "linear"),
        "format_version": version_for(stored),
        "unquantized": unquantized,
    }
    read = parse_config(json.loads(json.dumps(config)), "x")
    assert read.linear == stored
    assert (read.format_version == 2) == ("widths" in config["linear"]) == bool(stored.widths)
    other = 3 - version_for(stored)
    assert f"expected {version_for(stored)}" in refusal({**config, "format_version": other})


def test_one_width_is_written_as_in_version_1() -> None:
    assert Linear(bits=4).model_dump() == {"bits": 4, "group_size": 128}
    assert Linear(bits=8, widths=dict.fromkeys(NAMES, 4)).stored(NAMES) == Linear(bits=4)
    assert Linear(bits=4, widths=dict.fromkeys(NAMES, 16)).stored(NAMES) == Linear(bits=16)
    assert Linear(bits=8).stored([]) == Linear(bits=8)


@pytest.mark.parametrize(
    ("widths", "bits", "reason"),
    [
        ({"a.b": 3}, 4, "linear.widths.a.b"),
        ({"a.b": True}, 4, "linear.widths.a.b"),
        ({"a.b": 8.0}, 4, "linear.widths.a.b"),
        ({"a.b": None}, 4, "linear.widths.a.b"),
        ({"../b": 8}, 4, "linear.widths.../b"),
        ([["a.b", 8]], 4, "linear.widths"),
        ({"a.b": 16}, 4, "a.b: expected 4 or 8"),
        ({"a.b": 4}, 4, "a.b: expected another width than linear.bits, found 4"),
        ({"a.b": 8}, 16, "linear.widths: expected none, as linear.bits is 16"),
        ({"lm_head": 8}, 4, "lm_head: expected a packed linear, found it among `unquantized` too"),
        ({f"{PREFIX}.0.gate_proj": 8}, 4, f"{PREFIX}.0.gate_proj: expected a linear outside the experts"),
    ],
)
def test_other_widths_are_refused_by_name(widths: object, bits: int, reason: str) -> None:
    assert reason in refusal(with_widths(widths, bits))


@pytest.mark.parametrize(("widths", "version"), [({"a.b": 8}, 1), ({}, 2)])
def test_a_version_that_the_content_does_not_need_is_refused(widths: dict[str, int], version: int) -> None:
    assert f"format_version: expected {3 - version}" in refusal(with_widths(widths, version=version))


def test_a_crowd_of_names_is_refused_before_it_is_looked_at() -> None:
    crowd = {f"a.{number}": 8 for number in range(MAX_LINEARS)}
    assert len(parse_config(with_widths(crowd), "x").linear.widths) == MAX_LINEARS
    crowd["one.more"] = 3
    assert f"linear.widths: expected at most {MAX_LINEARS} keys" in refusal(with_widths(crowd))


def test_version_1_stays_as_it_was() -> None:
    assert json.loads(parse_config(VALID, "x").model_dump_json(exclude_none=True)) == VALID
