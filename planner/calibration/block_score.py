"""BSP, the block score predictor: how much an MoE block turns the tokens that pass through it.

Source: Li et al., "QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts", 2024. A block does
little if its output points where its input points. It then needs fewer bits: the lower its score, the more important is
the block. The score is the prediction of a small network, trained per block, that reads only the block's input. So new
text can be scored without running the experts. On the text that the network learned from, the score is little else than
the mean cosine.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from vllm_moeq.format import CheckpointError

HIDDEN, STEPS, BATCH = 64, 400, 512
"""Neurons in a predictor's hidden layer, training steps, and tokens per step."""

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2

ROWS = 1 << 15
"""Maximum number of tokens that a predictor learns from. It is also the number of tokens read from a file at a time."""


def block_cosine(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return the cosine between the input and the output of an MoE block, token by token: float32 [n].

    The input is the hidden state that router and experts read, after the layer's norm. The output is the weighted sum
    of the experts, before it is added to the residual stream. The authors' code scores blocks in this way. It can also
    compare the residual stream before and after the block; this function does so if given those. Do not add ``inputs``
    to ``outputs``: that is neither of the two, because the norm has changed the scale of ``inputs`` only.

    Args:
        inputs: [n, hidden].
        outputs: same shape.

    Returns:
        NaN for tokens with a value that is not finite; 0 where a vector is 0.

    Raises:
        ValueError: the shapes differ.
    """
    if inputs.shape != outputs.shape or inputs.dim() != 2:
        raise ValueError(f"expected inputs and outputs of one shape [n, hidden], found {inputs.shape}, {outputs.shape}")
    pairs = zip(inputs.split(ROWS), outputs.split(ROWS), strict=True)
    parts = [torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=1) for one, other in pairs]
    return torch.cat(parts).clamp_(-1, 1) if parts else inputs.new_empty(0, dtype=torch.float32)


class BlockPredictor(torch.nn.Module):
    """A network with one hidden layer that predicts a token's cosine from its input.

    Args:
        inputs: training inputs, float32 [n, hidden], n > 0; their mean and deviation standardise all inputs.
        cosines: cosines of the same tokens, float32 [n]; their mean and deviation standardise the predictions.
        generator: draws the initial weights.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    center: torch.Tensor
    spread: torch.Tensor

    def __init__(self, inputs: torch.Tensor, cosines: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        for name, values in (("mean", inputs), ("center", cosines)):
            self.register_buffer(name, values.mean(dim=0))
        for name, values in (("scale", inputs), ("spread", cosines)):
            self.register_buffer(name, _deviation(values))
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for before, behind in pairwise((inputs.shape[1], HIDDEN, 1)):
            drawn = torch.empty(behind, before).normal_(std=before**-0.5, generator=generator)
            self.weights.append(drawn.to(inputs.device))
            self.biases.append(torch.zeros(behind, device=inputs.device))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return predictions [n] for inputs [n, hidden], in float32 and between −1 and 1."""
        return (self.center + self.spread * self.standardised(inputs)).clamp(-1, 1)

    def standardised(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return predictions [n], standardised with the cosines' mean and deviation."""
        hidden = (inputs.float() - self.mean) / self.scale
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(hidden, self.weights[0], self.biases[0]))
        return torch.nn.functional.linear(hidden, self.weights[1], self.biases[1])[:, 0]

    @torch.no_grad()
    def score(self, inputs: torch.Tensor) -> float:
        """Return the mean prediction for inputs [n, hidden], without rows that contain NaN or infinity.

        Raises:
            CheckpointError: no input is finite.
        """
        total, count = 0.0, 0
        for part in inputs.split(ROWS):
            usable = part[torch.isfinite(part).all(dim=1)]
            total += float(self(usable.to(self.mean.device)).sum(dtype=torch.float64))
            count += usable.shape[0]
        if count == 0:
            raise CheckpointError("expected finite inputs of an MoE block, found none")
        return total / count


@torch.inference_mode(False)
@torch.enable_grad()
def train_predictor(inputs: torch.Tensor, cosines: torch.Tensor, seed: int) -> BlockPredictor:
    """Train a predictor on a block's calibration tokens.

    The result is the same for the same arguments and number of threads.

    Args:
        inputs: the block's inputs [n, hidden]; rows with NaN or infinity are left out.
        cosines: :func:`block_cosine` of the same tokens, float [n]; values that are not finite are left out.
        seed: seed of the initial weights, of the order of tokens and, with more than :data:`ROWS` tokens, of their
            choice.

    Raises:
        CheckpointError: no token is usable.
        ValueError: the numbers of tokens differ.
    """
    if cosines.shape != inputs.shape[:1]:
        raise ValueError(f"expected a cosine for each of {inputs.shape[0]} inputs, found {list(cosines.shape)}")
    generator = torch.Generator().manual_seed(seed)
    usable = _usable(inputs, cosines)
    if usable.numel() == 0:
        raise CheckpointError("expected finite inputs and cosines of an MoE block, found none")
    chosen = usable[torch.randperm(usable.numel(), generator=generator)[:ROWS]]
    known, wanted = inputs[chosen].float(), cosines[chosen].float()
    predictor = BlockPredictor(known, wanted, generator)
    target = (wanted - predictor.center) / predictor.spread
    optimizer = torch.optim.AdamW(predictor.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(known.shape[0], (min(BATCH, known.shape[0]),), generator=generator)
        error = predictor.standardised(known[rows]) - target[rows]
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    return predictor.requires_grad_(False)


def _usable(inputs: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """Return the indices of the rows whose input and cosine are finite, int64 [n]."""
    pairs = zip(inputs.split(ROWS), cosines.split(ROWS), strict=True)
    finite = [torch.isfinite(one).all(dim=1) & torch.isfinite(other) for one, other in pairs]
    return torch.cat(finite).nonzero()[:, 0]


def _deviation(values: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of [n, …] over n, with 1 in place of 0, to divide by."""
    found = values.std(dim=0, unbiased=False)
    return torch.where(found > 0, found, torch.ones_like(found))
