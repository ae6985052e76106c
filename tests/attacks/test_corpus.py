"""Attacks are refused alike by ``moeq verify``, the vLLM plugin and the transformers loader, within bounds."""

from __future__ import annotations

import glob
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.memory import peak_bytes, reset_peak, resident_bytes
from tests.attacks.cases import CORPUS
from tests.attacks.damages.attack import Attack
from tests.conftest import one_line
from vllm_moeq.format import CODES_PER_BLOCK, SIGNS, MoeqError, load_config, verify
from vllm_moeq.serving.checkpoint import Checkpoint
from vllm_moeq.serving.loading import ExpertLoader, Partition

pytestmark = pytest.mark.slow

SECONDS = 2.0
BYTES = 200 << 20
SHARD_IDS = ("w1", "w3", "w2")
HIDDEN, INTERMEDIATE = 64, 128

Moeq = Callable[..., Any]


@contextmanager
def bounded() -> Iterator[None]:
    """Measure this process: seconds of all its threads, and how far its memory grows."""
    reset_peak()
    memory, began = resident_bytes(), time.process_time()
    yield
    seconds, grown = time.process_time() - began, peak_bytes() - memory
    print(f"{seconds:.2f} s, {grown / 2**20:.0f} MiB")
    assert seconds < SECONDS
    assert grown < BYTES


def check_message(message: str, attack: Attack) -> None:
    assert message.isprintable()
    assert len(message) < 2000
    for words in attack.words:
        assert words in message


@pytest.fixture
def attacked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    attack: Attack = request.param
    folder = Path(shutil.copytree(request.getfixturevalue(attack.base), tmp_path / "attacked"))
    attack.change(folder)
    return folder


attacks = pytest.mark.parametrize(
    ("attack", "attacked"), [(it, it) for it in CORPUS], ids=[it.name for it in CORPUS], indirect=["attacked"]
)


def test_corpus_is_large_and_names_are_unique() -> None:
    assert len({attack.name for attack in CORPUS}) == len(CORPUS) >= 40


@attacks
def test_verify(attack: Attack, attacked: Path, moeq: Moeq) -> None:
    with bounded():
        outcome = moeq("verify", attacked)
    check_message(one_line(outcome), attack)


class VllmLoad:
    """What vLLM does with a checkpoint of ours, in its order, without the rest of a server."""

    def __init__(self) -> None:
        from vllm.model_executor.model_loader import weight_utils

        from vllm_moeq.serving.config import MoeqQuantizationConfig

        self.plugin, self.tools = MoeqQuantizationConfig, weight_utils

    def __call__(self, folder: Path, known: dict[str, Any] | None) -> None:
        """Load; ``known`` is the quantization_config where vLLM could not have read the one in the folder."""
        from transformers import AutoConfig

        hf_config, found = None, known
        if found is None:
            hf_config = AutoConfig.from_pretrained(folder)
            found = hf_config.quantization_config
        plugin = self.plugin.from_config(found)
        plugin.maybe_update_config(str(folder), hf_config=hf_config)
        # From here on: what happens when the model exists.
        files = self.tools.filter_duplicate_safetensors_files(
            glob.glob(f"{folder}/*.safetensors"), str(folder), "model.safetensors.index.json"
        )
        layers = {prefix: self.layer(plugin, prefix, folder) for prefix in plugin.widths}
        for name, tensor in self.tools.safetensors_weights_iterator(files, use_tqdm_on_load=False):
            for prefix, (loader, parameters) in layers.items():
                if name.startswith(f"{prefix}."):
                    expert, projection, suffix = name.removeprefix(f"{prefix}.").split(".")
                    part = "w2" if projection == "w2" else "w13"
                    load = loader.sign_loader(part) if suffix == SIGNS else loader.loader_for(suffix)
                    load(parameters[part, suffix], tensor, name, projection, int(expert))
        for loader, _ in layers.values():
            loader.check_complete()

    @staticmethod
    def layer(plugin: Any, prefix: str, folder: Path) -> tuple[ExpertLoader, dict[tuple[str, str], Any]]:
        widths = tuple(plugin.widths[prefix])
        part = Partition(prefix, plugin.moeq, widths, tuple(range(len(widths))), HIDDEN, INTERMEDIATE, 0)
        parameters = {}
        for name, matrices in (("w13", part.w13), ("w2", part.w2)):
            signs = torch.empty(matrices.columns // CODES_PER_BLOCK, dtype=torch.int32)
            for suffix, value in ((SIGNS, signs), *((suffix, matrices.empty(suffix)) for suffix in matrices.suffixes)):
                parameters[name, suffix] = torch.nn.Parameter(value, requires_grad=False)
        return ExpertLoader(part, Checkpoint(str(folder))), parameters


@pytest.fixture(scope="module")
def vllm_load(quantized_mixtral: Path, trellis_mixtral: Path) -> VllmLoad:
    load = VllmLoad()
    for folder in (quantized_mixtral, trellis_mixtral):
        load(folder, None)  # accepts the checkpoint as it was; imports happen here
    return load


@attacks
def test_vllm_plugin(attack: Attack, attacked: Path, vllm_load: VllmLoad, quantized_mixtral: Path) -> None:
    known = load_config(quantized_mixtral).model_dump(exclude_none=True) if attack.foreign else None
    with bounded(), pytest.raises(MoeqError) as error:
        vllm_load(attacked, known)
    check_message(str(error.value), attack)


def load_in_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    import vllm_moeq.hf  # noqa: F401  (registers the method)

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def transformers_load(quantized_mixtral: Path, trellis_mixtral: Path) -> Callable[[Path], None]:
    for folder in (quantized_mixtral, trellis_mixtral):
        load_in_transformers(folder)
    return load_in_transformers


@attacks
def test_transformers(
    attack: Attack, attacked: Path, transformers_load: Callable[[Path], None], quantized_mixtral: Path
) -> None:
    if not attack.foreign:
        with bounded(), pytest.raises(MoeqError) as error:
            transformers_load(attacked)
    else:
        from vllm_moeq.hf import MoeqHfQuantizer, MoeqQuantizationConfig

        known = MoeqQuantizationConfig(**load_config(quantized_mixtral).model_dump(exclude_none=True))
        with bounded(), pytest.raises(MoeqError) as error:
            MoeqHfQuantizer(known)._process_model_before_weight_loading(None, [str(attacked / "model.safetensors")])
    check_message(str(error.value), attack)


def test_the_links_of_the_hubs_cache_are_followed(quantized_copy: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(quantized_copy.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert verify(snapshot).experts == 16
    load_in_transformers(snapshot)
