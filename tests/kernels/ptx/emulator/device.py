"""A device for Triton: its driver runs the PTX that a launch compiles to, on the memory of CPU tensors.

The host's code, the just-in-time compiler and its choices are those of a GPU; ptxas does not run.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from tests.kernels.ptx.emulator.findings import Findings
from tests.kernels.ptx.emulator.global_memory import GlobalMemory
from tests.kernels.ptx.emulator.instructions import Kernel
from tests.kernels.ptx.emulator.machine import Grid, Machine
from tests.kernels.ptx.emulator.outcome import Outcome
from tests.kernels.ptx.emulator.parser import parse
from tests.kernels.ptx.emulator.rounding import Array

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}
"""The shared memory of a thread block on each architecture, and so the architectures that there are."""

THREADS = 512
"""Threads that run side by side at most, in whole thread blocks."""

UNSET = 255
"""The byte in fresh memory: floats of such bytes are no numbers."""

Change = Callable[[str, str], str]
"""A function from a kernel's name and PTX to other PTX."""


@dataclass
class Session:
    """What the launches of one :func:`emulate` did.

    Attributes:
        change: a function that breaks PTX on purpose.
        launches: the kernel and the PTX of each launch.
        findings: what the sanitizer saw.
        changed: whether ``change`` changed anything.
    """

    change: Change | None = None
    launches: list[tuple[str, str]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    changed: bool = False
    fresh: dict[int, tuple[torch.Tensor, Array]] = field(default_factory=dict)

    def launch(self, name: str, text: str, shared: int, grid: Grid, arguments: list[tuple[str, str, Any]]) -> None:
        """Run a kernel.

        Args:
            name: the kernel.
            text: its PTX.
            shared: bytes of dynamic shared memory.
            grid: the number of thread blocks in each dimension.
            arguments: name, Triton's type and value of each argument.
        """
        if self.change is not None:
            other = self.change(name, text)
            self.changed |= other != text
            text = other
        kernel = parse(text)
        blocks = max(1, min(grid[0] * grid[1] * grid[2], THREADS // kernel.threads))
        machine = machine_of(kernel, shared, blocks)
        machine.start()
        machine.run(grid, [self._bits(machine.state.memory, *argument) for argument in arguments])
        self.findings.merge(machine.findings, name)
        self.launches.append((name, text))

    def outcome(self, error: float) -> Outcome:
        """Return what came of the launches."""
        return Outcome(error, self.findings.kinds, self.findings.lines(), self.launches, self.changed)

    def _bits(self, memory: GlobalMemory, name: str, kind: str, value: Any) -> int:
        if not isinstance(value, torch.Tensor):
            return int.from_bytes(struct.pack("<f", value), "little") if kind == "fp32" else int(value)
        storage, unwritten = value.untyped_storage().data_ptr(), None
        if storage in self.fresh:
            first = value.data_ptr() - storage
            unwritten = self.fresh[storage][1][first : first + value.nbytes]
        return memory.register(name, value.data_ptr(), value.nbytes, unwritten)


@lru_cache(maxsize=12)
def _machine(text: str, shared: int, blocks: int) -> Machine:
    return Machine(parse(text), shared, blocks)


def machine_of(kernel: Kernel, shared: int, blocks: int) -> Machine:
    """Return a machine for a kernel, which is kept for later launches."""
    return _machine(kernel.text, shared, blocks)


class Driver:
    """What Triton asks of a driver, for one architecture.

    Attributes:
        session: the session that launches belong to.
    """

    def __init__(self, arch: str, session: Session) -> None:
        self.arch, self.session = arch, session
        self.utils, self.launcher_cls = self, Launcher

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_current_device(self) -> int:
        """Return the architecture's number: Triton keeps compiled kernels by device."""
        return int(self.arch.removeprefix("sm_"))

    def get_current_stream(self, _: int) -> int:
        """Return the only stream."""
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Return the limit of shared memory."""
        return {"max_shared_mem": SHARED_KIB[self.arch] * 1024}

    def load_binary(self, _name: str, binary: bytes, _shared: int, _device: int) -> tuple[None, str, int, int, int]:
        """Return the PTX as the function, and the limit of threads; there are no registers and spills to tell of."""
        return None, binary.decode(), 0, 0, 1024


class Launcher:
    """One compiled kernel.

    Args:
        source: Triton's source, which knows the arguments' types.
        metadata: what the compiler says of the kernel.
    """

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata

    def __call__(self, x: int, y: int, z: int, _stream: int, function: str, *rest: Any) -> None:
        """Launch it in the driver's present session; its arguments follow four that only a GPU needs."""
        given = zip(self.signature.items(), rest[4:], strict=True)
        arguments = [(name, kind, value) for (name, kind), value in given if kind != "constexpr"]
        session = triton.runtime.driver.active.session
        session.launch(self.metadata.name, function, self.metadata.shared, (x, y, z), arguments)


class Fresh(TorchDispatchMode):
    """Fills memory that nothing wrote with what is no number, and notes it in a session."""

    ALLOCATING = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_strided.default,
    )

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator of torch."""
        result = func(*args, **(kwargs or {}))
        if func in self.ALLOCATING and result.numel():
            storage = result.untyped_storage()
            result.view(torch.uint8).fill_(UNSET)
            self.session.fresh[storage.data_ptr()] = (result, np.ones(storage.nbytes(), np.uint8))
        return result


def ptx_instead(
    _self: Any = None, stages: Any = None, _options: Any = None, _language: Any = None, _capability: Any = None
) -> tuple[str, str]:
    """Have Triton stop at PTX, which becomes the binary; the result tells such kernels from others in its cache."""
    if stages is not None:
        stages["cubin"] = lambda text, _: text.encode()
    return ("ptx as the binary",) * 2


@contextlib.contextmanager
def emulate(arch: str, change: Change | None = None) -> Iterator[Session]:
    """Run every launch inside on an emulated GPU of an architecture of :data:`SHARED_KIB`."""
    session = Session(change)
    driver, hook = triton.runtime.driver._active, triton.knobs.runtime.add_stages_inspection_hook
    triton.runtime.driver.set_active(Driver(arch, session))
    triton.knobs.runtime.add_stages_inspection_hook = ptx_instead
    try:
        with Fresh(session):
            yield session
    finally:
        triton.runtime.driver._active = driver
        triton.knobs.runtime.add_stages_inspection_hook = hook
