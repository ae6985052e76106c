"""How source weights of fewer than sixteen bits are stored: one file or row per encoding, one table of methods.

An :class:`Encoding` says by which names and dtypes it is known, and gives a weight a :class:`Codec` from headers alone.
The codec decodes rows of one matrix at a time. :data:`METHODS` says which encodings a ``quant_method`` may have.
"""

from planner.model.codecs.codec import PLAIN, VALUES, Codec, Parts, UnreadableError
from planner.model.codecs.settings import FILES, Settings, read_settings
from planner.model.codecs.table import METHODS, Encoded, Weight, can_read, find_encoded

__all__ = [
    "FILES",
    "METHODS",
    "PLAIN",
    "VALUES",
    "Codec",
    "Encoded",
    "Parts",
    "Settings",
    "UnreadableError",
    "Weight",
    "can_read",
    "find_encoded",
    "read_settings",
]
