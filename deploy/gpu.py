"""What the CUDA driver says of this machine's GPUs, asked without any package that brings CUDA."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Gpu", "Gpus", "free_gpu_bytes", "gpu_compute_capability", "read_gpus"]

_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_NAME_BYTES = 128
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""Among the driver's device attributes."""
_NO_DEVICE = 100


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that a process may use."""

    name: str
    compute_capability: str
    """As in "8.9"."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs and their driver."""

    devices: tuple[Gpu, ...] = ()
    """In CUDA's order, without those that CUDA_VISIBLE_DEVICES hides."""
    cuda_version: str | None = None
    """The newest CUDA that the driver runs, as in "12.8"; None without a driver."""
    driver_version: str | None = None
    """The driver's own, as in "570.86.15"; None where its management library is not there to tell."""
    fault: str | None = None
    """What the driver answered where it is there and does not work."""


class _CudaError(Exception):
    """The driver refused a call."""


def gpu_compute_capability() -> str | None:
    """Return the compute capability of the first visible CUDA GPU, as in "8.9"; None where there is none."""
    devices = _read_cuda().devices
    return devices[0].compute_capability if devices else None


def read_gpus() -> Gpus:
    """Ask the driver and its management library, as far as they are there; it never fails."""
    return replace(_read_cuda(), driver_version=_driver_version())


def free_gpu_bytes() -> int | None:
    """Return how many bytes of the first visible GPU's memory are free; None where it does not say."""
    if not _read_cuda().devices:
        return None
    driver = _library(_DRIVER)
    device, free, total, context = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
    try:
        _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
        # The context that onnxruntime is going to use: what it takes itself counts as taken.
        _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            _call(driver, "cuCtxPushCurrent_v2", context)
            status = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
            _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(context))
            _check(driver, "cuMemGetInfo_v2", status)
        finally:
            driver.cuDevicePrimaryCtxRelease_v2(device)
    except (_CudaError, AttributeError):
        return None
    return free.value


def _read_cuda() -> Gpus:
    driver = _library(_DRIVER)
    if driver is None:
        return Gpus()
    devices: tuple[Gpu, ...] = ()
    cuda_version = fault = None
    try:
        number = ctypes.c_int()
        _call(driver, "cuDriverGetVersion", ctypes.byref(number))  # needs no GPU
        cuda_version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        if (status := driver.cuInit(0)) != _NO_DEVICE:
            _check(driver, "cuInit", status)
            _call(driver, "cuDeviceGetCount", ctypes.byref(number))
            devices = tuple(_read_gpu(driver, ordinal) for ordinal in range(number.value))
    except (_CudaError, AttributeError) as error:  # the latter from a library without one of the functions
        fault = str(error)
    return Gpus(devices=devices, cuda_version=cuda_version, fault=fault)


def _read_gpu(driver: Any, ordinal: int) -> Gpu:
    device, number, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(driver, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(driver, "cuDeviceGetName", name, _NAME_BYTES, device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(size), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=".".join(capability),
        memory_bytes=size.value,
    )


def _driver_version() -> str | None:
    library = _library("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    if library is None:
        return None
    version = ctypes.create_string_buffer(_NAME_BYTES)
    try:
        if library.nvmlInit_v2() != 0:
            return None
        found = library.nvmlSystemGetDriverVersion(version, _NAME_BYTES) == 0
        library.nvmlShutdown()
    except AttributeError:
        return None
    return version.value.decode(errors="replace") if found else None


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _call(driver: Any, function: str, *arguments: Any) -> None:
    _check(driver, function, getattr(driver, function)(*arguments))


def _check(driver: Any, function: str, status: int) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(text))
    raise _CudaError(f"{function} answered {(text.value or b'error').decode()} ({status})")
