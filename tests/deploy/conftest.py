"""A bundle of hand-made graphs: every part of the pipeline, small enough to compute by hand."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import uvicorn
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from deploy.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Architecture,
    Defaults,
    File,
    Graph,
    Manifest,
    Provenance,
    Scheduler,
    Shapes,
    Tokenizer,
    Variant,
    manifest_to_json,
)
from deploy.images_api import Limits
from deploy.pipeline import EdgePipeline
from deploy.queue import Event, Job, Request, Worker
from deploy.server import ServerOfWorker
from deploy.web import build_app
from toolchain.shapes.model import build_tokenizer

MakeBundle = Callable[..., Path]

NUM_TOKENS = 16
NUM_T5_TOKENS = 7
WIDTHS = {"text_encoder": 3, "text_encoder_2": 5}
CHANNELS = 4

CPU = Variant(
    target="cpu-x86",
    runtime="onnxruntime-cpu",
    path="transformer/model.onnx",
    activations="float32",
    compute_capabilities=[],
    shapes=None,
)
ENGINE = Variant(
    target="rtx4090",
    runtime="tensorrt-rtx",
    path="engines/sm89-01234567.engine",
    activations="float16",
    compute_capabilities=["8.9"],
    shapes=Shapes(sizes=[(64, 64), (64, 32)], max_batch=2, text_tokens=NUM_TOKENS + NUM_T5_TOKENS),
)


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """What the bundle's `tokenizer.json` is saved from."""
    return build_tokenizer(NUM_TOKENS)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """The files that all bundles of the tests share."""
    root = tmp_path_factory.mktemp("parts")
    for name in ("tokenizer", "tokenizer_2"):
        _save_tokenizer(root, name, tokenizer)
    for name, width in WIDTHS.items():
        _save(root, name, _text_encoder(len(tokenizer), width))
    _save(root, "transformer", _transformer())
    _save(root, "vae_decoder", _vae_decoder())
    engine = root / ENGINE.path
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"no engine")
    return root


@pytest.fixture
def make_bundle(parts: Path, tmp_path: Path) -> MakeBundle:
    """Write a bundle; `edit` changes files before they are listed, options replace fields of the manifest."""

    def make(edit: Callable[[Path], None] | None = None, **changes: Any) -> Path:
        path = tmp_path / "bundle"
        shutil.copytree(parts, path)
        if edit is not None:
            edit(path)
        files = {
            file.relative_to(path).as_posix(): File(
                sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size
            )
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        manifest = replace(_manifest(files), **changes)
        (path / MANIFEST).write_text(json.dumps(manifest_to_json(manifest)))
        return path

    return make


@pytest.fixture(scope="session")
def t5_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as T5's: pieces of words, an end token and no start."""
    words = ["\u2581a", "\u2581red", "\u2581star", "\u2581circle", "s", "\u2581"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words)]
    backend = BackendTokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def make_sd3_with_t5(make_bundle: MakeBundle, t5_tokenizer: PreTrainedTokenizerFast) -> MakeBundle:
    """Write a bundle as `make_bundle` does, with the third text encoder."""

    def make(**changes: Any) -> Path:
        def edit(path: Path) -> None:
            _save(path, "text_encoder_3", _text_encoder(len(t5_tokenizer), 10))
            _save_tokenizer(path, "tokenizer_3", t5_tokenizer)

        usual = _manifest({})
        t5 = Tokenizer(path="tokenizer_3/tokenizer.json", max_length=NUM_T5_TOKENS, pad_id=0)
        graph = Graph(path="text_encoder_3/model.onnx", activations="float32", weights="float32")
        changes = {
            "tokenizers": {**usual.tokenizers, "tokenizer_3": t5},
            "graphs": {**usual.graphs, "text_encoder_3": [graph]},
        } | changes
        return make_bundle(edit, **changes)

    return make


@pytest.fixture
def make_flux(make_bundle: MakeBundle, t5_tokenizer: PreTrainedTokenizerFast) -> MakeBundle:
    """Write a bundle of FLUX.1: T5 is the second text encoder, and the guidance scale may be an input."""

    def make(*, guidance_embeds: bool = True, **changes: Any) -> Path:
        def edit(path: Path) -> None:
            _save(path, "text_encoder_2", _text_encoder(len(t5_tokenizer), 10))
            _save_tokenizer(path, "tokenizer_2", t5_tokenizer)
            _save(path, "transformer", _transformer(WIDTHS["text_encoder"], guidance=guidance_embeds))

        usual = _manifest({})
        t5 = Tokenizer(path="tokenizer_2/tokenizer.json", max_length=NUM_T5_TOKENS, pad_id=0)
        changes = {
            "architecture": replace(
                usual.architecture, family="flux", classifier_free=False, guidance_embeds=guidance_embeds
            ),
            "scheduler": replace(usual.scheduler, spacing="unit", use_dynamic_shifting=guidance_embeds),
            "variants": [CPU],
            "tokenizers": {**usual.tokenizers, "tokenizer_2": t5},
        } | changes
        return make_bundle(edit, **changes)

    return make


class Server:
    """A server on a free port over a small bundle, whose steps can be held."""

    def __init__(self, bundle: Path, *, held: bool, limits: Limits, token: str | None, local: bool) -> None:
        self._began, self._allowed = threading.Semaphore(0), threading.Semaphore(0)
        self._held = held
        self._token = token
        self.opening = threading.Event()
        self.opening.set()
        self.worker = Worker(lambda: self._open(bundle), size=limits.queue)
        app = build_app(self.worker, name="small", created=123, limits=limits, token=token, local=local)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._server = ServerOfWorker(
            uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=10),
            self.worker,
            limits.grace_seconds,
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def start(self, *, ready: bool) -> None:
        if not ready:
            self.opening.clear()
        self.worker.start()
        self._thread.start()
        if ready:
            self.worker.opened.result(timeout=30)

    def _open(self, bundle: Path) -> EdgePipeline:
        assert self.opening.wait(30)
        pipeline = EdgePipeline.open(bundle, target="cpu-x86", threads=1)
        velocity = pipeline._velocity

        def held(*arguments: Any, **options: Any) -> np.ndarray:
            self._began.release()
            assert self._allowed.acquire(timeout=30)
            return velocity(*arguments, **options)

        if self._held:
            pipeline._velocity = held  # type: ignore[method-assign]
        return pipeline

    def allow(self, steps: int) -> None:
        """Let so many steps be taken."""
        for _ in range(steps):
            self._allowed.release()

    def wait_for_step(self) -> None:
        """Wait until a step begins."""
        assert self._began.acquire(timeout=30)

    @contextmanager
    def painting(self) -> Iterator[None]:
        """Have somebody's picture in the works, which is finished at the end."""
        ended = threading.Event()

        def hear(event: Event) -> None:
            if type(event).__name__ == "Ended":
                ended.set()

        self.worker.submit(Job(Request(prompt="somebody's", steps=1), hear))
        self.wait_for_step()
        yield
        self.allow(1)
        assert ended.wait(30)

    def outcomes(self) -> dict[str, int]:
        """How many requests ended how."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        lines = httpx.get(f"{self.address}/metrics", headers=headers).text.splitlines()
        start = 'hptool_requests_total{outcome="'
        found = (line.removeprefix(start).split('"} ') for line in lines if line.startswith(start))
        return {outcome: int(float(number)) for outcome, number in found}

    def wait_for_outcome(self, outcome: str) -> None:
        """Wait until a request ended like this."""
        until = time.monotonic() + 10
        while outcome not in (seen := self.outcomes()):
            assert time.monotonic() < until, seen
            time.sleep(0.02)

    def stop(self) -> None:
        """As SIGTERM does."""
        self._server.should_exit = True
        self._thread.join(30)

    def close(self) -> None:
        self.opening.set()
        self.allow(1000)
        self.stop()
        assert self.worker.join(30)


@pytest.fixture
def make_server(make_bundle: MakeBundle) -> Iterator[Callable[..., Server]]:
    """Start a server over a new bundle; `held` makes its steps wait to be allowed."""
    servers: list[Server] = []

    def make(
        *,
        held: bool = False,
        ready: bool = True,
        limits: Limits = Limits(),  # noqa: B008 – frozen
        token: str | None = None,
        local: bool = True,
        bundle: Path | None = None,
    ) -> Server:
        server = Server(bundle or make_bundle(), held=held, limits=limits, token=token, local=local)
        servers.append(server)
        server.start(ready=ready)
        return server

    yield make
    for server in servers:
        server.close()


def _manifest(files: dict[str, File]) -> Manifest:
    components = ("transformer", "vae_decoder", *WIDTHS)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        architecture=Architecture(
            family="sd3",
            classifier_free=True,
            guidance_embeds=False,
            latent_channels=CHANNELS,
            vae_scale_factor=8,
            patch_size=2,
            max_latent_size=16,
            scaling_factor=1.5,
            shift_factor=0.25,
            joint_attention_dim=10,
        ),
        scheduler=Scheduler(
            spacing="train_range",
            num_train_timesteps=1000,
            shift=3.0,
            use_dynamic_shifting=False,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            time_shift_type="exponential",
        ),
        defaults=Defaults(
            num_inference_steps=4, guidance_scale=3.0, max_sequence_length=NUM_T5_TOKENS, height=64, width=64
        ),
        tokenizers={
            name: Tokenizer(path=f"{name}/tokenizer.json", max_length=NUM_TOKENS, pad_id=3)
            for name in ("tokenizer", "tokenizer_2")
        },
        graphs={
            name: [Graph(path=f"{name}/model.onnx", activations="float32", weights="float32")]
            for name in components
        },
        variants=[ENGINE, CPU],
        provenance=Provenance(
            model="hand-made",
            revision=None,
            base_model=None,
            base_revision=None,
            license=None,
            plan_sha256=None,
            calibration_sha256=None,
            tools={},
        ),
        files=files,
    )


def _save_tokenizer(root: Path, name: str, tokenizer: CLIPTokenizer | PreTrainedTokenizerFast) -> None:
    (root / name).mkdir(exist_ok=True)
    tokenizer.backend_tokenizer.save(str(root / name / "tokenizer.json"))


def _save(root: Path, name: str, model: onnx.ModelProto) -> None:
    (root / name).mkdir(exist_ok=True)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(root / name / "model.onnx"))


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    kinds = {"input_ids": TensorProto.INT64}

    def infos(names: dict[str, list[Any]]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
            for name, shape in names.items()
        ]

    graph = helper.make_graph(
        nodes,
        "graph",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _text_encoder(vocabulary: int, width: int) -> onnx.ModelProto:
    """Hidden states are rows of a table; pooled is their mean."""
    table = np.random.default_rng(width).standard_normal((vocabulary, width), np.float32)
    return _model(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["hidden_states"], axis=0),
            helper.make_node("ReduceMean", ["hidden_states", "token_axis"], ["pooled"], keepdims=0),
        ],
        {"input_ids": ["batch", "length"]},
        {"hidden_states": ["batch", "length", width], "pooled": ["batch", width]},
        {"table": table, "token_axis": np.array([1])},
    )


def _transformer(pooled_width: int = 8, *, guidance: bool = False) -> onnx.ModelProto:
    """velocity = hidden_states * (timestep / 1000 - sum(text) / 30 - sum(pooled) / 10 [+ guidance / 30])"""
    last = "factor"
    guidance_nodes = [
        helper.make_node("Div", ["guidance", "thirty"], ["guidance_part"]),
        helper.make_node("Add", ["factor", "guidance_part"], ["guided_factor"]),
    ]
    if guidance:
        last = "guided_factor"
    return _model(
        [
            helper.make_node("ReduceSum", ["encoder_hidden_states", "all_axes"], ["text"], keepdims=0),
            helper.make_node("ReduceSum", ["pooled_projections", "one_axis"], ["pooled"], keepdims=0),
            helper.make_node("Div", ["timestep", "thousand"], ["time"]),
            helper.make_node("Div", ["text", "thirty"], ["text_part"]),
            helper.make_node("Div", ["pooled", "ten"], ["pooled_part"]),
            helper.make_node("Sub", ["time", "text_part"], ["without_pooled"]),
            helper.make_node("Sub", ["without_pooled", "pooled_part"], ["factor"]),
            *(guidance_nodes if guidance else []),
            helper.make_node("Reshape", [last, "column"], ["factor_BCHW"]),
            helper.make_node("Mul", ["hidden_states", "factor_BCHW"], ["velocity"]),
        ],
        {
            "hidden_states": ["batch", CHANNELS, "height", "width"],
            "timestep": ["batch"],
            "encoder_hidden_states": ["batch", "tokens", 10],
            "pooled_projections": ["batch", pooled_width],
            **({"guidance": ["batch"]} if guidance else {}),
        },
        {"velocity": ["batch", CHANNELS, "height", "width"]},
        {
            "all_axes": np.array([1, 2]),
            "one_axis": np.array([1]),
            "column": np.array([-1, 1, 1, 1]),
            "thousand": np.array(1000, np.float32),
            "thirty": np.array(30, np.float32),
            "ten": np.array(10, np.float32),
        },
    )


def _vae_decoder() -> onnx.ModelProto:
    kernel = np.random.default_rng(0).standard_normal((CHANNELS, 3, 8, 8), np.float32) / 4
    return _model(
        [helper.make_node("ConvTranspose", ["latents", "kernel"], ["image"], strides=[8, 8])],
        {"latents": ["batch", CHANNELS, "height", "width"]},
        {"image": ["batch", 3, "picture_height", "picture_width"]},
        {"kernel": kernel},
    )
