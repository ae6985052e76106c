"""What a command will take before it starts: disk, memory, time, and the GPUs that serve its output."""

from planner.needs.memory import Reading
from planner.needs.needs import Needs
from planner.needs.serving import Service, ServingNeeds, serving_needs

__all__ = ["Needs", "Reading", "Service", "ServingNeeds", "serving_needs"]
