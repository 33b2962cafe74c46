"""The whole way with the model that comes with the tool: compress, export, run, as a user types it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.pipeline import EdgePipeline
from toolchain.evaluate import evaluate_shapes
from toolchain.families import Model, open_model
from toolchain.families.view import built_in_path
from toolchain.plan import plan_from_json

pytestmark = pytest.mark.timeout(1800)  # the whole way, on whatever machine; it guards against a hang only

PROMPTS = ["a red circle left of a blue square", "three yellow triangles", "a black square"]


def hptool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolchain", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a user has typed what docs/getting-started.md says, from top to bottom."""
    directory = tmp_path_factory.mktemp("home")
    page = (Path(__file__).parents[1] / "docs" / "getting-started.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "python"}
    for kind, text in blocks:
        if kind == "python":
            lines = [[sys.executable, "-c", text]]
        else:
            lines = [
                [sys.executable, "-m", "toolchain", *shlex.split(line)[1:]] for line in text.splitlines()
            ]
        for command in lines:
            done = subprocess.run(
                command, cwd=directory, capture_output=True, text=True, check=False, timeout=900
            )
            assert done.returncode == 0, (command, done.stderr)
    return directory


@pytest.fixture(scope="module")
def student(home: Path) -> Model:
    return open_model(str(home / "shapes-student"))


@pytest.fixture(scope="module")
def noise(student: Model) -> np.ndarray:
    shape = (len(PROMPTS), *student.latent_shape)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_the_built_in_model_fits_and_paints_what_it_is_asked() -> None:
    sizes = [path.stat().st_size for path in built_in_path().rglob("*") if path.is_file()]
    assert sum(sizes) <= 24e6
    assert evaluate_shapes(open_model("shapes"), num_per_task=8).mean >= 0.8


def test_the_student_is_what_its_plan_says_and_smaller_by_the_ratio(home: Path, student: Model) -> None:
    plan = plan_from_json(json.loads((home / "shapes-student" / "plan.json").read_text()))
    assert student.num_parameters == plan.reached.parameters
    assert plan.ratio_reached >= 0.25


def test_an_engine_is_built_where_there_is_no_gpu(home: Path) -> None:
    (engine,) = (home / "shapes-bundle" / "engines").glob("sm89-*.engine")
    assert engine.stat().st_size > 1_000_000


def test_the_int4_transformer_takes_a_quarter_of_the_original_at_most(home: Path) -> None:
    original = built_in_path() / "transformer" / "diffusion_pytorch_model.safetensors"
    parts = [home / "shapes-bundle" / "transformer" / name for name in ("model.onnx", "weights.data")]
    assert sum(part.stat().st_size for part in parts) <= 0.25 * original.stat().st_size


def test_run_paints_the_same_picture_for_the_same_seed(home: Path) -> None:
    for name in ("a.png", "b.png"):
        done = hptool("run", "shapes-bundle", PROMPTS[0], "-o", name, cwd=home)
        assert done.returncode == 0, done.stderr
    first, second = (np.asarray(Image.open(home / name)) for name in ("a.png", "b.png"))
    assert first.shape == (64, 64, 3)
    assert (first == second).all()


def test_a_float32_bundle_paints_what_torch_paints(home: Path, student: Model, noise: np.ndarray) -> None:
    done = hptool("export", "--bits", "32", "--output", "full", cwd=home)
    assert done.returncode == 0, done.stderr
    edge = EdgePipeline.open(home / "full", runtime="onnxruntime-cpu")
    difference = student.paint(PROMPTS, noise).astype(int) - edge.paint(PROMPTS, noise)
    assert np.abs(difference).max() <= 2


def test_int4_changes_the_pictures_little(home: Path, student: Model, noise: np.ndarray) -> None:
    edge = EdgePipeline.open(home / "shapes-bundle", target="cpu-x86")
    difference = student.paint(PROMPTS, noise).astype(int) - edge.paint(PROMPTS, noise)
    assert np.abs(difference).mean() < 10


@pytest.fixture
def altered(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home / "shapes-bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


def test_an_altered_bundle_is_refused_before_it_runs(altered: Path) -> None:
    weights = altered / "transformer" / "weights.data"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    done = hptool("run", str(altered), PROMPTS[0], "-o", "out.png", cwd=altered.parent)
    assert done.returncode == 2
    assert "transformer/weights.data" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (altered.parent / "out.png").exists()
