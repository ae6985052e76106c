"""Mistakes: exit status 2, one line on stderr, nothing written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import one_line
from vllm_moeq.format import verify

pytestmark = pytest.mark.slow

LAYER = "model.layers.0.block_sparse_moe.experts"

Moeq = Callable[..., Any]
Change = Callable[..., Any]
Refused = Callable[..., str]


@pytest.fixture
def refused(moeq: Moeq, tmp_path: Path) -> Refused:
    """Return a function that runs a wrong command, checks that it wrote nothing, and returns its message."""

    def run(*arguments: object) -> str:
        def files() -> dict[Path, int]:
            return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

        before = files()
        message = one_line(moeq(*arguments), "model.layers.")
        assert files() == before
        return message

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def edited_plan(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    plan = json.loads(source.read_text())
    edit(plan)
    target.write_text(json.dumps(plan))
    return target


@pytest.mark.parametrize("command", ["inspect", "plan", "quantize", "eval", "verify", "export"])
def test_a_missing_model(refused: Refused, tmp_path: Path, out: Path, command: str) -> None:
    more = {"quantize": ("-o", out), "export": ("-o", out), "eval": ("--data", out)}.get(command, ())
    assert str(tmp_path / "none") in refused(command, tmp_path / "none", *more)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(refused: Refused) -> None:
    assert "expected a model folder or a Hub name" in refused("inspect", "not-a-model")


def test_a_truncated_source_shard(refused: Refused, mixtral_copy: Path, out: Path) -> None:
    shard = sorted(mixtral_copy.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: damaged or truncated" in refused("quantize", mixtral_copy, "-o", out, "--group-size", 32)


def test_a_missing_expert_tensor(refused: Refused, mixtral_copy: Path, out: Path, change_tensor: Change) -> None:
    change_tensor(mixtral_copy, f"{LAYER}.3.w3.weight", None)
    assert f"{LAYER}.3.w3.weight is missing" in refused("quantize", mixtral_copy, "-o", out)


def test_a_weight_that_is_not_finite(refused: Refused, mixtral_copy: Path, out: Path, change_tensor: Change) -> None:
    change_tensor(mixtral_copy, f"{LAYER}.3.w3.weight", lambda weight: weight / 0)
    assert f"{LAYER}.3.w3.weight" in refused("quantize", mixtral_copy, "-o", out, "--group-size", 32)


def test_an_unknown_format_version(refused: Refused, quantized_copy: Path, change_config: Change) -> None:
    change_config(quantized_copy, lambda config: config["quantization_config"].update(format_version=3))
    assert "format_version must be 1 or 2, found 3" in refused("verify", quantized_copy)


def test_verify_of_a_model_that_is_not_quantized(refused: Refused, tiny_mixtral: Path) -> None:
    assert "not a moeq checkpoint" in refused("verify", tiny_mixtral)


def test_quantizing_twice(refused: Refused, quantized_mixtral: Path, out: Path) -> None:
    assert "found a checkpoint of moeq" in refused("quantize", quantized_mixtral, "-o", out)


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        (lambda plan: plan["experts"].update({LAYER: [5] * 8}), f"experts.{LAYER}.0"),
        (lambda plan: plan.update(bit_choices=[1, 2]), "is not among bit_choices"),
        (lambda plan: plan["experts"].update({LAYER: [1] * 7}), "expected 8 widths, found 7"),
        (lambda plan: plan["experts"].update({"model.layers.7.x": [1]}), "no such MoE layer"),
        (lambda plan: plan["experts"].pop(LAYER), "expected 8 widths, found 0"),
        (lambda plan: plan.update(version=2), "expected a plan of version 1, found 2"),
        (lambda plan: plan.update(version=True), "expected a plan of version 1, found True"),
        (lambda plan: plan.update(surprise=1), "surprise"),
        (lambda plan: plan.update(order={LAYER: [0] * 8}), "order is no permutation"),
    ],
)
def test_a_damaged_plan(
    refused: Refused, tiny_mixtral: Path, all_widths_plan: Path, tmp_path: Path, out: Path, edit: Any, fragment: str
) -> None:
    path = edited_plan(all_widths_plan, tmp_path / "plan.json", edit)
    message = refused("quantize", tiny_mixtral, "--plan", path, "-o", out, "--group-size", 32)
    assert str(path) in message
    assert fragment in message


def test_the_plan_of_another_model(refused: Refused, tiny_qwen3_moe: Path, all_widths_plan: Path, out: Path) -> None:
    message = refused("quantize", tiny_qwen3_moe, "--plan", all_widths_plan, "-o", out, "--group-size", 32)
    assert "model.layers.0.mlp.experts: expected 4 widths, found 0" in message


@pytest.mark.parametrize("bits", ["5", "a", "", "1,1", "1,2,", "0", "-1", "1;2", "1.5"])
def test_impossible_choices(refused: Refused, tiny_mixtral: Path, bits: str) -> None:
    assert "--bits" in refused("plan", tiny_mixtral, "--bits", bits)


@pytest.mark.parametrize("average", ["9", "0.5", "x", "nan", "inf", "-inf", "", "1e400", "3.5", "-2"])
def test_impossible_averages(refused: Refused, tiny_mixtral: Path, average: str) -> None:
    assert "--avg-bits" in refused("plan", tiny_mixtral, f"--avg-bits={average}")


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "0.0001"])
def test_impossible_budgets(refused: Refused, tiny_mixtral: Path, budget: str) -> None:
    assert "--budget-gib" in refused("plan", tiny_mixtral, f"--budget-gib={budget}", "--group-size", 64)


def test_an_average_and_a_budget(refused: Refused, tiny_mixtral: Path) -> None:
    message = refused("plan", tiny_mixtral, "--avg-bits", 2, "--budget-gib", 1)
    assert "--avg-bits and --budget-gib: expected one of them, found both" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--method", "unknown"),
        ("--zeta", "0.5"),
        ("--zeta", "nan"),
        ("--linear-bits", "5"),
        ("--linear-group-size", "48"),
        ("--group-size", "0"),
        ("--group-size", "48"),
        ("--group-size", "-2"),
        ("--initial-model", "/none/such"),
        ("--overrides", "/none/such"),
    ],
)
def test_impossible_flags(refused: Refused, tiny_mixtral: Path, flag: str, value: str) -> None:
    message = refused("plan", tiny_mixtral, f"{flag}={value}")
    assert (value if value.startswith("/") else flag) in message


def test_an_override_of_an_unknown_expert(refused: Refused, tiny_mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps({f"{LAYER}.8": 3}))
    assert f"{path}: {LAYER}.8: the model has no such expert" in refused("plan", tiny_mixtral, "--overrides", path)


def test_columns_that_are_no_multiple_of_32(refused: Refused, narrow_mixtral: Path, out: Path) -> None:
    message = refused("quantize", narrow_mixtral, "-o", out, "--group-size", -1)
    assert f"{LAYER}.0.w2.weight: expected an input dimension that is a multiple of 32" in message


def test_a_group_size_that_does_not_divide(refused: Refused, tiny_mixtral: Path, out: Path) -> None:
    message = refused("quantize", tiny_mixtral, "-o", out, "--group-size", 96)
    assert "multiple of 96 (--group-size), found 64" in message


def test_an_existing_output(refused: Refused, tiny_mixtral: Path, out: Path) -> None:
    out.mkdir()
    assert f"{out}: the output exists already" in refused("quantize", tiny_mixtral, "-o", out, "--group-size", 32)


def test_a_plan_file_in_a_folder_that_does_not_exist(refused: Refused, tiny_mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "none" / "plan.json"
    assert f"{path}: expected the parent folder {path.parent} to exist" in refused("plan", tiny_mixtral, "-o", path)


@pytest.mark.parametrize(
    ("name", "fragment"), [("s.txt", "s.json: the output exists"), ("new.json", "expected a .safe")]
)
def test_names_of_statistics_come_before_the_text(
    refused: Refused, tiny_mixtral: Path, tmp_path: Path, name: str, fragment: str
) -> None:
    (tmp_path / "s.json").write_text("{}")
    assert fragment in refused("calibrate", tiny_mixtral, "--data", tmp_path / "none.txt", "-o", tmp_path / name)


def test_a_text_that_does_not_exist(refused: Refused, tiny_mixtral: Path, tmp_path: Path) -> None:
    assert "expected a text file" in refused("eval", tiny_mixtral, "--data", tmp_path / "none.txt")


def test_names_with_line_breaks_stay_on_one_line(refused: Refused, mixtral_copy: Path) -> None:
    index = mixtral_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a\nb": "../x"}}))
    assert r"tensor 'a\nb'" in refused("inspect", mixtral_copy)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("quantise",), "moeq: no such command 'quantise'. Did you mean 'quantize'? (see moeq --help)"),
        (("--versoin",), "moeq: no such option: --versoin (Possible options: --version)"),
        (("plan",), "moeq plan: missing argument 'MODEL'"),
        (("quantize", "model"), "moeq quantize: missing option '-o' / '--output'"),
        (("quantize", "model", "-o"), "moeq quantize: option '-o' requires an argument"),
        (("plan", "model", "--zeta", "x"), "moeq plan: invalid value for '--zeta': Input should be a valid number"),
        (("plan", "model", "--zeta", "x"), "found 'x'"),
        (("plan", "model", "--counts", "x"), "'x' is not one of 'paper', 'official'"),
        (("plan", "model", "--samples", "0"), "greater than or equal to 1, found '0'"),
        (("plan", "model", "--avg-bit", "2"), "no such option: --avg-bit (Possible options: --avg-bits"),
        (("plan", "model", "more"), "unexpected extra argument(s) (more) (see moeq plan --help)"),
    ],
)
def test_usage_errors(refused: Refused, arguments: tuple[str, ...], fragment: str) -> None:
    assert fragment in refused(*arguments)


EMPTY = [
    ("plan", "{model}", "--stats", ""),
    ("plan", "{model}", "--method="),
    ("plan", ""),
    ("quantize", "{model}", "-o", ""),
    ("quantize", "{model}", "--plan", "", "-o", "{out}"),
    ("verify", ""),
    ("eval", "{model}", "--data", ""),
    ("compare", "{model}", "--held-out", "", "-o", "{out}"),
]


@pytest.mark.parametrize("arguments", EMPTY)
def test_empty_values(refused: Refused, tiny_mixtral: Path, out: Path, arguments: tuple[str, ...]) -> None:
    message = refused(*(argument.format(model=tiny_mixtral, out=out) for argument in arguments))
    assert message.endswith(": expected a value, found an empty one")


def test_no_arguments_print_the_help(moeq: Moeq) -> None:
    outcome = moeq()
    assert (outcome.code, outcome.err) == (2, "")
    assert "Usage: moeq" in outcome.out


@pytest.mark.parametrize("arguments", [("inspect", "/none/such"), ("plan", "{model}", "--avg-bits", "nan")])
def test_the_installed_command_exits_with_2(moeq_process: Moeq, tiny_mixtral: Path, arguments: tuple[str, ...]) -> None:
    assert one_line(moeq_process(*(argument.format(model=tiny_mixtral) for argument in arguments)))


class TestFullDisk:
    """The kernel refuses to let files grow beyond a limit, as a full disk would."""

    ONE_BIT = ("--bits", "1", "--avg-bits", "1", "--group-size", "-1")

    def quantize(self, moeq_process: Moeq, source: Path, out: Path, limit: int) -> str:
        def limit_files() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return one_line(
            moeq_process("quantize", source, "-o", out, *self.ONE_BIT, preexec_fn=limit_files), "model.layers."
        )

    @pytest.mark.parametrize("limit", [10, 10_000])
    def test_before_the_first_shard_leaves_nothing(
        self, moeq_process: Moeq, tiny_mixtral: Path, out: Path, limit: int
    ) -> None:
        assert "File too large" in self.quantize(moeq_process, tiny_mixtral, out, limit)
        assert list(out.parent.iterdir()) == []

    def test_after_the_first_shard_can_be_continued(
        self, moeq_process: Moeq, moeq: Moeq, tiny_mixtral: Path, out: Path
    ) -> None:
        message = self.quantize(moeq_process, tiny_mixtral, out, 65_000)
        assert "model-00003-of-00003.safetensors: cannot write" in message
        assert not out.exists()
        assert len(list(out.with_name("out.partial").glob("*.safetensors"))) == 2
        assert moeq("quantize", tiny_mixtral, "-o", out, *self.ONE_BIT).code == 0
        assert verify(out).average_bits == 1


MOEQ = Path(sys.executable).with_name("moeq")


def test_an_output_that_is_full(quantized_mixtral: Path) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run([MOEQ, "verify", quantized_mixtral], stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert found.stderr == "error: cannot write to the standard output (No space left on device)\n"


def test_an_output_that_takes_ascii_alone(quantized_mixtral: Path) -> None:
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(
        [MOEQ, "verify", quantized_mixtral], capture_output=True, text=True, env={**os.environ, **plain}
    )
    assert found.returncode == 0, found.stderr
    assert "valid" in found.stdout
    assert found.stdout.isascii()
