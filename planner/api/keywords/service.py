"""The keyword arguments that say what an estimate's output is to serve."""

from __future__ import annotations

from dataclasses import dataclass

from planner.api.keywords.common import Count
from planner.estimates import Service


@dataclass(frozen=True, kw_only=True)
class ServiceKeywords:
    """The load that the quantized model is to serve; only an estimate and the preset of a GPU read it.

    Attributes:
        context: tokens of each request that is served; None is 8192.
        concurrency: requests at a time; None is 16, or the preset's.
        gpu_gib: memory of one GPU, GiB; None is 80, or the preset's.
    """

    context: Count | None = None
    concurrency: Count | None = None
    gpu_gib: float | None = None

    def service(self, usual: Service | None = None) -> Service:
        """Return the load, for estimates.

        Args:
            usual: what counts where a number is left out; None is the load of an estimate without a preset.

        Raises:
            UsageError: a number that is not positive.
        """
        base = usual or Service()
        return Service(
            base.context if self.context is None else self.context,
            base.concurrency if self.concurrency is None else self.concurrency,
            base.gpu_gib if self.gpu_gib is None else self.gpu_gib,
        )
