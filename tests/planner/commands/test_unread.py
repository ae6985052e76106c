"""Flags that would be ignored are refused, in a run and in a dry run, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from planner.api.unread import ROWS, refuse_unread
from planner.cli import app
from planner.planning.methods import METHODS
from planner.quantization.quantizers.table import QUANTIZERS
from tests.conftest import Outcome, one_line
from vllm_moeq.format import UsageError

GROUP: Any = typer.main.get_command(app)
REQUIRED = {"quantize": "-o x", "calibrate": "-o x --data t", "compare": "-o x --held-out h"}

REFUSED = [
    *[
        ("quantize", f"--plan p {flags}", f"{flags.split()[0]}: expected no plan with it, found --plan p")
        for flags in (
            "--bits 1,2", "--avg-bits 2.5", "--budget-gib 3", "--method nonsense", "--method auto", "--zeta 3",
            "--promotion official", "--counts paper", "--ranking layer", "--initial-model m", "--stats s",
            "--overrides o",
        )
    ],
    ("quantize", "--plan p --seed 3", "--seed: expected --data TEXT or --method random"),
    ("quantize", "--plan p --data t --quantizer rtn", "a text with it, found --plan p and --quantizer rtn"),
    ("quantize", "--method uniform --data t --quantizer rtn", "--data: expected a method or a quantizer that"),
    ("quantize", "--method kl --stats s --data t --quantizer hqq", "found --stats s and --quantizer hqq"),
    ("plan", "--stats s --data t", "--data: expected a method or a quantizer that reads a text with it, found"),
    ("plan", "--method uniform --stats s", "--stats: expected a method that reads it (kl,"),
    ("plan", "--method kl --zeta 3", "reads it (router-norm-maxvar) with it, found --method kl"),
    ("plan", "--data t --promotion stable", "found --method kl"),
    ("plan", "--method pmq --counts official", "--counts: expected a method that reads it (router-norm-maxvar, "),
    ("plan", "--method uniform --ranking global", "--ranking: expected a method that"),
    ("plan", "--method bsp --overrides o", "expected a method for single experts with it, found --method bsp"),
    ("plan", "--method max-var --initial-model m", "--initial-model: expected a method that reads it ("),
    ("plan", "--samples 3", "--samples: expected --data TEXT with it, found none"),
    ("plan", "--seed 1", "--seed: expected --data TEXT or --method random with it"),
    ("quantize", "--plan p --preset 24gb", "--preset: expected no plan with it, found --plan p"),
    ("plan", "--context 3", "--context: expected --dry-run, or --preset 24gb or 80gb, with it"),
    ("plan", "--context 3 --preset 2bit", "--context: expected --dry-run, or --preset 24gb or 80gb, with it"),
    ("quantize", "--gpu-gib 3", "--gpu-gib: expected --dry-run, or --preset 24gb or 80gb, with it"),
    ("plan", "--linear-bits 16 --linear-group-size 32", "--linear-group-size: expected --linear-bits 4 or 8 with it"),
    ("quantize", "--bits 2,3 --one-bit rtn", "--one-bit: expected --bits that have 1 with it, found --bits 2,3"),
    ("quantize", "--data t --quantizer rtn --damping 0.1", "--damping: expected --quantizer gptq with it"),
    ("quantize", "--data t --scheme trellis --act-order none", "--act-order: expected --scheme grid with it"),
    ("quantize", "--data t --static-groups --sweeps 2", "--sweeps: expected no --static-groups with it, found"),
    ("quantize", "--data t --scheme trellis --sweeps 2", "--sweeps: expected --scheme grid with it, found"),
    ("quantize", "--scheme trellis --group-size 64", "--group-size: expected --scheme grid with it, found --scheme"),
    ("compare", "--scheme trellis --bits 1,2 --group-size 64", "--group-size: expected --scheme grid with it"),
    ("quantize", "--scheme trellis --bits 1,8 --one-bit rtn", "--one-bit: expected --scheme grid with it"),
    ("quantize", "--compat", "--compat: expected --quantizer gptq with it, found --quantizer hqq"),
    ("quantize", "--data t --compat --sweeps 0", "--sweeps: expected no --compat with it, found --compat, which"),
    ("quantize", "--data t --compat --damping 0.01", "--damping: expected no --compat with it, found --compat, which"),
    ("quantize", "--min-tokens 3", "--min-tokens: expected --quantizer gptq with it"),
    ("calibrate", "--for pmq --scheme auto", "--scheme: expected a method that reads it (kl, kl-estimated) with it"),
    ("quantize", "--scheme auto --zero-points integer", "--zero-points: expected --scheme grid with it"),
    ("calibrate", "--for frequency --bits 3", "--bits: expected a method that measures widths with it"),
    ("compare", "--methods uniform --bits 3", "--bits: expected a method that chooses among widths with it"),
    ("compare", "--methods random --data t", "found --methods random and --quantizer hqq"),
    ("compare", "--methods uniform --seeds 2", "--seeds: expected a method that draws at random or reads a text"),
    ("compare", "--methods random --jobs 2", "--jobs: expected --quantizer gptq, or --tasks with it"),
    ("compare", "--limit 3", "--limit: expected tasks with it, found none"),
    ("eval", "--data t --limit 3", "--limit: expected tasks with it, found none"),
    ("eval", "--data t --backend transformers", "--backend: expected tasks with it"),
    ("eval", "--tasks a --window 3", "--window: expected --data FILE with it"),
]  # fmt: skip

TAKEN = [
    ("plan", "--zeta 3 --promotion stable --counts official --ranking global --initial-model m"),
    ("plan", "--data t --seed 3 --samples 3 --seq-len 32"),
    ("plan", "--method uniform --overrides o --counts paper --ranking global"),
    ("plan", "--method nonsense --zeta 3"),
    ("quantize", "--preset 80gb --context 3 --concurrency 4 --gpu-gib 5"),
    ("plan", "--dry-run --context 3 --concurrency 4 --gpu-gib 5 --linear-group-size 32"),
    ("quantize", "--plan p --data t --min-tokens 3 --damping 0.1 --seed 3"),
    ("quantize", "--plan p --group-size 64 --zero-points integer --one-bit rtn --jobs 3"),
    ("quantize", "--scheme trellis --bits 1,8 --group-size 64 --data t --act-order none"),
    ("quantize", "--method kl --stats s --data t --samples 3"),
    ("quantize", "--method random --seed 4 --bits 1,2 --one-bit rtn"),
    ("calibrate", "--for pmq,kl --scheme trellis"),
    ("compare", "--scheme grid,trellis --one-bit rtn --methods random"),
    ("calibrate", "--for frequency,kl --bits 3 --seed 2 --samples 3"),
    ("compare", "--methods uniform,random --bits 2,3 --seeds 3 --tasks a --limit 3 --jobs 2"),
    ("compare", "--data t --samples 3 --quantizer gptq --min-tokens 3 --jobs 2 --window 3"),
    ("eval", "--suite paper --limit 3 --backend vllm"),
    ("eval", "--data t --window 3 --max-tokens 4 --reference m"),
]


def check(command: str, flags: str) -> None:
    """Parse a command line, as far as refusing what it says."""
    words = ["model", *REQUIRED.get(command, "").split(), *flags.split()]
    GROUP.commands[command].make_context(command, words)


@pytest.mark.parametrize(("command", "flags", "message"), REFUSED)
def test_an_ignored_flag_is_refused(command: str, flags: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(command, flags)
    assert message in str(refused.value)


@pytest.mark.parametrize(("command", "flags"), TAKEN)
def test_other_flags_pass(command: str, flags: str) -> None:
    check(command, flags)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantizer", ["hqq", "rtn", "gptq"])
def test_conditions_hold_or_not_for_all_rows_of_the_tables(method: str, quantizer: str) -> None:
    assert quantizer in QUANTIZERS
    for name, command in GROUP.commands.items():
        values = {str(parameter.name): parameter.default for parameter in command.params}
        values |= {key: method for key in ("method", "methods") if key in values}
        values |= {"quantizer": quantizer} if "quantizer" in values else {}
        refuse_unread(name, {}, values)
        for row in ROWS:
            if set(row.flags) <= set(values) and (not row.commands or name in row.commands):
                assert row.holds(values) in (True, False)
                assert row.found(values)


def test_every_row_names_flags_of_its_commands() -> None:
    known = {name: {parameter.name for parameter in command.params} for name, command in GROUP.commands.items()}
    for row in ROWS:
        for name in row.commands:
            assert known[name] & set(row.flags), row
        assert all(any(flag in flags for flags in known.values()) for flag in row.flags), row


DRY = [
    ("plan", "--method slim", "--method slim: the format has one width per expert"),
    ("plan", "--method nonsense", "--method: expected one of auto"),
    ("plan", "--method pmq", "--method pmq: expected --data TEXT, or --stats FILE of moeq calibrate, found neither"),
    ("plan", "--stats s.json", "--stats: s.json: expected the .safetensors file of moeq calibrate"),
    ("plan", "--stats none.safetensors", "--stats: none.safetensors: expected a file that moeq calibrate writes"),
    ("plan", "--method uniform --stats s", "--stats: expected a method"),
    ("plan", "--avg-bits 3.5 --bits 1,2", "--avg-bits: expected a value between 1 and 2"),
    ("compare", "--methods uniform --avg-bits 2.5", "--avg-bits: expected a width among 1, 2, 3, 4, 8 for --methods"),
    ("compare", "--methods random --tasks nonexist.yaml", "nonexist.yaml: expected a task file"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("command", "flags", "message"), DRY)
def test_a_dry_run_refuses_what_a_run_refuses(
    moeq: Callable[..., Outcome], tiny_mixtral: Path, tmp_path: Path, command: str, flags: str, message: str, dry: bool
) -> None:
    (tmp_path / "held_out.txt").write_text("To be, or not to be.")
    more = ("-o", tmp_path / "out", "--held-out", tmp_path / "held_out.txt", "--window", 16, "--group-size", 64)
    outcome = moeq(
        command, tiny_mixtral, *flags.split(), *(more if command == "compare" else ()), *(["--dry-run"] * dry)
    )
    assert message in one_line(outcome)
    assert "method auto" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["held_out.txt"]
