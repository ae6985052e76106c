"""The table against other quantizers: what their formats store, what they get and give, how rows become a table."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import run as peers
from benchmarks.peers.asked import Asked
from benchmarks.peers.environments import Environments, FailedError, quantize, reason
from benchmarks.peers.importance import write_importance
from benchmarks.peers.processes.job import Job, matrix_name
from benchmarks.peers.rows import OURS, PEERS, PLAN, all_rows, rows
from benchmarks.peers.storage import GROUP, Storage, gptq, hqq, ours
from benchmarks.peers.subject import check_model, expert_names, write_experts, write_with
from benchmarks.peers.table import HEADER, table
from planner.exchange.autogptq.layout import encode
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantizer_for
from tests.architectures import build
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from vllm_moeq.format import CheckpointError, UsageError, pack

SHAPE = (64, 2 * GROUP)
WIDTHS = (2, 3)


def bits_of(*tensors: torch.Tensor) -> float:
    """Return the bits per weight of a matrix of ``SHAPE``."""
    return 8 * sum(tensor.nbytes for tensor in tensors) / (SHAPE[0] * SHAPE[1])


@pytest.mark.parametrize("bits", WIDTHS)
def test_our_bits_are_those_of_the_file(bits: int) -> None:
    packed = quantizer_for(bits, "rtn", "rtn")(torch.randn(SHAPE), bits, GROUP).tensors()
    assert ours(bits).bits == bits_of(*packed.values())


@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_of_gptq_are_those_of_its_tensors(bits: int) -> None:
    groups = (SHAPE[0], SHAPE[1] // GROUP)
    codes = pack(torch.zeros(SHAPE, dtype=torch.uint8), bits)
    stored = encode(codes, torch.ones(groups), torch.ones(groups), bits, "v1")
    assert gptq(bits).bits == bits_of(*(tensor for name, tensor in stored.items() if name != "g_idx"))


@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_of_hqq_are_those_of_the_package(bits: int) -> None:
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(torch.randn(SHAPE), nbits=bits, group_size=GROUP, axis=1, device="cpu")
    # Words of ten codes hold some more than there are: 7 groups of ten for 64 codes of a column.
    assert hqq(bits).bits == pytest.approx(bits_of(codes, meta["scale"].half(), meta["zero"].half()), rel=0.1)


def test_bits_contain_what_groups_share() -> None:
    assert Storage(2, 64, 32).bits == 2.5
    assert {row.label: round(row.storage.bits, 2) for row in rows(2) if row.peer != OURS} == {
        "HQQ": 2.25, "GPTQModel": 2.14, "AutoRound, 50 steps": 2.14, "AutoRound, 200 steps": 2.14,
        "AutoRound, best": 2.14, "GPTQModel, searched scales": 2.14,
        "llama.cpp IQ2_XXS, imatrix": 2.06, "llama.cpp IQ2_XS, imatrix": 2.31, "llama.cpp IQ2_S, imatrix": 2.56,
        "llama.cpp Q2_K, imatrix": 2.62,
    }  # fmt: skip


def test_every_row_has_a_peer_and_files_of_its_own() -> None:
    found = all_rows()
    assert len({row.name for row in found}) == len(found)
    assert {row.peer for row in found} == {*PEERS, OURS}
    processes = Path(peers.__file__).with_name("processes")
    assert all((processes / f"{peer.module}.py").is_file() for peer in PEERS.values())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("model.layers.3.mlp.experts.12.gate_proj", "3.12.gate"),
        ("layers.0.block_sparse_moe.experts.0.down_proj", "0.0.down"),
        ("model.layers.3.mlp.shared_expert.up_proj", None),
        ("model.layers.3.mlp.up_proj", None),
        ("model.layers.3.self_attn.q_proj", None),
    ],
)
def test_modules_of_experts_are_known_by_their_place(module: str, name: str | None) -> None:
    assert matrix_name(module) == name


def test_a_copy_has_the_given_experts_and_nothing_else_changed(tiny_mixtral: Path, tmp_path: Path) -> None:
    values, dense = tmp_path / "values.safetensors", tmp_path / "dense"
    with SourceModel(tiny_mixtral) as model:
        write_experts(model, values)
        save_file({key: 2 * value for key, value in load_file(values).items()}, values)
        write_with(model, values, dense)
        experts = {name for _, name in expert_names(model)}
        with SourceModel(dense) as copy:
            assert copy.shards.tensors.keys() == model.shards.tensors.keys()
            for name in model.shards.tensors:
                factor = 2 if name in experts else 1
                assert torch.equal(copy.shards.load(name), factor * model.shards.load(name).float())
    assert len(experts) == 3 * 8 * 2


@pytest.mark.parametrize(("change", "found"), [("missing", "nothing"), ("transposed", r"\(128, 64\)")])
def test_values_that_do_not_fit_are_refused(change: str, found: str, tiny_mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "values.safetensors"
    with SourceModel(tiny_mixtral) as model:
        write_experts(model, path)
        values = load_file(path)
        taken = values.pop("1.2.down")
        save_file(values | ({"1.2.down": taken.T.contiguous()} if change == "transposed" else {}), path)
        with pytest.raises(CheckpointError, match=rf"1\.2\.down: expected .*, found {found}"):
            write_with(model, path, tmp_path / "dense")


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    build("granitemoe", tmp_path / "fused")
    with pytest.raises(UsageError, match="one plain tensor per expert"):
        check_model(tmp_path / "fused")


def test_rows_that_are_no_whole_groups_are_refused(narrow_mixtral: Path) -> None:
    with pytest.raises(UsageError, match=r"experts\.0\.w1\.weight: expected a multiple of 128 inputs, found 64"):
        check_model(narrow_mixtral)


@pytest.mark.slow
def test_importance_is_the_mean_square_of_what_an_expert_reads(tiny_mixtral: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "importance.safetensors"
    seen: dict[str, torch.Tensor] = {}
    with SourceModel(tiny_mixtral) as source:
        write_importance(source, tokens, path)
    model = AutoModelForCausalLM.from_pretrained(tiny_mixtral, dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _module, given: seen.update(inputs=given[0], ids=given[1]))
    with torch.inference_mode():
        model(input_ids=tokens)
    found = load_file(path)
    for expert in range(8):
        inputs = seen["inputs"].flatten(0, -2)[(seen["ids"] == expert).any(dim=-1)]
        gate, up = (inputs @ weight.T for weight in experts.gate_up_proj[expert].detach().chunk(2))
        inner = torch.nn.functional.silu(gate) * up
        for place, values in (("gate", inputs), ("up", inputs), ("down", inner)):
            wanted = values.square().mean(dim=0) if len(values) else torch.ones(values.shape[1])
            torch.testing.assert_close(found[f"1.{expert}.{place}"], wanted, rtol=1e-4, atol=1e-7)


def job(folder: Path, matrices: dict[str, torch.Tensor], **options: Any) -> Job:
    """Return a job for matrices alone."""
    save_file(matrices, folder / "experts.safetensors")
    save_file(
        {name: torch.ones(weight.shape[1]) for name, weight in matrices.items()}, folder / "importance.safetensors"
    )
    return Job(
        model="none", experts=str(folder / "experts.safetensors"), tokens="none",
        importance=str(folder / "importance.safetensors"), output=str(folder / "values.safetensors"), bits=2,
        group=GROUP, options=options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_process_gives_values_seconds_and_versions(tmp_path: Path) -> None:
    weight = torch.randn(SHAPE)
    asked = job(tmp_path, {"0.0.gate": weight})
    quantize(Path(sys.executable), "by_hqq", asked, tmp_path / "job.json", tmp_path / "log.txt")
    values = load_file(asked.output)["0.0.gate"]
    assert all(len(group.unique()) <= 4 for group in values.reshape(-1, GROUP))
    assert 0.2 < float((values - weight).norm() / weight.norm()) < 0.6
    facts = peers.read_json(asked.facts())
    assert facts["seconds"] > 0
    assert facts["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_a_process_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    asked = job(tmp_path, {"0.0.gate": torch.randn(SHAPE)}, type="Q2_K", bytes=84)
    with pytest.raises(FailedError, match=r"^error: expected the package llama-cpp-python, found none$"):
        quantize(Path(sys.executable), "by_llama", asked, tmp_path / "job.json", tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ("Traceback\n  File x\nValueError: no such type\n\n[notice] a newer pip\n", "ValueError: no such type"),
        ("a\nERROR: Cannot install b\nto fix this\n", "ERROR: Cannot install b"),
        ("torch.cuda.OutOfMemoryError: 2 GiB\nbye", "torch.cuda.OutOfMemoryError: 2 GiB"),
        ("an error is spoken of\nKilled\n", "Killed"),
        ("", "it printed nothing"),
    ],
)
def test_the_reason_is_the_line_with_the_error(printed: str, why: str) -> None:
    assert reason(printed) == why


@pytest.mark.slow
def test_what_pip_cannot_install_fails(tmp_path: Path) -> None:
    environments = Environments(tmp_path, ("--no-index", "--find-links", str(tmp_path)))
    with pytest.raises(FailedError, match="No matching distribution found for no-such-package"):
        environments.python("peer", ("no-such-package==1",))
    assert not (tmp_path / "peer" / "requirements.json").exists()


def result(kl: float, **more: Any) -> dict[str, Any]:
    """Return a result as a row's file has it."""
    measured = {"mean": kl, "error": 0.01, "p99": 5 * kl, "max": 9 * kl}
    return {"total_bits": 2.25, "kl": measured, "perplexity": 14.0, "original": 12.5, "seconds": 3.2,
            "versions": {"package": "1.2"}, **more}  # fmt: skip


def cells(line: str) -> list[str]:
    """Return the cells of a line of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_table_goes_by_bits_and_then_to_the_best() -> None:
    by_label = {(row.label, row.storage.bits): row for row in rows(2)}
    hqq_row, uniform = by_label["HQQ", 2.25], by_label["ours, asymmetric GPTQ, uniform", 2.25]
    plan, other, smaller = by_label[PLAN, 2.25], by_label[PLAN, 2.0625], by_label["GPTQModel", 2.140625]
    known = {
        plan.name: result(0.05), hqq_row.name: result(0.4), uniform.name: result(0.1), other.name: result(0.07),
        smaller.name: {"failed": "no a|b"},
    }  # fmt: skip
    head, _, *body = map(cells, table(rows(2), known))
    assert head == list(HEADER)
    assert [line[1] for line in body] == [PLAN, "GPTQModel", "HQQ", "ours, asymmetric GPTQ, uniform", PLAN]
    assert body[1] == ["2.14", "GPTQModel", r"not run: no a\|b", *[""] * (len(HEADER) - 3)]
    wanted = ["2.25", "HQQ", "0.4000", "2.000", "3.60", "14.000", "1.500", "8.00", "3", "package 1.2"]
    assert body[2] == wanted
    assert [line[7] for line in body[3:]] == ["2.00", "1.00"]


def test_without_a_plan_there_is_no_ratio() -> None:
    (row, *_) = rows(3)
    assert cells(table([row], {row.name: result(0.4)})[2])[7] == ""


def test_there_is_a_plan_at_the_bits_of_every_other_row() -> None:
    for bits in WIDTHS:
        plans = [row for row in rows(bits) if row.label == PLAN]
        assert {row.storage.bits for row in plans} == {row.storage.bits for row in rows(bits)}
        assert all(ours(row.options["avg_bits"]) == row.storage for row in plans)


def finished(folder: Path) -> list[str]:
    """Make a folder with results of all rows of two bits, and return the command's flags."""
    flags = ["--output", str(folder), "--environments", str(folder / "none"), "--samples", "8"]
    asked = Asked(MIXTRAL, CALIBRATION_TEXT, 8, 512, MIXTRAL / "held_out.txt", peers.FIRST_TOKENS)
    peers.check_folder(folder, asked.facts())
    (folder / "importance.safetensors").touch()
    for row in rows(2):
        peers.write_json(folder / f"{row.name}.json", result(0.1))
    return flags


def test_rows_with_results_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(finished(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + len(rows(2))
    assert err == ""


def test_results_of_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = finished(tmp_path)
    assert peers.main([*flags[:-1], "9"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {tmp_path / 'asked.json'}: samples: expected 9, found 8: name another --output\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "none.txt"], "--data none.txt: expected a text, found no such file"),
        (["--held-out", "none.txt"], "--held-out none.txt: expected a text, found no such file"),
        (["--model", "none", "--held-out", str(CALIBRATION_TEXT)], "none/config.json: "),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main([*flags, "--output", str(tmp_path / "out"), "--environments", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_is_a_row_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = finished(tmp_path)
    row = next(row for row in rows(2) if row.peer == "hqq")
    peers.write_json(tmp_path / f"{row.name}.json", {"failed": "no disk"})
    assert peers.main([*flags, "--only", "gptqmodel"]) == 0
    assert "not run: no disk" in capsys.readouterr().out
    assert peers.main([*flags, "--only", "hqq", "--pip-flags=--no-such-flag"]) == 0
    out, err = capsys.readouterr()
    assert "not run: no such option: --no-such-flag" in out
    assert err.splitlines()[-1] == "note: HQQ: no such option: --no-such-flag"
