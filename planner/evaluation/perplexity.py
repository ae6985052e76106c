"""Perplexity on a text, computed by transformers."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from planner.dense import export_dense
from planner.progress import Progress
from vllm_moeq.format import QUANT_METHOD, ConfigError, UsageError, read_json


def read_text(path: Path) -> str:
    """Return a UTF-8 text file's contents.

    Raises:
        UsageError: no such file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a UTF-8 text file ({error})") from None


def _method(config: dict[str, Any]) -> Any:
    found = config.get("quantization_config")
    return found.get("quant_method") if isinstance(found, dict) else None


@torch.inference_mode()
def perplexity(folder: Path, text: str, progress: Progress, window: int = 512, max_tokens: int | None = None) -> float:
    """Return exp of the mean negative log-likelihood per token, over consecutive windows.

    A moeq checkpoint is measured through its dequantized weights, exported to a temporary folder.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        text: the text to predict.
        progress: where progress is shown.
        window: tokens of context; each window predicts all its tokens from those before it.
        max_tokens: use only the first so many tokens.

    Raises:
        MoeqError: a damaged checkpoint, or a text of fewer than two tokens.
    """
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and _method(config) == QUANT_METHOD:
        with tempfile.TemporaryDirectory() as temporary:
            dense = Path(temporary) / "dense"
            export_dense(folder, dense, Progress(quiet=True))
            return perplexity(dense, text, progress, window, max_tokens)

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it ({error})") from None
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:max_tokens])
    if ids.numel() < 2:
        raise UsageError(f"expected a text of at least two tokens, found {ids.numel()}")
    total, count = 0.0, 0
    for start in progress.track(range(0, ids.numel() - 1, window), "perplexity"):
        tokens = ids[start : start + window + 1][None]
        logits = model(input_ids=tokens[:, :-1]).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        count += tokens.shape[1] - 1
    return math.exp(total / count)
