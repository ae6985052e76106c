"""Estimate the needs of a command before it starts: disk, memory, time, and GPUs to serve its output."""

from planner.estimates.memory import Reading
from planner.estimates.needs import Needs
from planner.estimates.serving import Service, ServingNeeds, serving_needs

__all__ = ["Needs", "Reading", "Service", "ServingNeeds", "serving_needs"]
