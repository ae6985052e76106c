"""The router's l2 norm, or its change during training (paper, Definition 3.1, eq. 3)."""

from __future__ import annotations

import torch


def router_norm(trained: torch.Tensor, initial: torch.Tensor | None = None) -> list[float]:
    """Return one score per expert: ‖w_s(T)‖ − ‖w_s(0)‖, or ‖w_s(T)‖ without the initial router.

    Args:
        trained: router weight of the model [experts, hidden].
        initial: router weight before training, same shape; its norm is subtracted if given.

    Raises:
        ValueError: the two routers differ in shape.
    """
    norms = torch.linalg.vector_norm(trained.float(), dim=1)
    if initial is not None:
        if initial.shape != trained.shape:
            raise ValueError(f"expected an initial router {list(trained.shape)}, found {list(initial.shape)}")
        norms = norms - torch.linalg.vector_norm(initial.float(), dim=1)
    return [float(norm) for norm in norms]
