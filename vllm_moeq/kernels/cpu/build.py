"""Compile the C++ kernel once, or find it compiled, and load its operators."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("vllm.moeq")

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-O2", "-fopenmp", "-Wno-maybe-uninitialized")
MACHINES = ("x86_64", "AMD64")


@cache
def problem() -> str:
    """Load the kernel's operators; return why that failed, or an empty string.

    The first call may compile for about a minute. A failure is logged once, as a warning.
    """
    if platform.machine() not in MACHINES:
        return f"the native kernel is for x86, not {platform.machine()}"
    try:
        library = prebuilt(Path(__file__).parent)
        if library is None:
            library = compile_once()
        torch.ops.load_library(str(library))
        _register_shapes()
    except Exception as error:  # whatever a compiler, a linker or a file system does, the reference remains
        lines = str(error).strip().splitlines()
        reason = f"the native kernel could not be built: {lines[0] if lines else type(error).__name__}"
        logger.warning("moeq: %s; the reference kernel, which is slow, takes its place", reason)
        logger.debug("moeq: %s", error)
        return reason
    return ""


def _register_shapes() -> None:
    """Tell torch.compile the shapes of the operators' results."""
    torch.library.register_fake("vllm_moeq::native_moe", lambda x, *_: torch.empty_like(x))
    torch.library.register_fake("vllm_moeq::native_linear", lambda x, _, rows, *__: x.new_empty((x.shape[0], rows)))


def module_name() -> str:
    """Return the library's name for this torch; torch's C++ interface changes with every minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return f"_native_torch{major}_{minor}"


def prebuilt(folder: Path) -> Path | None:
    """Return the library that the wheel contains for this torch, if there is one."""
    return next(iter(sorted(folder.glob(f"{module_name()}*.so"))), None)


def sources() -> list[Path]:
    """Return the files to compile, in a fixed order."""
    return sorted(SOURCES.glob("*.cpp"))


def fingerprint() -> str:
    """Return a short hash of everything that the compiled library depends on: sources, flags and versions."""
    digest = hashlib.sha256(repr((FLAGS, torch.__version__, sys.version_info[:2])).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_once() -> Path:
    """Return the compiled library; compile it if it is not in the cache of torch's extensions.

    Raises:
        Exception: torch's extension tools, the compiler or the file system failed.
    """
    from torch.utils import cpp_extension

    name = f"moeq_native_{fingerprint()}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / name
    done = folder / "done"
    library = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _only_process(folder / "moeq.lock"):
        if not (done.exists() and library.exists()):
            logger.info("moeq: compiling the CPU kernel, once, in %s", folder)
            # Torch would wait forever for this file if a killed process left it behind; no process needs it now.
            (folder / "lock").unlink(missing_ok=True)
            with _ninja_on_path():
                cpp_extension.load(
                    name,
                    [str(path) for path in sources()],
                    extra_cflags=list(FLAGS),
                    extra_ldflags=["-fopenmp"],
                    build_directory=str(folder),
                    is_python_module=False,
                )
            done.touch()  # a killed linker also leaves a library
    return library


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Hold a lock that is released when the process ends, even if it is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find this environment's ninja, even if the environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join(part for part in (before, str(Path(sys.executable).parent)) if part)
    try:
        yield
    finally:
        os.environ["PATH"] = before
