"""Score several models that share one head by the outputs of their last layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.calibration.kl.gradients import head_rows
from planner.calibration.reading.decoder import Decoder
from planner.evaluation.scores import Score, refuse_not_finite, summarize, token_distances, token_losses


def score(
    decoder: Decoder, reference: torch.Tensor, others: torch.Tensor, targets: torch.Tensor, names: Sequence[object]
) -> list[Score]:
    """Return the score of each model.

    Args:
        decoder: model whose head all share.
        reference: output of the original's last layer [sequences, length, hidden].
        others: outputs of the models' last layers [models, sequences, length, hidden].
        targets: next tokens, int64 [sequences, length]; −1 marks positions without one.
        names: the models, for messages.

    Raises:
        CheckpointError: a model's outputs are not finite.
    """
    shape = (len(others), targets.numel())
    loss, divergence = torch.zeros(shape), torch.zeros(shape)
    same = torch.zeros(shape, dtype=torch.bool)
    exact, flat, wanted = reference.flatten(0, 1), others.flatten(1, 2), targets.flatten()
    with torch.no_grad(), decoder.head() as logits:
        for rows in torch.arange(len(wanted)).split(head_rows(decoder.vocabulary)):
            original = logits(exact[rows]).log_softmax(dim=-1)
            for number in range(len(others)):
                likely = logits(flat[number][rows]).log_softmax(dim=-1)
                loss[number, rows] = token_losses(likely, wanted[rows])
                divergence[number, rows], same[number, rows] = token_distances(original, likely)
    known = targets >= 0
    for number, name in enumerate(names):
        refuse_not_finite(name, loss[number][known.flatten()], divergence[number][known.flatten()])
    return [
        summarize(
            loss[number].view_as(targets), divergence[number].view_as(targets), same[number].view_as(targets), known
        )
        for number in range(len(others))
    ]
