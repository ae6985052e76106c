"""The real server refuses, with the same words, before it answers anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from planner.evaluation.vllm_server import Server, ServerError, cpu_environment
from tests.attacks.forge import filled, ours, point, shard, tensor
from tests.paths import MIXTRAL, MOEQ
from tests.tiers import thorough

pytestmark = pytest.mark.slow

FLAGS = ["--max-model-len", "128", "--max-num-seqs", "2", "--dtype", "bfloat16", "--enforce-eager"]
LAYER = "model.layers.0.block_sparse_moe.experts"
NAME = f"{LAYER}.3.w2"

ATTACKS = {
    "scale NaN": (filled(f"{NAME}.weight_scale", float("nan")), f"tensor {NAME}.weight_scale: expected finite values"),
    "missing words": (tensor(f"{NAME}.weight_packed", lambda _: None), f"tensor {NAME}.weight_packed is missing"),
    "traversal": (point("../../secret.safetensors"), "expected a plain shard file name"),
    "unknown key": (ours(lambda it: it.update(surprise=1)), "config.json: surprise"),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacks") / "quantized"
    subprocess.run([MOEQ, "quantize", MIXTRAL, "-o", folder, "--quantizer", "rtn"], check=True)
    return folder


@pytest.mark.server
@pytest.mark.parametrize("name", thorough(ATTACKS, ["scale NaN", "traversal"]))
def test_the_server_refuses(name: str, quantized: Path, tmp_path: Path) -> None:
    change, words = ATTACKS[name]
    folder = Path(shutil.copytree(quantized, tmp_path / "model"))
    file = shard(folder, f"{NAME}.weight_packed").name
    change(folder)
    with pytest.raises(ServerError, match=r"exited"), Server(folder, tmp_path / "log", FLAGS, cpu_environment()):
        pass
    log = (tmp_path / "log").read_text()
    assert words in log
    if "tensor" in words and "missing" not in words:
        assert f"{folder / file}: {words}" in log
