"""The CPU kernel in C++: packed codes times activations in fixed point, in one pass over the weights.

``csrc/core.h`` describes the order in memory and ``csrc/layer.h`` a call; ``build.py`` compiles the kernel and
``layer.py`` is the backend.
"""
