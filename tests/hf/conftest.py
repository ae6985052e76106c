"""Quantized checkpoints in transformers, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vllm_moeq.hf  # noqa: F401  (registers the method)
from planner.common.progress import Progress
from planner.exchange.dense import export_dense
from tests.architectures import TINY, build, quantize
from tests.by_hand import quantize_by_hand
from tests.paths import MODELS


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint and its dense export in float32, whose values are not rounded."""

    name: str
    quantized: Path
    dense: Path
    loaded: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> Any:
        """transformers' class for its configuration."""
        if self.name == "switch_transformers":
            return transformers.AutoModelForSeq2SeqLM
        return transformers.AutoModelForImageTextToText if self.name == "llama4" else transformers.AutoModelForCausalLM

    def load(self, which: str, dtype: torch.dtype) -> Any:
        """Return ``quantized`` or ``dense`` as transformers loads it; once, so not to be changed."""
        if (which, dtype) not in self.loaded:
            self.loaded[which, dtype] = self.kind.from_pretrained(getattr(self, which), dtype=dtype)
        return self.loaded[which, dtype]


def dense_of(quantized: Path, folder: Path, name: str) -> Pair:
    export_dense(quantized, folder, Progress(quiet=True), torch.float32)
    return Pair(name, quantized, folder)


def shipped_pair(name: str, folder: Path, **settings: Any) -> Pair:
    """Quantize a shipped model, with experts of every width but 1 in every layer."""
    quantize_by_hand(
        MODELS / name, folder / "quantized",
        lambda layer: [8, 4, 3, 2, 4, 4, 3, 4] * (layer.num_experts // 8), **settings,
    )  # fmt: skip
    return dense_of(folder / "quantized", folder / "dense", name)


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Every architecture, with experts of every width, and packed linears."""
    folder = tmp_path_factory.mktemp("hf")
    build(request.param, folder / "source")
    quantized = quantize(folder / "source", folder / "quantized")
    return dense_of(quantized, folder / "dense", request.param)


@torch.no_grad()
def logits(model: Any, tokens: int = 24) -> torch.Tensor:
    """Return the logits of two sequences of random tokens, float32.

    Of a model with images its language model is asked: around it, transformers 5.24 wants images of Llama-4.
    """
    ids = torch.randint(
        2, model.get_input_embeddings().num_embeddings, (2, tokens), generator=torch.Generator().manual_seed(1)
    )
    more = {"decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
    return getattr(model, "language_model", model)(input_ids=ids, **more).logits.float()
