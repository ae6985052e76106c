"""Run a model and a reference over a text in passes of bounded size. Every finished pass is saved."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from planner.calibration.kl.gradients import head_rows
from planner.common.memory import return_freed_heap
from planner.common.progress import Progress
from planner.evaluation.reader import Reader
from planner.evaluation.scores import Score, perplexity_of, refuse_not_finite, summarize, token_distances, token_losses
from planner.output.files import write_tensors
from vllm_moeq.format import CheckpointError

STATES = 1 << 30
"""Maximum bytes of a model's hidden states between two layers. A pass takes five times as much disk space."""


FILES = 4
"""Number of files of hidden states in a pass: inputs and outputs of a layer and of its experts."""

LOGITS_ALONE, LOGITS_BESIDE = 3, 5
"""Number of tensors of the logits' size in memory: for one model alone, and for a comparison with another."""


@dataclass(frozen=True)
class TextScore:
    """The scores of a model on a text.

    Attributes:
        model: score of the model; without a reference, its KL divergence is 0.
        reference: perplexity of the reference and its standard error; None without a reference.
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
    """Score a model on windows of a text. Finished passes of a killed run in ``folder`` are not run again.

    Args:
        model: the model to score.
        reference: a model with the same vocabulary for KL(reference ‖ model); None for no KL divergence.
        tokens: int64 [windows, length].
        targets: next tokens, int64 [windows, length]; −1 marks positions without one.
        folder: folder for files; the caller deletes it.
        progress: shows the progress.

    Raises:
        MoeqError: a damaged tensor, outputs that are not finite, a full disk.
    """
    largest = max(reader.state_bytes for reader in (model, reference) if reader is not None)
    size = max(1, STATES // (largest * tokens.shape[1]))
    parts = list(zip(tokens.split(size), targets.split(size), strict=True))
    names = [f", pass {number + 1} of {len(parts)}" if len(parts) > 1 else "" for number in range(len(parts))]
    paths = [folder / f"pass-{number:05d}.safetensors" for number in range(len(parts))]
    left = [of for of, path in zip(names, paths, strict=True) if not path.is_file()]
    readers = ("reference", "model") if reference is not None else ("model",)
    with progress.whole([(f"{reader}{of}", None) for of in left for reader in readers]):
        for (inputs, wanted), path, of in zip(parts, paths, names, strict=True):
            if not path.is_file():
                values = _read_pass(model, reference, inputs, wanted, folder / path.stem, progress, of)
                try:
                    _check(model, reference, values, wanted >= 0)
                except CheckpointError:
                    shutil.rmtree(folder / path.stem, ignore_errors=True)  # no later run can use it
                    raise
                write_tensors(path, values)
            shutil.rmtree(folder / path.stem, ignore_errors=True)
    passes = [load_file(path) for path in paths]
    found = {name: torch.cat([values[name] for values in passes]) for name in passes[0]}
    known = targets >= 0
    score = summarize(found["loss"], found["divergence"], found["same"], known)
    return TextScore(score, None if reference is None else perplexity_of(found["reference"], known))


def _check(model: Reader, reference: Reader | None, values: dict[str, torch.Tensor], known: torch.Tensor) -> None:
    """Refuse outputs that are not finite, first the reference's: they would make the distance from it wrong, too."""
    if reference is not None:
        refuse_not_finite(reference.folder, values["reference"][known])
    refuse_not_finite(model.folder, values["loss"][known], values["divergence"][known])


def _read_pass(
    model: Reader,
    reference: Reader | None,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    folder: Path,
    progress: Progress,
    of: str,
) -> dict[str, torch.Tensor]:
    """Return values per token [windows, length]: ``loss``, ``divergence``, ``same``, and ``reference``, its loss."""
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
    return_freed_heap()
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
