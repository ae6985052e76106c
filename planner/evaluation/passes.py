"""A text read by a model, and by a reference, in passes of bounded size; every finished pass is kept."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from planner.calibration.kl.gradients import head_rows
from planner.common.progress import Progress
from planner.evaluation.reader import Reader
from planner.evaluation.scores import Score, perplexity_of, summarize, token_distances, token_losses
from planner.output.files import write_tensors

STATES = 1 << 30
"""Bytes of a model's states, at most, between two of its layers; a pass takes five times as much on the disk."""


@dataclass(frozen=True)
class TextScore:
    """What a text says of a model.

    Attributes:
        model: without a reference, its KL divergence is that from itself.
        reference: perplexity of the reference, and its standard error, if one read the text.
    """

    model: Score
    reference: tuple[float, float] | None


def evaluate_text(
    model: Reader,
    reference: Reader | None,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> TextScore:
    """Score a model on windows of a text; continues behind what a killed run left in ``folder``.

    Args:
        model: reads the text.
        reference: with the same vocabulary; reads it too, so that KL(reference ‖ model) is known.
        tokens: int64 [windows, length].
        targets: the next tokens, same shape, −1 where there is none.
        folder: for files that the caller deletes.
        progress: says how far it is.

    Raises:
        MoeqError: a damaged tensor, a full disk.
    """
    largest = max(reader.state_bytes for reader in (model, reference) if reader is not None)
    size = max(1, STATES // (largest * tokens.shape[1]))
    parts = list(zip(tokens.split(size), targets.split(size), strict=True))
    for number, (inputs, wanted) in enumerate(parts):
        path = folder / f"pass-{number:05d}.safetensors"
        if not path.is_file():
            of = f", pass {number + 1} of {len(parts)}" if len(parts) > 1 else ""
            write_tensors(path, _read_pass(model, reference, inputs, wanted, folder / path.stem, progress, of))
        shutil.rmtree(folder / path.stem, ignore_errors=True)
    passes = [load_file(folder / f"pass-{number:05d}.safetensors") for number in range(len(parts))]
    found = {name: torch.cat([values[name] for values in passes]) for name in passes[0]}
    known = targets >= 0
    score = summarize(found["loss"], found["divergence"], found["same"], known)
    return TextScore(score, None if reference is None else perplexity_of(found["reference"], known))


def _read_pass(
    model: Reader,
    reference: Reader | None,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    folder: Path,
    progress: Progress,
    of: str,
) -> dict[str, torch.Tensor]:
    """Return values per token [windows, length]: ``loss``, ``divergence``, ``same``, the ``reference``'s loss."""
    exact = None
    if reference is not None:
        exact = reference.read(tokens, folder / "reference", progress, f"reference{of}").flatten(0, 1)
        reference.release()
    states = model.read(tokens, folder / "model", progress, f"model{of}").flatten(0, 1)
    if reference is not None:
        model.release()
    wanted, count = targets.flatten(), targets.numel()
    found = {name: torch.zeros(count) for name in ("loss", "divergence", "reference")}
    found["same"] = torch.ones(count, dtype=torch.bool)
    with torch.no_grad(), ExitStack() as stack:
        head = stack.enter_context(model.head())
        other = None if reference is None else stack.enter_context(reference.head())
        for rows in torch.arange(count).split(head_rows(model.vocabulary)):
            likely = head(states[rows]).log_softmax(dim=-1)
            found["loss"][rows] = token_losses(likely, wanted[rows])
            if exact is not None and other is not None:
                original = other(exact[rows]).log_softmax(dim=-1)
                found["reference"][rows] = token_losses(original, wanted[rows])
                found["divergence"][rows], found["same"][rows] = token_distances(original, likely)
    return {name: values.view_as(targets) for name, values in found.items()}
