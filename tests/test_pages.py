"""Pages are typed from top to bottom, where the hub holds small models under the published names."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from diffusers import StableDiffusion3Pipeline
from torch import nn

from tests.architecture.test_documented_commands import commands
from tests.conftest import saved, tiny_t5
from tests.servers import COMMIT, Hub, Registry, serving
from tests.toolchain.data.conftest import folder, picture
from tests.toolchain.test_lora import write as write_adapter
from tests.typed import hptool
from toolchain import lora
from toolchain.families import open_model, view
from toolchain.shapes.model import ShapesConfig, build_pipeline

DOCS = Path(__file__).parents[1] / "docs"
BEFORE: dict[str, list[str]] = {
    "README": [],
    "walkthrough": [],
    "recipes": [],
    "data": [],
    "runs": [],
    "targets": ["hptool compress"],
    "bundle": ["hptool compress", "hptool export"],
    "report": ["hptool compress", "hptool export", "hptool bench shapes-bundle --json > jetson.json"],
}
"""Pages that are typed here, with what their readers have typed before."""
TYPED_ELSEWHERE = {
    "getting-started": ("test_end_to_end.py", "getting-started.md"),
    "index": ("test_end_to_end.py", "getting-started.md"),  # two of its commands
    "big-runs": ("toolchain/test_launch.py", "--accelerate-config=two.yaml"),
    "serve": ("deploy/test_server.py", '"serve"'),
}
"""In which tests, and by what in them it shows."""
SMALLER = {
    "analyze": "--num-prompts 2 --num-seeds 1",
    "calibrate": "--num-prompts 2",
    "compress": "--num-prompts 2 --steps 2 --batch-size 2 --per-task 1 --grain blocks",
    "plan": "--num-prompts 2 --grain blocks",
    "report": "--no-measure",
}
"""Put behind what a page says: of an option that is given twice the last one counts."""
NUM_PROMPTS = 8


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the three text encoders of SD3.5, T5 among them, and six blocks."""
    config = ShapesConfig(num_layers=6, text_layers=2, vae_channels=(8, 8, 8, 8), num_attention_heads=1)
    pipeline = build_pipeline(config)
    t5, tokenizer = tiny_t5(pipeline.transformer.config.joint_attention_dim)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, t5):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.05)
    parts = pipeline.components | {"text_encoder_3": t5, "tokenizer_3": tokenizer}
    path = tmp_path_factory.mktemp("models") / "sd35"
    return saved(StableDiffusion3Pipeline(**parts), path, guidance_scale=0.0, max_sequence_length=8)


@pytest.fixture(scope="module")
def adapters(sd35: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of that model's."""
    return [
        write_adapter(open_model(str(sd35)).pipeline, tmp_path_factory.mktemp("adapter"), seed=seed)
        for seed in range(2)
    ]


@pytest.fixture
def places(
    sd35: Path,
    adapters: list[Path],
    tiny_path: Path,
    tiny_flux_path: Path,
    keys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, str]]:
    """A user's directory, a hub and a registry; what of a line stands for something else here."""
    published = {
        "stabilityai/stable-diffusion-3.5-large-turbo": sd35,
        "stabilityai/stable-diffusion-3.5-medium": sd35,
        "black-forest-labs/FLUX.1-schnell": tiny_flux_path,
    }
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, **_: str(published[source]))
    monkeypatch.setattr(view, "built_in_path", lambda: tiny_path)
    monkeypatch.setattr(lora, "list_repo_files", lambda _: [adapters[1].name])
    monkeypatch.setattr(lora, "hf_hub_download", lambda *_: str(adapters[1]))

    home = tmp_path / "home"
    folder(
        home / "pictures",
        {f"{number}.png": picture("red", (64, 64)) for number in range(NUM_PROMPTS)},
        {f"{number}.png": f"a red circle, {number}" for number in range(NUM_PROMPTS)},
    )
    (home / "prompts.txt").write_text("".join(f"a blue square, {number}\n" for number in range(NUM_PROMPTS)))
    shutil.copyfile(adapters[0], home / "style.safetensors")
    for name in ("private.pem", "public.pem"):
        shutil.copyfile(keys / name, home / name)
    profile = re.search(r'^    name = "studio".*?\n\n', _text("targets"), re.MULTILINE | re.DOTALL)
    assert profile
    (home / "studio.toml").write_text(re.sub(r"buckets = .*", "buckets = [[64, 64]]", profile[0]))
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody's credentials
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(home)
    with serving(Registry) as (registry, _), serving(Hub) as (hub, _):
        api = partial(huggingface_hub.HfApi, endpoint=f"http://{hub}", token="hf_none")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        yield {
            "25-28,31-34": "2,3",
            "--recipe sd3.5-large-turbo-paper-20": "--recipe sd3.5-large-turbo-paper-20 --remove 2,3",
            "ghcr.io": registry,
            "hf://owner/sd35-turbo-small": "hf://owner/name",
            "COMMIT": COMMIT,
            "shapes>=0.95": "shapes>=0",  # small models have learned nothing
        }


def _text(page: str) -> str:
    if page == "README":  # its beginning is what getting-started.md says
        return (DOCS.parent / "README.md").read_text(encoding="utf-8").partition("\n## A real ")[2]
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", BEFORE)
def test_a_page_can_be_typed_from_top_to_bottom(
    page: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = list(commands(_text(page)))
    assert said
    for line in (*BEFORE[page], *said):
        for name, place in places.items():
            line = line.replace(name, place)
        line, _, output = line.partition(" > ")
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "pull":  # on another machine, then
            shutil.rmtree(words[2], ignore_errors=True)
        capsys.readouterr()
        code = hptool(monkeypatch, *words, *SMALLER.get(words[0], "").split())
        printed = capsys.readouterr()
        assert code == 0, (line, printed.err)
        if output:
            Path(output).write_text(printed.out)


def test_every_page_that_says_what_to_type_is_typed_somewhere() -> None:
    pages = {page.stem for page in DOCS.glob("*.md") if any(commands(page.read_text(encoding="utf-8")))}
    assert pages == (BEFORE.keys() - {"README"}) | TYPED_ELSEWHERE.keys()
    for name, shown in TYPED_ELSEWHERE.values():
        assert shown in (Path(__file__).parent / name).read_text(encoding="utf-8")
