"""Others' ways to 4 bits on a processor beside ours, on the same states of `shapes`: docs/peers.md.

    python -m benchmarks.peers measure     # into benchmarks/results/peers.json
    python -m benchmarks.peers table       # writes docs/peers.md

What others need is installed into `--scratch`: optimum-onnx wants other versions of the libraries, and
diffusers loads torchao and bitsandbytes wherever it finds them. Every way runs in a process of its own, all
of them in turns. A way that fails says how.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.numpy import load_file, save_file

from benchmarks.machine import machine
from benchmarks.watch import memory
from toolchain.artifacts import read_json, write_json

app = typer.Typer(add_completion=False, help=__doc__)

RESULTS = Path(__file__).parent / "results" / "peers.json"
PAGE = Path(__file__).parents[1] / "docs" / "peers.md"
ROUNDS, STEPS, PROMPTS = 2, 10, 4
LIBRARIES = ("torchao==0.18.0", "bitsandbytes==0.50.2")
OPTIMUM = ("torch==2.9.1", "optimum-onnx[onnxruntime]==0.1.0", "diffusers<0.36", "transformers<4.58")

Inputs = dict[str, np.ndarray[Any, Any]]
Take = Callable[[Inputs], np.ndarray[Any, Any]]


@app.command()
def measure(
    scratch: Annotated[Path, typer.Option(help="For graphs, bundles and environments.")] = Path(
        "build/peers"
    ),
) -> None:
    """Make what is missing, and let all ways take turns."""
    scratch.mkdir(parents=True, exist_ok=True)
    made = {name: _made(scratch, name, make) for name, make in MAKE.items()}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, (needs, _) in WAYS.items():
            reason = made.get(needs or "", "")
            found[way].append({"failed": reason} if reason else _apart("one", way, "--scratch", str(scratch)))
            print(way, found[way][-1], flush=True)
    rows = {way: _median(items) for way, items in found.items()}
    write_json(
        RESULTS, {"schema_version": 1, "machine": machine() | {"openvino": version("openvino")}, "rows": rows}
    )


@app.command()
def one(
    way: Annotated[str, typer.Argument(help="One of WAYS.")],
    scratch: Annotated[Path, typer.Option(help="As of `measure`.")],
) -> None:
    """Open the transformer in one way, judge it and time it; prints that as JSON."""
    states = load_file(scratch / "states.safetensors")
    scale = float(states.pop("guidance_scale"))
    truth = states.pop("velocities")
    before = memory()["VmRSS"]
    try:
        if WAYS[way][0] == "libraries":
            sys.path.append(str(scratch / "libraries"))
        take, weights = WAYS[way][1](scratch)
        said = np.concatenate([take(_rows(states, start)) for start in range(0, len(truth), 2)])
        seconds = []
        for start in range(0, 2 * STEPS, 2):
            started = time.perf_counter()
            take(_rows(states, start))
            seconds.append(time.perf_counter() - started)
    except Exception as error:  # whatever others raise is what they say
        print(json.dumps({"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}))
        return
    followed, wanted = (item[0::2] + scale * (item[1::2] - item[0::2]) for item in (said, truth))
    axes = (1, 2, 3)
    errors = np.square(followed - wanted).sum(axes) / np.square(wanted).sum(axes)
    result = {
        "weight_bytes": weights,
        "velocity_error": float(errors.mean()),
        "seconds_per_step": statistics.median(seconds),
        "resident_bytes": memory()["VmRSS"] - before,
    }
    print(json.dumps(result))


@app.command()
def table() -> None:
    """Write docs/peers.md."""
    PAGE.write_text(page(read_json(RESULTS)), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The text of docs/peers.md."""
    on = results["machine"]
    lines = [
        "# Beside others, in 4 bits on a processor",
        "",
        "Made by `python -m benchmarks.peers table` of what `python -m benchmarks.peers measure` measured on",
        f"{on['processor']}, {on['cores']} cores: the transformer of `shapes`, not pruned, on the states of",
        f"its own sampling of {PROMPTS} held-out prompts. Velocity error is that of what the sampler",
        f"follows, against float32. A step is one guided step of one picture. Medians of {ROUNDS} rounds,",
        "each way in a process of its own; memory is what it holds beyond its imports.",
        f"torch {on['torch']}, diffusers {on['diffusers']}, onnxruntime {on['onnxruntime']}, OpenVINO",
        f"{on['openvino']}, {', '.join(LIBRARIES)}; optimum-onnx with",
        f"{', '.join(OPTIMUM)}.",
        "",
        "| | weights, MB | velocity error x 1000 | ms a step | memory, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, row in results["rows"].items():
        if "failed" in row:
            lines.append(f"| {way} | does not run: {row['failed']} | | | |")
            continue
        cells = (
            f"{row['weight_bytes'] / 1e6:.2f}",
            f"{1000 * row['velocity_error']:.2f}",
            f"{1000 * row['seconds_per_step']:.1f}",
            f"{row['resident_bytes'] / 1e6:.0f}",
        )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _median(items: list[dict[str, Any]]) -> dict[str, Any]:
    if failed := [item for item in items if "failed" in item]:
        return failed[0]
    return {key: statistics.median(item[key] for item in items) for key in items[0]}


def _rows(states: Inputs, start: int) -> Inputs:
    start %= len(states["timestep"])
    return {name: array[start : start + 2] for name, array in states.items()}


# What the ways need, made once.


def _made(scratch: Path, name: str, make: Callable[[Path, Path], None]) -> str:
    """Make a thing that is missing, beside its place; how that failed, or nothing."""
    if not (scratch / name).exists():
        beside = scratch / f"{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            make(scratch, beside)
            beside.rename(scratch / name)
        except (subprocess.CalledProcessError, OSError) as error:
            said = getattr(error, "stderr", None) or str(error)
            lines = [line for line in said.splitlines() if re.match(r"\w*(?:Error|Exception)|ERROR", line)]
            return (lines or said.strip().splitlines())[-1][:200]
    return ""


def _make_states(_: Path, path: Path) -> None:
    from toolchain.families import open_model
    from toolchain.shapes.world import captions
    from toolchain.trajectories import sample_states

    model = open_model("shapes")
    prompts = [item.text for item in islice(captions(held_out=True, seed=0), PROMPTS)]
    found = sample_states(model, prompts, seed=0)
    text = found.text.index(found.prompt_index)
    tensors = {
        "hidden_states": found.latents,
        "timestep": found.timesteps,
        "encoder_hidden_states": text.tokens_BTJ,
        "pooled_projections": text.pooled_BP,
        "velocities": found.velocities,
    }
    arrays = {name: np.ascontiguousarray(item.float().numpy()) for name, item in tensors.items()}
    save_file(arrays | {"guidance_scale": np.array(model.defaults.guidance_scale)}, path)


def _make_bundle(_: Path, path: Path) -> None:
    _run([sys.executable, "-m", "toolchain", "export", "shapes", "-o", str(path)])


def _make_calibrated(scratch: Path, path: Path) -> None:
    known = str(scratch / "calibration")
    _run([sys.executable, "-m", "toolchain", "calibrate", "shapes", "-o", known])
    _run([sys.executable, "-m", "toolchain", "export", "shapes", "--calibration", known, "-o", str(path)])


def _make_ordinary(_: Path, path: Path) -> None:
    from toolchain.families.view import built_in_path

    _run([sys.executable, "-m", "benchmarks.ordinary", str(built_in_path()), str(path)])


def _make_libraries(_: Path, path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    _run([*command, str(path), *LIBRARIES])


def _make_optimum(scratch: Path, path: Path) -> None:
    from toolchain.families.view import built_in_path

    home = scratch / "optimum-environment"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        _run([str(python), "-m", "pip", "install", "--quiet", *OPTIMUM])
    model = scratch / "shapes-with-t5"
    shutil.copytree(built_in_path(), model, dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):  # in the two files that its transformers asks for
        known = read_json(model / name / "tokenizer.json")["model"]
        write_json(model / name / "vocab.json", known["vocab"])
        merges = (item if isinstance(item, str) else " ".join(item) for item in known["merges"])
        (model / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    _run([str(python), "-c", _WITH_T5, str(model)])
    command = [str(python), "-m", "optimum.exporters.onnx", "--model", str(model)]
    _run([*command, "--task", "text-to-image", "--library", "diffusers", str(path)])


_WITH_T5 = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, models
from transformers import T5Config, T5EncoderModel, T5TokenizerFast
home = Path(sys.argv[1])
width = json.loads((home / "transformer/config.json").read_text())["joint_attention_dim"]
pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
tokenizer = Tokenizer(models.Unigram(pieces, 2))
T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(home / "tokenizer_3")
config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
T5EncoderModel(config).save_pretrained(home / "text_encoder_3")
index = json.loads((home / "model_index.json").read_text())
for name, kind in (("text_encoder_3", "T5EncoderModel"), ("tokenizer_3", "T5TokenizerFast")):
    index[name] = ["transformers", kind]
(home / "model_index.json").write_text(json.dumps(index))
"""
"""diffusers 0.35 opens no Stable Diffusion 3 without a T5; what this one says is never used."""


# The ways: each opens the transformer and says what its weights take.


def _torch(scratch: Path, dtype: str, rounded: Callable[[Any], Any] | None = None) -> tuple[Take, int]:
    import torch

    from toolchain.families import open_model

    kind = getattr(torch, dtype)
    transformer = open_model("shapes").pipeline.transformer.to(kind)
    if rounded is not None:
        rounded(transformer)

    def take(inputs: Inputs) -> np.ndarray[Any, Any]:
        tensors = {name: torch.from_numpy(array).to(kind) for name, array in inputs.items()}
        with torch.inference_mode():
            array: np.ndarray[Any, Any] = transformer(**tensors, return_dict=False)[0].float().numpy()
        return array

    return take, _weight_bytes(transformer)


def _weight_bytes(module: Any) -> int:
    """Of parameters, whatever they consist of."""
    total = 0
    for item in module.parameters():
        inner = [getattr(item, name) for name in getattr(item, "__tensor_flatten__", lambda: ((), None))()[0]]
        state = getattr(item, "quant_state", None)
        inner += [] if state is None else [item.data, state.absmax]
        total += sum(each.nbytes for each in inner) or item.nbytes
    return total


def _in_blocks(module: Any, name: str) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.")


def _torchao(config: str, **options: Any) -> Callable[[Any], Any]:
    def rounded(transformer: Any) -> None:
        import torch

        torchao = import_module("torchao.quantization")
        if config == "IntxWeightOnlyConfig":
            options.update(weight_dtype=vars(torch)["int4"], granularity=torchao.PerGroup(64))
        torchao.quantize_(transformer, getattr(torchao, config)(**options), filter_fn=_in_blocks)

    return rounded


def _bitsandbytes(transformer: Any) -> None:
    import torch

    bitsandbytes = import_module("bitsandbytes")
    for name, module in list(transformer.named_modules()):
        if not _in_blocks(module, name):
            continue
        weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", blocksize=64
        )
        own = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        own.weight, own.bias = weight, module.bias
        transformer.set_submodule(name, own.to("cpu"))


def _onnx(graph: Path) -> tuple[Take, int]:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    types = {node.name: _NUMPY[node.type] for node in session.get_inputs()}
    weights = sum(path.stat().st_size for path in graph.parent.iterdir() if path.name.startswith(graph.name))

    def take(inputs: Inputs) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = session.run(
            None, {key: inputs[key].astype(types[key]) for key in types}
        )[0]
        return array

    return take, weights


_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def _ours(path: Path, runtime: str) -> tuple[Take, int]:
    from deploy.bundle import open_bundle
    from deploy.kept import cache_directory
    from deploy.session import open_variant

    bundle = open_bundle(path, verify=False)
    variant = next(item for item in bundle.manifest.variants if item.runtime == runtime)
    run = open_variant(bundle, variant, cache=cache_directory()).run
    files = ("transformer/model.onnx", "transformer/weights.data")
    weights = sum(bundle.manifest.files[name].bytes for name in files)
    return lambda inputs: run(inputs)["velocity"], weights


MAKE: dict[str, Callable[[Path, Path], None]] = {
    "states.safetensors": _make_states,
    "bundle": _make_bundle,
    "calibrated": _make_calibrated,
    "ordinary": _make_ordinary,
    "libraries": _make_libraries,
    "optimum": _make_optimum,
}
WAYS: dict[str, tuple[str | None, Callable[[Path], tuple[Take, int]]]] = {
    "diffusers, float32": (None, lambda at: _torch(at, "float32")),
    "diffusers, bfloat16": (None, lambda at: _torch(at, "bfloat16")),
    "diffusers with torchao, Int4WeightOnlyConfig": (
        "libraries",
        lambda at: _torch(at, "bfloat16", _torchao("Int4WeightOnlyConfig", group_size=64)),
    ),
    "diffusers with torchao, IntxWeightOnlyConfig of int4": (
        "libraries",
        lambda at: _torch(at, "bfloat16", _torchao("IntxWeightOnlyConfig")),
    ),
    "diffusers with bitsandbytes, NF4": ("libraries", lambda at: _torch(at, "bfloat16", _bitsandbytes)),
    "optimum-onnx, float32, onnxruntime": (
        "optimum",
        lambda at: _onnx(at / "optimum/transformer/model.onnx"),
    ),
    "`torch.onnx.export` and NNCF, INT4, onnxruntime": (
        "ordinary",
        lambda at: _onnx(at / "ordinary/model.onnx"),
    ),
    "hptool, INT4, onnxruntime": ("bundle", lambda at: _ours(at / "bundle", "onnxruntime-cpu")),
    "hptool, INT4, OpenVINO": ("bundle", lambda at: _ours(at / "bundle", "openvino")),
    "hptool, INT4 with --calibration, onnxruntime": (
        "calibrated",
        lambda at: _ours(at / "calibrated", "onnxruntime-cpu"),
    ),
}
"""What each way needs from MAKE, and how it opens the transformer."""


def _apart(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        _run([sys.executable, "-m", "benchmarks.peers", *words]).splitlines()[-1]
    )
    return found


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    app()
