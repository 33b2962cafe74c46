"""The page says what the artefacts say, needs no other file, and runs nothing."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.bench import Bench, Spread
from export.fit import TargetFit
from report.evidence import read_evidence
from report.measure import Measured
from report.page import render_page
from report.pictures import draw_all
from tests.report.conftest import HOSTILE, score
from toolchain.artifacts import write_json
from toolchain.history import HISTORY_FILE

SECTIONS = [
    "pictures", "removed", "sensitivity", "training", "quality", "memory", "latency", "parity", "engines",
    "provenance",
]  # fmt: skip
VOID = {"meta", "link", "img", "path", "br"}


class Page(HTMLParser):
    """A page as text by section, held to be well-formed on the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text[self._section] = f"{self.text.get(self._section, '')} {' '.join(data.split())}".strip()


BENCH = Bench(
    target="cpu-x86",
    runtime="onnxruntime-cpu",
    reasons=[],
    height=64,
    width=64,
    steps=12,
    repeats=5,
    cold_ms=812.0,
    parts_ms={
        name: Spread(p50=value, p95=2 * value, fewest=value)
        for name, value in {
            "text_encoders": 1.5, "transformer": 70.0, "vae_decoder": 8.5, "total": 81.5, "step": 6.25,
        }.items()
    },
    peak_bytes=210_000_000,
)  # fmt: skip
FIT = TargetFit(
    target="rtx4090",
    bits=4,
    ratio=0.0,
    height=64,
    width=64,
    batch=2,
    available=20_000_000_000,
    together=600_000_000,
    in_turn=600_000_000,
    host=0,
    activations=1000,
    disk=1000,
    build=0,
    verdict="fits",
    missing=0,
    least_ratio={4: 0.0, 8: 0.0, 16: None},
    floor=1000,
    floor_part="transformer",
    least_step_seconds=0.0015,
)


@pytest.fixture
def measured() -> Measured:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    return Measured(
        machine="a toy machine",
        when="2030-01-02",
        prompts=["a red circle", HOSTILE],
        pictures={"original": pixels, "INT4 on onnxruntime": pixels},
        steps_ms={"original": Spread(p50=20.5, p95=22.0, fewest=20.0)},
        scores={"INT4 on onnxruntime": score(0.9375)},
        benches={"onnxruntime-cpu": BENCH},
        fits={"student, 4 bits": [FIT]},
    )


@pytest.fixture
def html(bundle: Path, measured: Measured) -> str:
    return render_page(read_evidence([bundle]), measured)


def test_every_section_is_there_and_says_what_the_artefacts_say(html: str) -> None:
    page = Page(html)
    assert [name for name in page.text if name] == SECTIONS
    for section, words in {
        "pictures": ["a red circle", "INT4 on onnxruntime", "seed 0"],
        "removed": [
            "1 whole block and 1 component went",
            "40.0 % of the parameters",
            "1.attn",
            "15.0 %",
        ],
        "sensitivity": ["to 1 without 0", "whole block", "attention"],
        "training": ["from 0.5 to 0.125 in 3 steps", "velocity error at checks", "1-2", "0.8125"],
        "quality": ["0.975 ± 0.013", "0.938 ± 0.013", "0.0432", "two object"],
        "memory": ["8.0 kB", "1.0 kB", "210.0 MB", "rtx4090", "600.0 MB", "1.5 ms"],
        "latency": ["20.5 ms", "6.2 ms", "81.5", "812", "a toy machine"],
        "parity": ["3.21e-02", "0.2", "0.999500"],
        "engines": ["rtx4090", "TensorRT-RTX", "7 of 7", "engines/one.engine"],
        "provenance": ["apache-2.0", "style.safetensors:1", "2,1.attn", "torch", "2.13.0", "2030-01-02"],
    }.items():
        for word in words:
            assert word in page.text[section], (section, word, page.text[section])


def test_every_section_says_where_its_numbers_are_from(html: str) -> None:
    assert html.count('<ul class="sources">') == len(SECTIONS)
    for name in (
        "plan.json",
        "sensitivity.json",
        "history.json",
        "report.json",
        "parity.json",
        "engines.json",
    ):
        assert name in html


def test_the_page_needs_no_other_file_and_no_script(html: str) -> None:
    page = Page(html)
    assert page.tags.isdisjoint({"script", "iframe", "object", "embed"})
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"https?://|url\(|@import", html)


def test_a_hostile_name_is_text(html: str) -> None:
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;") >= 4


def test_ids_are_unique_and_links_lead_to_them(html: str) -> None:
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    links = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    assert sorted(ids) == sorted(set(ids))
    assert links == set(ids)


def test_pictures_have_a_text_for_who_cannot_see_them(html: str) -> None:
    images = [value for tag, name, value in Page(html).attributes if tag == "img" and name == "alt"]
    assert images[0] == "a red circle, painted by: original"
    assert len(images) == 4


def test_both_colour_schemes_define_the_same_colours(html: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert re.findall(r"--[\w]+", light) == re.findall(r"--[\w]+", dark)


def test_what_is_absent_is_said(student: Path) -> None:
    (student / HISTORY_FILE).unlink()
    measured = Measured(machine="m", when="2030-01-02", notes=["Nothing was painted, scored or timed."])
    page = Page(render_page(read_evidence([student]), measured))
    assert "holds no history.json" in page.text["training"]
    for section in ("parity", "engines"):
        assert "No bundle was given" in page.text[section]
    for section in ("pictures", "latency"):
        assert "Nothing was painted" in page.text[section]


def test_a_bundle_that_was_not_compared_says_so(bundle: Path) -> None:
    evidence = read_evidence([bundle])
    assert evidence.bundle is not None
    parity = replace(evidence.bundle.parity, rows=[], blocks=[], drift=[])
    evidence = replace(evidence, bundle=replace(evidence.bundle, parity=parity))
    page = Page(render_page(evidence, Measured(machine="m", when="2030-01-02")))
    assert "exported with --no-compare" in page.text["parity"]


def test_a_bundle_alone_has_a_page(student: Path, bundle: Path) -> None:
    student.rename(student.with_name("elsewhere"))
    page = Page(render_page(read_evidence([bundle]), Measured(machine="m", when="2030-01-02")))
    assert "there is no student of that name here" in page.text["removed"]
    assert "3.21e-02" in page.text["parity"]


def test_numbers_measured_elsewhere_name_their_file(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "jetson.json"
    write_json(path, asdict(BENCH))
    evidence = read_evidence([student], benches=[path])
    page = Page(render_page(evidence, Measured(machine="m", when="2030-01-02")))
    assert "jetson: cpu-x86, onnxruntime" in page.text["latency"]
    assert str(path) in page.text["latency"]


def test_pictures_are_drawn_beside_the_page(bundle: Path, measured: Measured, tmp_path: Path) -> None:
    written = draw_all(read_evidence([bundle]), measured, tmp_path / "r.html")
    assert [path.name for path in written] == ["r-pictures.png", "r-plan.png", "r-sensitivity.png"]
    with Image.open(written[0]) as image:
        assert image.size == (120 + 2 * 134, 62 + 2 * 134)
