"""Quantize expert matrices with a type of llama.cpp, by the library in the package llama-cpp-python.

The functions are those that ``llama-quantize`` calls. A block of its types has 256 weights of one row. Where rows are
shorter, several share a block here; ``llama-quantize`` would choose another type for them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.peers.processes.job import read_job

FLOATS = ctypes.POINTER(ctypes.c_float)
RESULTS = {
    "ggml_type_name": ctypes.c_char_p,
    "ggml_blck_size": ctypes.c_int64,
    "ggml_type_size": ctypes.c_size_t,
    "ggml_quantize_chunk": ctypes.c_size_t,
}
"""Functions of ggml's C interface → what they return."""


class Types:
    """The quantization functions of ggml."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("llama_cpp")  # not imported: that would start its backends
        if package is None or package.origin is None:
            raise SystemExit("error: expected the package llama-cpp-python, found none")
        self.library = ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libggml-base.so"))
        for name, result in RESULTS.items():
            getattr(self.library, name).restype = result
        self.library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS,
        )  # fmt: skip

    def number(self, name: str) -> int:
        """Return the number of a type."""
        for number in range(64):
            found = self.library.ggml_type_name(number)
            if found is not None and found.decode().upper() == name:
                return number
        raise SystemExit(f"error: expected a type of llama.cpp, found {name}")

    def quantize(self, number: int, rows: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """Return the bytes of some rows; the importance belongs to the inputs of every row."""
        block, size = self.library.ggml_blck_size(number), self.library.ggml_type_size(number)
        packed = np.empty(rows.size // block * size, np.uint8)
        written = self.library.ggml_quantize_chunk(
            number, rows.ctypes.data_as(FLOATS), packed.ctypes.data, 0, *rows.shape, importance.ctypes.data_as(FLOATS)
        )
        if written != packed.nbytes:
            raise SystemExit(f"error: expected {packed.nbytes} bytes from ggml_quantize_chunk, found {written}")
        return packed

    def dequantize(self, number: int, packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the values of some bytes."""
        values = np.empty(shape, np.float32)
        function = getattr(self.library, f"dequantize_row_{self.library.ggml_type_name(number).decode()}")
        function(ctypes.c_void_p(packed.ctypes.data), values.ctypes.data_as(FLOATS), ctypes.c_int64(values.size))
        return values


def main() -> None:
    """Do the job."""
    job, types = read_job(), Types()
    matrices, importance = load_file(job.experts), load_file(job.importance)
    number = types.number(job.options["type"])
    block, size = types.library.ggml_blck_size(number), types.library.ggml_type_size(number)
    if size != job.options["bytes"]:
        raise SystemExit(f"error: expected blocks of {job.options['bytes']} bytes, found {size}")
    began, packed = time.perf_counter(), {}
    for matrix, weight in matrices.items():
        shared = max(1, block // weight.shape[1])
        rows = np.ascontiguousarray(weight.reshape(-1, weight.shape[1] * shared))
        packed[matrix] = types.quantize(number, rows, np.tile(importance[matrix], shared))
    seconds = time.perf_counter() - began
    shapes = {matrix: weight.shape for matrix, weight in matrices.items()}
    save_file({it: types.dequantize(number, packed[it], shapes[it]) for it in packed}, job.output)
    job.finish(seconds, ("llama-cpp-python",))


if __name__ == "__main__":
    main()
