"""GPTQModel, AutoGPTQ's successor, reads what we export, and we read what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planner.common.progress import Progress
from planner.exchange.autogptq import export_gptq, import_gptq
from planner.exchange.autogptq.names import module_name
from planner.exchange.dense import dequantize_linear, export_dense
from planner.model.architectures import ARCHITECTURES
from tests.paths import MIXTRAL, MODELS, QWEN
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


def tokens_of(model: str) -> list[int]:
    from transformers import AutoTokenizer

    text = (MODELS / model / "held_out.txt").read_text()[:4000]
    return list(AutoTokenizer.from_pretrained(MODELS / model)(text).input_ids[:TOKENS])


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


@pytest.fixture(scope="module")
def seen(integer_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Run GPTQModel once, for all tests."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    mixtral, qwen = MIXTRAL, QWEN
    ours = {
        "mixtral": integer_checkpoint(mixtral, "rtn", 4, 128),
        "qwen": integer_checkpoint(qwen, "hqq", 16, 64),
        "whole rows": integer_checkpoint(qwen, "rtn", 8, -1),
        "version 1": integer_checkpoint(qwen, "rtn", 4, 32),
    }
    symmetric(ours["version 1"])
    jobs: list[dict[str, object]] = []
    tokens: dict[str, list[int]] = {}
    for case, path in ours.items():
        export_gptq(path, folder / case, "v1" if case == "version 1" else "v2", QUIET)
        tokens[case] = tokens_of("stdlib-mixtral" if case == "mixtral" else "stdlib-qwen3-moe")
    for case, source, form in (("their mixtral", mixtral, "gptq"), ("their qwen", qwen, "gptq_v2")):
        jobs.append({"source": str(source), "format": form, "output": str(folder / case)})
        tokens[case] = tokens_of(source.name)
    for case in tokens:
        jobs.append({"folder": str(folder / case), "tokens": tokens[case], "output": f"{folder / case}.safetensors"})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # It wants two threads, one of its own and one to load, and would compile every matrix's dequantization.
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder / "jobs.json")]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    for case in ("their mixtral", "their qwen"):
        ours[case] = folder / f"{case} imported"
        import_gptq(folder / case, ours[case], QUIET)
    return {case: Seen(path, load_file(f"{folder / case}.safetensors"), tokens[case]) for case, path in ours.items()}


CASES = ["mixtral", "qwen", "whole rows", "version 1", "their mixtral", "their qwen"]


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_has_the_same_values(seen: dict[str, Seen], case: str) -> None:
    """One rounding to float16 apart from ours in float32, that is: none."""
    ours, theirs = seen[case].ours, dict(seen[case].theirs)
    del theirs["logits"]
    config, row = load_config(ours), ARCHITECTURES[read_json(ours / "config.json")["model_type"]]
    with ShardSet(ours) as shards:
        experts = {matrix.name(PACKED): matrix for matrix in expert_matrices(shards, config)}
        for name in shards.tensors:
            base, _, suffix = name.rpartition(".")
            if suffix == PACKED:
                matrix = experts.get(name)
                values = matrix.dequantize(shards) if matrix else dequantize_linear(shards, base, config.linear.bits)
                assert torch.equal(theirs.pop(module_name(row, base)), values.half()), base
        for name, values in theirs.items():  # what is not packed with us: their asymmetric linears
            torch.testing.assert_close(shards.load(f"{name}.weight").float(), values.float(), rtol=2**-8, atol=0)
    assert bool(theirs) == (case == "their qwen")


@pytest.mark.parametrize("case", CASES)
def test_the_model_answers_like_the_dense_one(seen: dict[str, Seen], case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_dense(seen[case].ours, tmp_path / "dense", QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    with torch.inference_mode():
        logits = model(torch.tensor([seen[case].tokens])).logits.float()
    theirs = seen[case].theirs["logits"]
    assert float((theirs - logits).norm() / logits.norm()) < 0.02
    assert float((theirs.argmax(-1) == logits.argmax(-1)).float().mean()) > 0.95


def test_the_widths_are_those_of_the_rules(seen: dict[str, Seen]) -> None:
    for case in ("their mixtral", "their qwen"):
        for widths in load_config(seen[case].ours).experts.values():
            assert widths == [2, 3, 8, *[4] * (len(widths) - 3)]
