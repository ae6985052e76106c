"""GPTQModel, AutoGPTQ's successor, reads what we export, and we read what it writes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from planner.common.progress import Progress
from planner.exchange.autogptq import export_gptq, import_gptq
from planner.exchange.autogptq.names import module_name
from planner.exchange.dense import dequantize_linear, export_dense
from planner.model.architectures import ARCHITECTURES
from tests.paths import MIXTRAL, QWEN
from tests.tiers import thorough
from vllm_moeq.format import PACKED, ShardSet, expert_matrices, load_config, read_json

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("gptqmodel_process.py")
QUIET = Progress(quiet=True)
TOKENS = 128


@dataclass(frozen=True)
class Seen:
    """A checkpoint of ours, and what GPTQModel computed from its counterpart."""

    ours: Path
    theirs: dict[str, torch.Tensor]
    tokens: list[int]


@dataclass(frozen=True)
class Case:
    """A checkpoint for GPTQModel, of ours or of its own.

    Attributes:
        source: the model.
        settings: of our quantization: quantizer, bits of linears, group size; None where GPTQModel quantizes.
        form: version of the zero points: v1, v2.
        mixed: whether linears outside the experts have 4, 8 and 16 bits in turn.
    """

    source: Path
    settings: tuple[str, int, int] | None
    form: Literal["v1", "v2"] = "v2"
    mixed: bool = False


CASES = {
    "qwen": Case(QWEN, ("hqq", 16, 64)),
    "their mixtral": Case(MIXTRAL, None, "v1"),
    "mixtral": Case(MIXTRAL, ("rtn", 4, 128)),
    "whole rows": Case(QWEN, ("rtn", 8, -1)),
    "version 1": Case(QWEN, ("rtn", 4, 32), "v1", mixed=True),
    "their qwen": Case(QWEN, None),
}
EVERY_RUN = ("version 1", "their qwen")
See = Callable[[str], Seen]


def tokens_of(source: Path) -> list[int]:
    from transformers import AutoTokenizer

    text = (source / "held_out.txt").read_text()[:4000]
    return list(AutoTokenizer.from_pretrained(source)(text).input_ids[:TOKENS])


def symmetric(folder: Path) -> None:
    """Put every zero point in the middle; the weights are others then, but weights all the same."""
    from safetensors.torch import save_file

    widths = load_config(folder).experts
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith(".weight_zero"):
                prefix, expert, _, _ = name.rsplit(".", 3)
                tensor.fill_(2 ** (widths[prefix][int(expert)] - 1))
        save_file(tensors, shard, metadata={"format": "pt"})


def run_theirs(jobs: list[dict[str, object]], folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # It wants two threads, one of its own and one to load, and would compile every matrix's dequantization.
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder / "jobs.json")]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def see(integer_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> See:
    """Return a function that returns a case's outcome; GPTQModel runs once for EVERY_RUN, and once for the rest."""

    @functools.cache
    def all_seen(names: tuple[str, ...]) -> dict[str, Seen]:
        folder = tmp_path_factory.mktemp("gptqmodel")
        ours, tokens = {}, {name: tokens_of(CASES[name].source) for name in names}
        jobs: list[dict[str, object]] = []
        for name in names:
            case = CASES[name]
            if case.settings is None:
                form = "gptq" if case.form == "v1" else "gptq_v2"
                jobs.append({"source": str(case.source), "format": form, "output": str(folder / name)})
            else:
                ours[name] = integer_checkpoint(case.source, *case.settings, mixed_linears=case.mixed)
                if case.form == "v1":
                    symmetric(ours[name])
                export_gptq(ours[name], folder / name, case.form, QUIET)
        jobs += [
            {"folder": str(folder / name), "tokens": tokens[name], "output": f"{folder / name}.safetensors"}
            for name in names
        ]
        run_theirs(jobs, folder)
        for name in names:
            if name not in ours:
                ours[name] = folder / f"{name} imported"
                import_gptq(folder / name, ours[name], QUIET)
        return {name: Seen(ours[name], load_file(f"{folder / name}.safetensors"), tokens[name]) for name in names}

    def one(name: str) -> Seen:
        rest = tuple(name for name in CASES if name not in EVERY_RUN)
        return all_seen(EVERY_RUN if name in EVERY_RUN else rest)[name]

    return one


@pytest.mark.parametrize("case", thorough(CASES, EVERY_RUN))
def test_every_matrix_has_the_same_values(see: See, case: str) -> None:
    """One rounding to float16 apart from ours in float32, that is: none."""
    ours, theirs = see(case).ours, dict(see(case).theirs)
    del theirs["logits"]
    config, row = load_config(ours), ARCHITECTURES[read_json(ours / "config.json")["model_type"]]
    with ShardSet(ours) as shards:
        experts = {matrix.name(PACKED): matrix for matrix in expert_matrices(shards, config)}
        for name in shards.tensors:
            base, _, suffix = name.rpartition(".")
            if suffix == PACKED:
                matrix = experts.get(name)
                bits = config.linear.bits_of(base)
                values = matrix.dequantize(shards) if matrix else dequantize_linear(shards, base, bits)
                assert torch.equal(theirs.pop(module_name(row, base)), values.half()), base
        for name, values in theirs.items():  # what is not packed with us: their asymmetric linears
            torch.testing.assert_close(shards.load(f"{name}.weight").float(), values.float(), rtol=2**-8, atol=0)
    assert bool(theirs) == (case == "their qwen")


@pytest.mark.parametrize("case", thorough(CASES, EVERY_RUN))
def test_the_model_answers_like_the_dense_one(see: See, case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_dense(see(case).ours, tmp_path / "dense", QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    with torch.inference_mode():
        logits = model(torch.tensor([see(case).tokens])).logits.float()
    theirs = see(case).theirs["logits"]
    assert float((theirs - logits).norm() / logits.norm()) < 0.02
    assert float((theirs.argmax(-1) == logits.argmax(-1)).float().mean()) > 0.95


@pytest.mark.parametrize("case", thorough(["their mixtral", "their qwen"], EVERY_RUN))
def test_the_widths_are_those_of_the_rules(see: See, case: str) -> None:
    for widths in load_config(see(case).ours).experts.values():
        assert widths == [2, 3, 8, *[4] * (len(widths) - 3)]
