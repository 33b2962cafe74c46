"""Students: made from a plan, saved, and opened again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.families.view import save_model
from toolchain.geometry import Semantics, Unit
from toolchain.plan import CompressionPlan
from toolchain.prune import check_plan, prune


def plan_of(model: Model, *removed: str, semantics: Semantics = "zero", **strength: float) -> CompressionPlan:
    geometry = model.geometry
    units = tuple(Unit.parse(text) for text in removed)
    gone = {unit.block for unit in units if unit.component is None}
    blocks = {str(index): 1.0 for index in range(len(geometry.blocks)) if index not in gone}
    return CompressionPlan(
        model=model.source,
        geometry=geometry,
        semantics=semantics,
        rule="manual",
        removed=units,
        strength={"embedders": 0.0, "head": 1.0, **blocks, **strength},
        asked={},
    )


def paint(model: Model) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((1, *model.latent_shape), dtype=np.float32)
    return model.paint(["a red circle"], noise)


REMOVED = {
    "whole blocks": ["1"],
    "whole blocks, the last among them": ["1", "3"],
    "components": ["0.norm1", "1.ff", "1.attn", "2.attn"],
    "components and whole blocks": ["1", "2.attn", "3"],
}


@pytest.mark.parametrize("removed", REMOVED.values(), ids=REMOVED)
@pytest.mark.parametrize("semantics", ["zero", "identity"])
def test_saving_and_opening_a_student_changes_nothing(
    removed: list[str], semantics: Semantics, any_path: Path, tmp_path: Path
) -> None:
    teacher = open_model(str(any_path))
    student = prune(teacher, plan_of(teacher, *removed, semantics=semantics))
    expected = paint(student)
    save_model(student, tmp_path)
    again = open_model(str(tmp_path))
    assert np.array_equal(paint(again), expected)
    assert again.geometry == student.geometry
    assert type(again.pipeline.transformer) is type(student.pipeline.transformer)
    assert (np.ptp(expected) > 0, again.num_parameters) == (True, student.num_parameters)


@pytest.mark.parametrize("removed", ["1", "3"], ids=["inside", "last"])
def test_plain_diffusers_loads_a_student_without_blocks_and_paints_the_same(
    removed: str, any_path: Path, tmp_path: Path
) -> None:
    teacher = open_model(str(any_path))
    save_model(prune(teacher, plan_of(teacher, removed)), tmp_path)
    student = open_model(str(tmp_path))
    kind = type(teacher.pipeline)
    absent = {} if kind is FluxPipeline else {"text_encoder_3": None, "tokenizer_3": None}
    plain = kind.from_pretrained(tmp_path, **absent)
    plain.set_progress_bar_config(disable=True)
    assert len(student.mmdit.blocks) == len(teacher.mmdit.blocks) - 1
    assert np.array_equal(paint(replace(student, pipeline=plain)), paint(student))


@pytest.mark.parametrize("semantics", ["zero", "identity"])
@pytest.mark.parametrize("removed", ["0.ff", "0.norm1"])
def test_plain_diffusers_refuses_a_student_without_components(
    removed: str, semantics: Semantics, any_path: Path, tmp_path: Path
) -> None:
    teacher = open_model(str(any_path))
    save_model(prune(teacher, plan_of(teacher, removed, semantics=semantics)), tmp_path)
    kind = type(teacher.pipeline)
    absent = {} if kind is FluxPipeline else {"text_encoder_3": None, "tokenizer_3": None}
    with pytest.raises(ValueError, match=r"Sparse.*cannot be loaded"):
        kind.from_pretrained(tmp_path, **absent)
    with pytest.raises(ToolchainError, match="lacks components that diffusers does not know"):
        teacher.mmdit.sparse.from_pretrained(tmp_path / "transformer")


def test_a_student_shares_no_memory_with_its_teacher(any_path: Path) -> None:
    teacher = open_model(str(any_path))
    student = prune(teacher, plan_of(teacher, "1", "2.attn"))
    assert not storages(teacher) & storages(student)


def storages(model: Model) -> set[int]:
    tensors = model.pipeline.transformer.state_dict().values()
    return {item.untyped_storage().data_ptr() for item in tensors}


def test_only_the_preserved_prefix_is_shared_where_that_is_asked_for(any_path: Path) -> None:
    teacher = open_model(str(any_path))
    plan = plan_of(teacher, "2", **{"0": 0.0, "1": 0.0})
    student = prune(teacher, plan, share_prefix=True)
    of_teacher = storages(teacher)
    for unit, shared in (("embedders", True), ("0", True), ("1", True), ("2", False), ("head", False)):
        found = {
            item.untyped_storage().data_ptr() in of_teacher for item in student.mmdit.parameters_of(unit)
        }
        assert found == {shared}, unit
    assert paint(student).tobytes() == paint(prune(teacher, plan)).tobytes()
    student.pipeline.transformer.to(torch.float16)
    assert teacher.pipeline.transformer.dtype == torch.float32


def test_what_learns_is_never_shared(any_path: Path) -> None:
    teacher = open_model(str(any_path))
    student = prune(teacher, plan_of(teacher, "2", embedders=1.0), share_prefix=True)
    learning = {item.untyped_storage().data_ptr() for item in student.pipeline.transformer.parameters()}
    assert not storages(teacher) & learning


def test_a_plan_of_another_model_is_refused(
    tiny_path: Path, tiny_dual_path: Path, tiny_flux_path: Path
) -> None:
    tiny, dual, flux = (open_model(str(path)) for path in (tiny_path, tiny_dual_path, tiny_flux_path))
    with pytest.raises(ToolchainError, match="family flux where the model has sd3"):
        prune(tiny, plan_of(flux, "1"))
    with pytest.raises(ToolchainError, match="blocks 4 where the model has 6"):
        check_plan(tiny, plan_of(dual, "1"))
    other = replace(tiny, pipeline=prune(tiny, plan_of(tiny, "2.ff")).pipeline)
    with pytest.raises(ToolchainError, match="components of block 2 attn, ff, ff_context"):
        check_plan(other, plan_of(tiny, "1"))
    check_plan(tiny, plan_of(tiny, "1"))


def test_a_teacher_is_left_as_it_was(any_path: Path) -> None:
    teacher = open_model(str(any_path))
    transformer = teacher.pipeline.transformer
    before = {name: item.clone() for name, item in transformer.state_dict().items()}
    config, picture = dict(transformer.config), paint(teacher)
    student = prune(teacher, plan_of(teacher, "1", "2.attn", "3"))
    for parameter in student.pipeline.transformer.parameters():
        nn.init.zeros_(parameter)
    assert dict(transformer.config) == config
    assert {name: item.shape for name, item in transformer.state_dict().items()} == {
        name: item.shape for name, item in before.items()
    }
    assert all(torch.equal(item, before[name]) for name, item in transformer.state_dict().items())
    assert np.array_equal(paint(teacher), picture)


def test_saving_a_student_leaves_it_and_its_teacher_as_they_were(any_path: Path, tmp_path: Path) -> None:
    """The text encoders and the VAE are of both."""
    teacher = open_model(str(any_path))
    student = prune(teacher, plan_of(teacher, "1"))
    save_model(student, tmp_path)
    parts = [*teacher.pipeline.components.values(), *student.pipeline.components.values()]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    assert {item.dtype for module in modules for item in module.parameters()} == {torch.float32}


def test_a_student_without_components_can_be_pruned_again(any_path: Path, tmp_path: Path) -> None:
    teacher = open_model(str(any_path))
    student = prune(teacher, plan_of(teacher, "1.ff", "2.attn"))
    save_model(student, tmp_path)
    again = prune(open_model(str(tmp_path)), plan_of(student, "1.attn"))
    at_once = prune(teacher, plan_of(teacher, "1.ff", "2.attn", "1.attn"))
    assert again.geometry == at_once.geometry
    assert np.array_equal(paint(again), paint(at_once))
