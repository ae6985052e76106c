"""How evenly a router spreads tokens over experts: the loss that asks for it, and the shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def layer_balance(logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """Return the load-balancing loss of Switch Transformer, layer by layer, from logits [tokens, experts] each.

    transformers adds up the layers before it multiplies, so that an expert may starve in one layer if its namesake in
    another is busy: the shipped models, trained that way, have experts that hardly any token chooses.
    """
    losses = []
    for layer in logits:
        experts = layer.shape[1]
        probabilities = layer.float().softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=experts) / chosen.numel()
        losses.append(experts * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def shares(logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """Return the share of the choices that each expert has [layers, experts], from logits [tokens, experts] each."""
    chosen = [layer.detach().topk(top_k, dim=-1).indices.flatten() for layer in logits]
    return torch.stack([torch.bincount(one, minlength=logits[0].shape[1]) / one.numel() for one in chosen])
