"""BSP, the block score predictor: how much an MoE block turns the tokens that pass through it.

Source: Li et al., "QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts", 2024. A block whose
output points where its input points does little, and can do with fewer bits: the lower its score, the more important is
the block. The score is what a small network, trained per block, predicts from the block's input alone: for new text,
without its experts. On the text that it learned from it is little else than the mean cosine.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from vllm_moeq.format import CheckpointError

HIDDEN, STEPS, BATCH = 64, 400, 512
"""Of a predictor: its hidden layer's neurons, and its training's steps and tokens in each."""

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2

ROWS = 1 << 15
"""Tokens that a predictor learns from, at most; also read at a time, since a text's inputs lie in a file."""


def block_cosine(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return the cosine between the input and the output of an MoE block, token by token: float32 [n].

    What is compared: the hidden state that router and experts read, behind the layer's norm, and the weighted sum of
    the experts, before it is added to the residual stream. The authors' code scores blocks so; it can also compare the
    residual stream before and behind the block, which this function does if given those. Adding ``outputs`` to
    ``inputs`` would be neither: the norm has changed the scale of one and not of the other.

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
    """Predicts a token's cosine from its input, by one hidden layer.

    Args:
        inputs: what it will learn from, float32 [n, hidden], n > 0; standardised with their mean and deviation.
        cosines: of the same tokens, float32 [n]; predictions are in units of their deviation, from their mean.
        generator: draws the first weights.
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
        """Return predictions [n] in units of the cosines' deviation, from their mean."""
        hidden = (inputs.float() - self.mean) / self.scale
        hidden = torch.nn.functional.silu(torch.nn.functional.linear(hidden, self.weights[0], self.biases[0]))
        return torch.nn.functional.linear(hidden, self.weights[1], self.biases[1])[:, 0]

    @torch.no_grad()
    def score(self, inputs: torch.Tensor) -> float:
        """Return the mean prediction for inputs [n, hidden], those with NaN or infinity left out.

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
    """Train a predictor on a block's calibration tokens; the same for the same arguments and number of threads.

    Args:
        inputs: of the block, [n, hidden]; rows with NaN or infinity are left out.
        cosines: :func:`block_cosine` of the same tokens, float [n]; likewise.
        seed: of the first weights, the order of tokens and, if there are more than :data:`ROWS`, their choice.

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
    """Return the rows, int64 [n], where input and cosine are finite."""
    pairs = zip(inputs.split(ROWS), cosines.split(ROWS), strict=True)
    finite = [torch.isfinite(one).all(dim=1) & torch.isfinite(other) for one, other in pairs]
    return torch.cat(finite).nonzero()[:, 0]


def _deviation(values: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of [n, …] over n; 1 where there is none, which then divides nothing but 0."""
    found = values.std(dim=0, unbiased=False)
    return torch.where(found > 0, found, torch.ones_like(found))
