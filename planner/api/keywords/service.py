"""The keyword arguments that say what an estimate's output is to serve."""

from __future__ import annotations

from dataclasses import dataclass

from planner.api.keywords.common import Count
from planner.estimates import Service


@dataclass(frozen=True, kw_only=True)
class ServiceKeywords:
    """The load that the quantized model is to serve; only an estimate reads it.

    Attributes:
        context: in an estimate, tokens of each request that is served.
        concurrency: in an estimate, requests at a time.
        gpu_gib: in an estimate, memory of one GPU, GiB.
    """

    context: Count = Service.context
    concurrency: Count = Service.concurrency
    gpu_gib: float = Service.gpu_gib

    def service(self) -> Service:
        """Return the load, for estimates.

        Raises:
            UsageError: a number that is not positive.
        """
        return Service(self.context, self.concurrency, self.gpu_gib)
