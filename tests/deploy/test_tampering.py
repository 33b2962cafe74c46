"""Whatever is done to a bundle, opening it is an error that names what is wrong, or it is the same bundle."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploy.bundle import MANIFEST, MAX_FILES, SIGNATURE, Bundle, BundleError, manifest_to_json, open_bundle
from deploy.errors import DeployError
from deploy.session import open_graph
from deploy.signature import open_signed_bundle, sign_bundle

MakeBundle = Callable[..., Path]

GRAPH = "transformer/model.onnx"

_touched: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _touched is not None and event in ("open", "os.listdir", "os.scandir"):
        _touched.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, Path)) else "?")


sys.addaudithook(_note)


@contextmanager
def confined_to(root: Path) -> Iterator[None]:
    """Fail if a file or directory that does not lie in `root` is opened meanwhile."""
    global _touched  # noqa: PLW0603 - a hook cannot be taken away, only told to be still
    _touched = []
    try:
        yield
        outside = [path for path in _touched if not Path(path).resolve().is_relative_to(root)]
    finally:
        _touched = None
    assert outside == []


def open_confined(path: Path) -> Bundle:
    with confined_to(path):
        return open_bundle(path)


def test_what_is_opened_outside_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "outside").touch()
    with pytest.raises(AssertionError, match="outside"), confined_to(tmp_path / "bundle"):
        (tmp_path / "outside").read_bytes()


def alter_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.bak"))


def replace_by_a_link(path: Path) -> None:
    """To a file of the very same content."""
    shutil.move(path, path.parents[len(path.parents) - 1] / f"{path.parent.parent}.{path.name}.canary")
    path.symlink_to(f"{path.parent.parent}.{path.name}.canary")


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "tamper",
    [
        alter_a_bit,
        truncate,
        Path.unlink,
        rename,
        replace_by_a_link,
        replace_by_a_directory,
        replace_by_a_pipe,
    ],
)
def test_each_file_is_held_to_the_manifest_and_to_the_signature(
    make_bundle: MakeBundle, tmp_path: Path, keys: Path, tamper: Callable[[Path], None], *, signed: bool
) -> None:
    whole = make_bundle()
    sign_bundle(whole, keys / "private.pem")
    open_ = partial(open_signed_bundle, key=keys / "public.pem") if signed else open_confined
    names = [*open_bundle(whole).manifest.files, MANIFEST]
    if tamper is alter_a_bit and not signed:
        names.remove(MANIFEST)  # which is what a signature is for
    for number, name in enumerate(names):
        path = tmp_path / f"{number}" / "bundle"
        shutil.copytree(whole, path)
        tamper(path / name)
        with pytest.raises(BundleError, match=re.escape(name)):
            open_(path)


def test_a_bundle_of_too_many_files_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    (path / "many").mkdir()
    for number in range(MAX_FILES):
        (path / "many" / str(number)).touch()
    with pytest.raises(BundleError, match=f"holds more than {MAX_FILES} files"):
        open_bundle(path)


def test_a_manifest_that_lists_too_many_files_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    data = json.loads((path / MANIFEST).read_text())
    data["files"] |= {str(number): {"sha256": "", "bytes": 0} for number in range(MAX_FILES)}
    (path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=f"a bundle has at most {MAX_FILES}"):
        open_bundle(path)


def test_a_manifest_that_is_too_large_is_not_read(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    os.truncate(path / MANIFEST, 1 << 40)
    with pytest.raises(
        BundleError, match=rf"{MANIFEST} has 1099511627776 bytes, and at most 16777216 are read"
    ):
        open_bundle(path)


def test_a_signature_is_no_file_of_the_manifest(make_bundle: MakeBundle) -> None:
    path = make_bundle(lambda root: (root / SIGNATURE).write_text("{}"))
    with pytest.raises(BundleError, match=r"'bundle\.sig' is not the path of a file inside the bundle"):
        open_bundle(path)


class Raw(str):
    """A piece of JSON as it is to be written."""

    __slots__ = ()


class Object(list[tuple[str, Any]]):
    """A JSON object, which may have a key twice."""


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Object)


def dumped(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Object):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumped(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> list[tuple[list[Any], int]]:
    """Every value inside of a value: the list it is in, and where."""
    found = []
    if isinstance(value, list):
        for index, item in enumerate(value):
            found.append((value, index))
            found += places(item[1] if isinstance(value, Object) else item)
    return found


TRICKS = [
    "../canary", "/canary", "transformer/../../canary", "..", ".", "", "a/", "a//b", "a\0b", "C:\\canary",
    "\\\\host\\share", "~", "transformer", "transformer/model.onnx/x", MANIFEST, SIGNATURE, "con",
    "Transformer/model.onnx", "transformer/mode\u0142.onnx", "\u202egnp.exe", "e\u0301", "\ufeff", "x" * 5000,
]  # fmt: skip
ODD = [
    "1e999", "-1e999", "1e-999", "-0", "-0.0", "9" * 400, "9" * 5000, "0x10", "01", "1.", "NaN", "Infinity",
    '"\\ud800"', "'a'", "null", "true", "", "{}", "[]",
    "[" * 900 + "]" * 900, "[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900,
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(TRICKS),
    st.sampled_from(ODD).map(Raw),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3).map(lambda table: Object(table.items())),
)

ALIKE: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-1, 2**70),
    float: st.floats(),
    str: st.text(max_size=20),
}


@st.composite
def mutated(draw: st.DrawFn, text: str, canary: str) -> bytes:
    """A manifest that was changed in a few places, as data or as text."""
    data = parsed(text)
    values = st.just(canary) | VALUES
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        container, index = draw(st.sampled_from(places(data)))
        action = draw(st.sampled_from(["resemble", "replace", "rename", "remove", "repeat", "wrap", "add"]))
        key, value = container[index] if isinstance(container, Object) else ("", container[index])
        if action == "remove":
            del container[index]
            continue
        if action in ("repeat", "add"):
            key, value = draw(st.sampled_from([key, *TRICKS])), draw(st.just(value) | values)
        elif action == "resemble":
            value = draw(ALIKE.get(type(value), st.just(value)))
        elif action == "replace":
            value = draw(values)
        elif action == "rename":
            key = draw(st.sampled_from([canary, *TRICKS]) | st.text(max_size=10))
        else:
            value = [value]
        item = (key, value) if isinstance(container, Object) else value
        if action in ("repeat", "add"):
            container.append(item)
        else:
            container[index] = item
    content = dumped(data).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 3:
        at = draw(st.integers(0, len(content)))
        gone = draw(st.integers(0, 3) | st.just(len(content)))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + gone :]
    return content


def numbers_alike(content: str) -> Any:
    """Whole numbers that a float cannot hold are rounded, as they are where the manifest has a float."""
    return json.loads(content, parse_int=lambda text: float(text) if abs(int(text)) > 2**53 else int(text))


def require_refused_or_the_same(path: Path, content: bytes) -> bool:
    """Open a bundle whose manifest has this content; returns whether it did open."""
    (path / MANIFEST).write_bytes(content)
    outcome: Bundle | BundleError
    try:
        outcome = open_confined(path)
    except BundleError as error:
        outcome = error
    if isinstance(outcome, BundleError):
        assert MANIFEST in str(outcome) or str(path) in str(outcome)
        return False
    written = json.dumps(manifest_to_json(outcome.manifest), allow_nan=False)
    assert numbers_alike(content.decode()) == numbers_alike(written)
    return True


def test_a_manifest_that_was_changed_is_refused_or_means_what_it_says(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    path = make_bundle()
    (tmp_path / "canary").write_text("outside")
    text = (path / MANIFEST).read_text()
    opened = []

    @settings(max_examples=1000, database=None, derandomize=True)
    @given(mutated(text, str(tmp_path / "canary")))
    def check(content: bytes) -> None:
        opened.append(require_refused_or_the_same(path, content))

    check()
    assert 20 < sum(opened) < len(opened) - 20  # both were seen


@pytest.mark.parametrize("odd", ODD, ids=lambda text: text[:8])
def test_any_value_of_the_manifest_may_be_odd(make_bundle: MakeBundle, odd: str) -> None:
    path = make_bundle()
    data = parsed((path / MANIFEST).read_text())
    for container, index in places(data):
        held = container[index]
        container[index] = (held[0], Raw(odd)) if isinstance(container, Object) else Raw(odd)
        require_refused_or_the_same(path, dumped(data).encode())
        container[index] = held


@pytest.mark.parametrize(
    "location",
    ["../../canary", "../text_encoder/canary", "{outside}", "link", "linked/canary", "/dev/zero"],
)
def test_weights_that_a_graph_seeks_elsewhere_are_not_read(
    make_bundle: MakeBundle, tmp_path: Path, location: str
) -> None:
    """onnxruntime reads them, and looks nowhere but beside the graph."""
    values = np.arange(64, dtype=np.float32)

    def write_graph(root: Path) -> None:
        (root / "text_encoder" / "canary").write_bytes(values.tobytes())
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location.format(outside=tmp_path / "canary")), ("length", "256")):
            weight.external_data.add(key=key, value=value)
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "graph", [x], [y], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (root / GRAPH).write_bytes(model.SerializeToString())

    (tmp_path / "canary").write_bytes(values.tobytes())
    bundle = open_bundle(make_bundle(write_graph))
    # Links are refused when a bundle is opened; these appear after that.
    (bundle.path / "transformer" / "link").symlink_to(tmp_path / "canary")
    (bundle.path / "transformer" / "linked").symlink_to(tmp_path)
    with pytest.raises(DeployError, match="onnxruntime cannot load"):
        open_graph(bundle, GRAPH)


def test_weights_beside_the_graph_are_read(make_bundle: MakeBundle) -> None:
    """The same graph with a location that is allowed, or the test above would prove nothing."""

    def write_graph(root: Path) -> None:
        values = np.arange(64, dtype=np.float32)
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in "xy")
        weight = onnx.numpy_helper.from_array(values, "w")
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "graph", [x], [y], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        path = str(root / GRAPH)
        onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)

    found = open_graph(open_bundle(make_bundle(write_graph)), GRAPH).run({"x": np.zeros(64, np.float32)})
    np.testing.assert_array_equal(found["y"], np.arange(64))
