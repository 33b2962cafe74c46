"""The view of each family: the same numbers as diffusers, and what is left without some components."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.families.blocks import components_of
from toolchain.families.flux import Flux
from toolchain.families.mmdit import MMDiT, TextStates
from toolchain.families.sd3 import SD3
from toolchain.geometry import Semantics, Unit
from toolchain.trajectories import sample_states

HEIGHT, WIDTH, TEXT_TOKENS = 8, 6, 5
VIEWS = ["sd3", "sd3 with dual attention", "flux", "flux with guidance"]


@cache
def view(name: str, dtype: torch.dtype = torch.float64) -> MMDiT:
    """Random weights, in doubles, so that sums in another order still agree to many places."""
    torch.manual_seed(0)
    widths = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
    }
    if name.startswith("sd3"):
        transformer = SD3Transformer2DModel(
            **widths, sample_size=16, in_channels=4, out_channels=4, num_layers=4, caption_projection_dim=16,
            pos_embed_max_size=16, qk_norm="rms_norm" if "dual" in name else None,
            dual_attention_layers=(0, 1) if "dual" in name else (),
        )  # fmt: skip
        kind: type[MMDiT] = SD3
    else:
        transformer = FluxTransformer2DModel(
            **widths, in_channels=16, num_layers=2, num_single_layers=3, axes_dims_rope=(2, 2, 4),
            guidance_embeds="guidance" in name,
        )  # fmt: skip
        kind = Flux
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return kind(transformer.to(dtype).eval().requires_grad_(False), guidance_scale=3.5)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, TextStates]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    text = TextStates(tokens_BTJ=draw(2, TEXT_TOKENS, 12), pooled_BP=draw(2, 10))
    return draw(2, 4, HEIGHT, WIDTH), torch.tensor([1000.0, 300.0], dtype=dtype), text


def diffusers_velocity(
    own: MMDiT, latents: torch.Tensor, times: torch.Tensor, text: TextStates
) -> torch.Tensor:
    """As the pipelines call their transformers."""
    states = {"encoder_hidden_states": text.tokens_BTJ, "pooled_projections": text.pooled_BP}
    velocity: torch.Tensor
    if isinstance(own, SD3):
        velocity = own.transformer(hidden_states=latents, timestep=times, **states, return_dict=False)[0]
        return velocity
    batch, channels, height, width = latents.shape
    guidance = torch.full([1], 3.5).expand(batch) if own.transformer.config.guidance_embeds else None
    velocity = own.transformer(
        hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
        timestep=times / 1000,
        guidance=guidance,
        **states,
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", latents.dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity, 8 * height, 8 * width, 8)


def geometry_of(own: MMDiT) -> Any:
    return own.geometry(height=8 * HEIGHT, width=8 * WIDTH, text_tokens=TEXT_TOKENS)


def num_parameters(own: MMDiT) -> int:
    return sum(item.numel() for item in own.transformer.parameters())


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_view_gives_what_diffusers_gives_to_the_bit(name: str, dtype: torch.dtype) -> None:
    own = view(name, dtype)
    found = own.velocity(*inputs(dtype))
    assert torch.equal(found, diffusers_velocity(own, *inputs(dtype)))
    assert (found.dtype, bool(found.std() > 0.01)) == (dtype, True)


# What the removal of a component means, done to diffusers' own block: its output is replaced.


def _put(module: nn.Module, output: Callable[[Any, Any, Any], Any]) -> None:
    def hook(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Any:
        first = args[0] if args else kwargs.get("hidden_states")
        return output(inner, first, kwargs.get("encoder_hidden_states"))

    module.register_forward_hook(hook, with_kwargs=True)


def _zero_in_place(block: Any, removed: Collection[str]) -> None:
    for name in removed:
        if name in ("norm", "norm1", "norm1_context"):
            getattr(block, name).linear.weight.zero_()
        elif name == "mlp":
            _put(block.act_mlp, lambda _, first, __: 0 * first)
        else:
            _put(
                getattr(block, name),
                lambda _, first, second: 0 * first if second is None else (0 * first, 0 * second),
            )
    if {"attn", "mlp"} <= set(removed):
        _put(block.proj_out, lambda _, first, __: 0 * first[..., : block.norm.linear.in_features])


def _pass_in_place(block: Any, removed: Collection[str]) -> None:
    def bare(norm: Any, first: torch.Tensor, _: Any) -> Any:
        normal, one = F.layer_norm(first, first.shape[-1:], eps=1e-6), torch.ones_like(first[:, 0])
        zero = 0 * one
        outputs = {"AdaLayerNormZeroSingle": (normal, one), "AdaLayerNormContinuous": normal}
        full = (normal, one, zero, zero, one)
        dual = (*full, normal, one)
        return outputs.get(type(norm).__name__, dual if type(norm).__name__.endswith("X") else full)

    for name in {*removed, *({"attn2"} & set(components_of(block)) if "attn" in removed else ())}:
        if name in ("norm", "norm1", "norm1_context"):
            _put(getattr(block, name), bare)
        elif name == "mlp":
            _put(block.proj_out, lambda _, first, __: first[..., : block.norm.linear.in_features])
        else:
            _put(getattr(block, name), lambda _, first, second: first if second is None else (first, second))


def naive_velocity(own: MMDiT, removed: Collection[Unit], semantics: Semantics) -> torch.Tensor:
    """With all modules in their places."""
    whole = type(own)(copy.deepcopy(own.transformer), guidance_scale=own.guidance_scale)
    gone = geometry_of(own).components_removed(removed)
    latents, times, text = inputs()
    streams = whole.begin(latents, times, text)
    for index, block in enumerate(whole.blocks):
        names = gone.get(index, frozenset())
        if names == set(components_of(block)):
            continue
        (_zero_in_place if semantics == "zero" else _pass_in_place)(block, names)
        streams = whole.apply(block, streams)
    return whole.end(streams)


def check_removal(own: MMDiT, removed: Collection[Unit], semantics: Semantics) -> None:
    student = own.without(removed, semantics)
    found = student.velocity(*inputs())
    torch.testing.assert_close(found, naive_velocity(own, removed, semantics), rtol=1e-9, atol=1e-9)
    assert torch.equal(found, diffusers_velocity(student, *inputs()))
    remaining = geometry_of(own).remaining(removed, semantics)
    assert remaining.parameters == num_parameters(student)
    assert geometry_of(student).size == remaining


SUBSETS = [
    pytest.param(name, index, names, id=f"{name}: {index} without {' '.join(names)}")
    for name in ("sd3 with dual attention", "flux")
    for index, kind in enumerate(view(name).blocks)
    if (name, index) not in {("sd3 with dual attention", 1), ("flux", 1), ("flux", 3)}  # as the one before
    for count in (1, 2)
    for names in itertools.combinations(components_of(kind), count)
]


@pytest.mark.parametrize("semantics", ["zero", "identity"])
@pytest.mark.parametrize(("name", "index", "names"), SUBSETS)
def test_a_removed_component_contributes_as_its_semantics_say_and_leaves_no_parameters(
    name: str, index: int, names: tuple[str, ...], semantics: Semantics
) -> None:
    check_removal(view(name), [Unit(index, component) for component in names], semantics)


@settings(max_examples=60)
@given(data=st.data())
def test_any_removal_is_what_it_says(data: st.DataObject) -> None:
    own = view(data.draw(st.sampled_from(VIEWS)))
    units = [*geometry_of(own).units, *(Unit(index) for index in range(len(own.blocks)))]
    removed = data.draw(st.sets(st.sampled_from(units), max_size=12))
    gone = geometry_of(own).components_removed(removed)
    if all(gone.get(index) == set(components_of(block)) for index, block in enumerate(own.blocks)):
        with pytest.raises(ToolchainError, match="no block"):
            own.without(removed, "zero")
    else:
        check_removal(own, removed, data.draw(st.sampled_from(["zero", "identity"])))


@settings(max_examples=30)
@given(data=st.data())
def test_removing_in_two_goes_is_removing_at_once(data: st.DataObject) -> None:
    own = view(data.draw(st.sampled_from(VIEWS)))
    semantics = data.draw(st.sampled_from(["zero", "identity"]))
    # The first and the last block stay, so that numbers stay and blocks are left.
    units = [unit for unit in geometry_of(own).units if 0 < unit.block < len(own.blocks) - 1]
    order = data.draw(st.lists(st.sampled_from(units), unique=True, max_size=3))
    first, second = order[:1], order[1:]
    if semantics == "identity":  # which takes attn2 with attn
        second = [unit for unit in second if unit.component != "attn2"]
    twice = own.without(first, semantics).without(second, semantics)
    once = own.without([*first, *second], semantics)
    assert torch.equal(twice.velocity(*inputs()), once.velocity(*inputs()))
    assert geometry_of(twice) == geometry_of(once)


def test_a_student_can_lose_its_last_block_too() -> None:
    own = view("sd3 with dual attention")
    removed = [Unit(2, "norm1_context"), Unit(2, "ff")]
    student = own.without(removed, "zero")
    twice, once = student.without([Unit(3)], "zero"), own.without([*removed, Unit(3)], "zero")
    torch.testing.assert_close(twice.velocity(*inputs()), once.velocity(*inputs()), rtol=1e-12, atol=1e-12)
    assert num_parameters(twice) == num_parameters(once)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_without_units_shares_weights_and_leaves_the_model_as_it_was(name: str) -> None:
    own = view(name)
    before = {
        key: (id(item), item.clone()) for key, item in own.transformer.state_dict(keep_vars=True).items()
    }
    config, kind = dict(own.transformer.config), type(own.transformer)
    student = own.without([Unit(1), Unit(0, "ff"), Unit(len(own.blocks) - 1, "attn")], "zero")
    student.transformer.register_forward_hook(lambda *_: pytest.fail("called the student's"))
    after = own.transformer.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(id(item) == before[key][0] for key, item in after.items())
    assert all(torch.equal(item, before[key][1]) for key, item in after.items())
    assert (dict(own.transformer.config), type(own.transformer)) == (config, kind)
    storages = {item.untyped_storage().data_ptr() for item in own.transformer.parameters()}
    copied = [
        key
        for key, item in student.transformer.named_parameters()
        if item.untyped_storage().data_ptr() not in storages
    ]
    assert all(".norm" in key or "proj_out.weight" in key for key in copied)  # rows and columns were cut out


@pytest.mark.parametrize("name", VIEWS)
def test_every_parameter_belongs_to_the_embedders_the_head_or_one_component(name: str) -> None:
    own = view(name)
    for student in (own, own.without([Unit(0, "norm1"), Unit(2, "attn"), Unit(3, "attn")], "zero")):
        blocks = range(len(student.blocks))
        names = [
            f"{index}.{component}"
            for index in blocks
            for component in components_of(own.blocks[index])
            if "norm" in component or component in components_of(student.blocks[index])
        ]
        parameters = [
            id(item) for unit in ("embedders", "head", *names) for item in student.parameters_of(unit)
        ]
        assert sorted(parameters) == sorted(map(id, student.transformer.parameters()))
        for index in blocks:
            assert {id(item) for item in student.parameters_of(str(index))} == {
                id(item) for item in student.blocks[index].parameters()
            }


def test_a_single_block_without_mlp_keeps_its_projection_for_the_attention() -> None:
    student = view("flux").without([Unit(2, "mlp")], "zero")
    projection = student.blocks[2].proj_out
    assert student.parameters_of("2.mlp") == []
    assert any(item is projection.weight for item in student.parameters_of("2.attn"))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (Unit(9), "there is no block 9"),
        (Unit(3, "ff_context"), "no component 'ff_context'; it has attn, ff, norm1, norm1_context"),
        (Unit(0, "mlp"), "no component 'mlp'"),
    ],
)
def test_what_is_not_there_cannot_be_removed(removed: Unit, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        view("sd3").without([removed], "zero")


def test_what_is_left_cannot_be_of_two_semantics() -> None:
    student = view("flux").without([Unit(0, "ff")], "zero")
    with pytest.raises(ToolchainError, match="were removed with the semantics 'zero'"):
        student.without([Unit(1, "ff")], "identity")


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("removed", [[], [Unit(0, "attn"), Unit(2, "ff"), Unit(1, "norm1")], [Unit(3)]])
def test_flops_are_those_that_are_computed(name: str, removed: list[Unit]) -> None:
    own = view(name)
    removed = [unit for unit in removed if unit.component in (None, *components_of(own.blocks[unit.block]))]
    student = own.without(removed, "zero")
    latents, times, text = inputs()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        student.velocity(latents[:1], times[:1], text.index(slice(1)))
    assert counter.get_total_flops() == geometry_of(student).size.flops
    assert geometry_of(student).size == geometry_of(own).remaining(removed, "zero")


# Real geometries, without weights.


@cache
def real(name: str) -> Any:
    with torch.device("meta"):
        if name == "sd3.5-large":
            transformer = SD3Transformer2DModel(
                num_layers=38, num_attention_heads=38, attention_head_dim=64, caption_projection_dim=2432,
                joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=192,
                qk_norm="rms_norm",
            )  # fmt: skip
        elif name == "sd3.5-medium":
            transformer = SD3Transformer2DModel(
                num_layers=24, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
                joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384,
                qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
            )  # fmt: skip
        else:
            transformer = FluxTransformer2DModel(guidance_embeds=name == "flux-dev")
    own = (SD3 if name.startswith("sd3") else Flux)(transformer, guidance_scale=1.0)
    return own.geometry(height=1024, width=1024, text_tokens=333 if name.startswith("sd3") else 512)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("sd3.5-large", 8.0566), ("sd3.5-medium", 2.2432), ("flux-schnell", 11.8912), ("flux-dev", 11.9014)],
)
def test_real_transformers_have_the_parameters_they_are_known_for(name: str, billions: float) -> None:
    assert round(real(name).size.parameters / 1e9, 4) == billions


def test_without_eight_blocks_the_large_one_has_79_percent() -> None:
    geometry = real("sd3.5-large")
    left = geometry.remaining([Unit(index) for index in (25, 26, 27, 28, 31, 32, 33, 34)], "zero")
    assert round(left.parameters / 1e9, 3) == 6.353
    assert round(left.parameters / geometry.size.parameters, 4) == 0.7885
    assert round(left.flops / geometry.size.flops, 3) == 0.789


def test_the_official_hybrid_of_30_percent_is_counted_as_its_code_counts() -> None:
    components = {
        13: ("ff", "ff_context"),
        14: ("ff", "ff_context", "norm1_context"),
        15: ("ff", "ff_context", "norm1_context"),
        16: ("ff", "ff_context", "norm1_context"),
        17: ("ff", "ff_context"),
        18: ("ff", "ff_context"),
    }
    removed = [Unit(index) for index in (25, 26, 27, 28, 31, 32, 33, 34)]
    removed += [Unit(index, name) for index, names in components.items() for name in names]
    geometry = real("sd3.5-large")
    left = geometry.remaining(removed, "identity")
    assert round(left.parameters / 1e9, 3) == 5.678
    assert round(left.parameters / geometry.size.parameters, 4) == 0.7048
    assert round(left.flops / geometry.size.flops, 3) == 0.708
    # The shifts, scales and gates of what is gone would not be needed either.
    assert geometry.remaining(removed, "zero").parameters < left.parameters


def cost(name: str, unit: str, semantics: Semantics = "identity") -> float:
    """Millions of parameters that go with a unit."""
    geometry = real(name)
    left = geometry.remaining([Unit.parse(unit)], semantics)
    return round((geometry.size.parameters - left.parameters) / 1e6, 2)


def test_components_of_real_blocks_cost_what_is_known() -> None:
    large = {name: cost("sd3.5-large", f"7.{name}") for name in real("sd3.5-large").blocks[7].components}
    assert large == {"attn": 47.34, "ff": 47.33, "ff_context": 47.33, "norm1": 35.5, "norm1_context": 35.5}
    assert (cost("sd3.5-large", "7"), round(real("sd3.5-large").blocks[37].parameters / 1e6, 2)) == (
        213.0,
        136.09,
    )
    assert round(cost("sd3.5-medium", "20"), 2) == 84.98
    assert round(cost("sd3.5-medium", "5") - cost("sd3.5-medium", "20"), 1) == 16.5
    assert cost("sd3.5-medium", "5.attn2") == 9.44
    double = {name: cost("flux-schnell", f"7.{name}") for name in real("flux-schnell").blocks[7].components}
    assert double == {"attn": 75.52, "ff": 75.51, "ff_context": 75.51, "norm1": 56.64, "norm1_context": 56.64}
    single = {item.name: item.parameters / 1e6 for item in real("flux-schnell").blocks[40].parts}
    norm = sum(value for name, value in single.items() if name.startswith("norm"))
    out = sum(value for name, value in single.items() if name.startswith("proj_out"))
    assert [round(value, 1) for value in (norm, single["attn"], single["proj_mlp"], out)] == [
        28.3, 28.3, 37.8, 47.2,
    ]  # fmt: skip
    assert (cost("flux-schnell", "7"), cost("flux-schnell", "40")) == (339.83, 141.59)


def test_a_forward_pass_of_the_large_one_takes_31_teraflops() -> None:
    geometry = real("sd3.5-large")
    assert round(geometry.size.flops / 1e12) == 31
    assert round(geometry.blocks[7].flops / 1e9) == 820
    assert round(real("flux-schnell").size.flops / 1e12) == 74  # with 512 text tokens


# As part of a pipeline.


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_ends_where_the_pipeline_ends(scale: float, any_path: Path) -> None:
    model = open_model(str(any_path))
    model = replace(model, defaults=replace(model.defaults, guidance_scale=scale, num_inference_steps=3))
    states = sample_states(model, ["a bad cab"], seed=3)
    assert model.guided == (scale > 1 and model.mmdit.family == "sd3")
    last = states.timesteps == states.timesteps.min()
    velocities = {
        int(index): said
        for index, said in zip(states.prompt_index[last], states.velocities[last], strict=True)
    }
    asked, free = velocities[0], velocities.get(1, velocities[0])
    sigma = states.timesteps.min() / 1000  # the step after the last one goes to 0
    ended = states.latents[last][0] - sigma * (free + scale * (asked - free))
    torch.testing.assert_close(
        model.mmdit.pipeline_latents(ended[None])[0], painted(model), rtol=1e-4, atol=1e-4
    )


def painted(model: Model) -> torch.Tensor:
    noise = np.random.default_rng(3).standard_normal((1, *model.latent_shape), dtype=np.float32)
    latents: torch.Tensor = model.pipeline(
        ["a bad cab"],
        num_inference_steps=3,
        guidance_scale=model.defaults.guidance_scale,
        max_sequence_length=model.defaults.max_sequence_length,
        height=64,
        width=64,
        latents=model.mmdit.pipeline_latents(torch.from_numpy(noise)),
        output_type="latent",
    ).images[0]
    return latents


def test_prompts_have_the_number_of_tokens_that_is_counted_with(any_path: Path) -> None:
    model = open_model(str(any_path))
    text = model.mmdit.encode_prompts(model.pipeline, ["a", "b c"], model.defaults.max_sequence_length)
    assert text.tokens_BTJ.shape[:2] == (2, model.geometry.text_tokens)
    assert text.index(slice(1)).pooled_BP.shape[0] == 1
