"""Kept traces: what is alike is traced once, and whatever may change a graph makes another of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.export import Dim

from export import lower, traces
from export.errors import ExportError
from export.lower import trace, without_weights
from export.traces import structure


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been traced so far."""
    names, original = [], lower._trace

    def counted(wrapper: nn.Module, *args: Any, **options: Any) -> ir.Model:
        names.append(type(wrapper).__name__)
        return original(wrapper, *args, **options)

    monkeypatch.setattr(lower, "_trace", counted)
    return names


def graph_of(module: nn.Module) -> ir.Model:
    empty, fake = without_weights(module, torch.float32)
    with fake:
        inputs = {"x": torch.empty(2, 3, 4)}
    return trace(empty, fake, inputs, ["y"], ({0: Dim("batch")},))


def test_modules_that_differ_in_weights_alone_are_traced_once(traced: list[str]) -> None:
    first, second = graph_of(nn.Linear(4, 5)), graph_of(nn.Linear(4, 5))
    assert traced == ["Linear"]
    assert ir.to_proto(first.clone()).graph.node == ir.to_proto(second.clone()).graph.node


@pytest.mark.parametrize("reason", [NotImplementedError("no flock here"), TimeoutError("held by another")])
def test_a_trace_that_cannot_be_locked_is_made_and_kept_and_that_is_said(
    reason: Exception,
    traced: list[str],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise reason

    monkeypatch.setattr(traces.FileLock, "acquire", acquire)
    first, second = graph_of(nn.Linear(4, 5)), graph_of(nn.Linear(4, 5))
    assert traced == ["Linear"]
    assert ir.to_proto(first.clone()).graph.node == ir.to_proto(second.clone()).graph.node
    assert [path.suffix for path in directory.iterdir()] == [".onnx"]
    assert f"by two processes at once: {reason}" in caplog.text


def test_what_was_kept_lacks_values_and_remembers_how_weights_lie(traced: list[str]) -> None:
    graph_of(nn.Linear(4, 5))
    initializers = graph_of(nn.Linear(4, 5)).graph.initializers
    found = {
        name: (list(value.shape or ()), value.const_value, value.meta["transposed"])
        for name, value in initializers.items()
        if value.const_value is None
    }
    assert found == {"weight": ([4, 5], None, True), "bias": ([5], None, False)}
    assert traced == ["Linear"]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100])
def test_a_damaged_file_is_made_anew(
    traced: list[str], directory: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    graph_of(nn.Linear(4, 5))
    (file,) = directory.iterdir()
    file.write_bytes(damage)
    graph_of(nn.Linear(4, 5))
    graph_of(nn.Linear(4, 5))
    assert traced == ["Linear", "Linear"]
    assert [record.message for record in caplog.records if "damaged" in record.message] != []


def test_where_nothing_can_be_kept_it_is_said_and_traced(
    traced: list[str], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.parent.mkdir()
    directory.write_text("a file in the way")
    graph_of(nn.Linear(4, 5))
    assert traced == ["Linear"]
    assert "cannot be kept" in caplog.text


def test_a_module_that_cannot_be_described_is_traced_each_time(
    traced: list[str], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = nn.Linear(4, 5)
    module.table = SimpleNamespace(values=torch.zeros(1).numpy())  # type: ignore[assignment]
    graph_of(module)
    graph_of(module)
    assert traced == ["Linear", "Linear"]
    assert not directory.exists()
    assert "cannot be kept: it holds a ndarray" in caplog.text


class Forgetful(nn.Module):
    """Makes a constant while it runs, and keeps it nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_constant_made_while_running_is_refused_and_not_kept(directory: Path) -> None:
    with pytest.raises(ExportError, match=r"makes the constant 'lifted_tensor_0' while it runs"):
        graph_of(Forgetful())
    assert not list(directory.iterdir())


def scaled(factor: float) -> nn.Module:
    module = nn.Linear(4, 5, device="meta")
    module.factor = factor  # type: ignore[assignment]
    return module


def closed_over(factor: float) -> nn.Module:
    module = nn.Linear(4, 5, device="meta")
    module.after = lambda x: factor * x  # type: ignore[assignment]
    return module


def configured(**values: Any) -> nn.Module:
    module = nn.Linear(4, 5, device="meta")
    module.config = SimpleNamespace(**values)  # type: ignore[assignment]
    return module


def tied(*, really: bool) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    if really:
        module[1].weight = module[0].weight
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(nn.Linear(4, 5, device="meta"), nn.Linear(4, 6, device="meta"), id="shape"),
        pytest.param(
            nn.Linear(4, 5, device="meta"), nn.Linear(4, 5, device="meta", dtype=torch.float16), id="dtype"
        ),
        pytest.param(nn.ReLU(), nn.GELU(), id="class"),
        pytest.param(scaled(1.0), scaled(2.0), id="attribute"),
        pytest.param(closed_over(1.0), closed_over(2.0), id="closure"),
        pytest.param(configured(heads=1), configured(heads=2), id="configuration"),
        pytest.param(tied(really=False), tied(really=True), id="ties"),
        pytest.param(nn.ReLU().eval(), nn.ReLU().train(), id="training"),
        pytest.param(Dim("batch"), Dim("batch", max=63), id="limit"),
        pytest.param(Dim("height"), 2 * Dim("height"), id="multiple"),
    ],
)
def test_whatever_may_change_a_graph_makes_another_structure(one: object, other: object) -> None:
    assert structure(one) != structure(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(scaled(1.0), scaled(1.0), id="again"),
        pytest.param(configured(_name_or_path="a"), configured(_name_or_path="b"), id="place"),
        pytest.param({"a", "b", "c"}, {"c", "b", "a"}, id="order-of-a-set"),
    ],
)
def test_what_makes_no_difference_makes_the_same_structure(one: object, other: object) -> None:
    assert structure(one) == structure(other)


def test_a_constant_of_its_own_cannot_be_described() -> None:
    with pytest.raises(TypeError, match="Tensor with values"):
        structure({"table": torch.ones(2)})
