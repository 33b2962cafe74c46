from __future__ import annotations

import ctypes
from typing import Any

import pytest

from deploy.gpu import Gpu, Gpus, free_gpu_bytes, gpu_compute_capability, read_gpus

CARDS = (
    Gpu(name="NVIDIA GeForce RTX 4090", compute_capability="8.9", memory_bytes=25_757_220_864),
    Gpu(name="NVIDIA GeForce RTX 5090", compute_capability="12.0", memory_bytes=34_190_458_880),
)


class Driver:
    """As much of the CUDA driver as is asked."""

    def __init__(self, cards: tuple[Gpu, ...] = CARDS, status: int = 0, full: int = 0) -> None:
        self.cards, self.full = cards, full
        self.status = status if cards else 100

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuGetErrorName(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.cards[device.value].name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        size._obj.value = self.cards[device.value].memory_bytes
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        capability = self.cards[device.value].compute_capability.split(".")
        value._obj.value = int(capability[{75: 0, 76: 1}[attribute]])
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        context._obj.value = 1 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts = [context.value]
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value = 20_000_000_000 if self.contexts == [1] else 0
        return self.full

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts = []
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        return 0


class Management:
    """As much of the driver's management library as is asked."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, version: Any, size: int) -> int:  # noqa: N802
        version.value = b"570.86.15"
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0


def install(monkeypatch: pytest.MonkeyPatch, **libraries: Any) -> None:
    def load(name: str) -> Any:
        for part, library in libraries.items():
            if part in name:
                return library
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_every_gpu_and_both_versions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda=Driver(), ml=Management())
    assert read_gpus() == Gpus(devices=CARDS, cuda_version="12.8", driver_version="570.86.15")
    assert gpu_compute_capability() == "8.9"


@pytest.mark.parametrize(
    ("driver", "free"), [(Driver(), 20_000_000_000), (Driver(full=2), None), (Driver(cards=()), None)]
)
def test_free_memory_is_that_of_the_first_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: Driver, free: int | None
) -> None:
    install(monkeypatch, cuda=driver)
    assert free_gpu_bytes() == free
    assert getattr(driver, "contexts", []) == []


def test_the_management_library_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda=Driver())
    assert read_gpus() == Gpus(devices=CARDS, cuda_version="12.8")


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert read_gpus() == Gpus()
    assert gpu_compute_capability() is None


def test_a_driver_without_a_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda=Driver(cards=()))
    assert read_gpus() == Gpus(cuda_version="12.8")


def test_a_driver_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda=Driver(status=803))
    found = read_gpus()
    assert found.devices == ()
    assert found.fault == "cuInit answered CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"


def test_libraries_without_the_functions_are_a_fault_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda=object(), ml=object())
    assert "cuDriverGetVersion" in (read_gpus().fault or "")
