"""The server as its clients see it: OpenAI's own client, a browser's requests, probes and signals."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import openai
import pytest
from onnx import numpy_helper
from PIL import Image

from deploy.errors import DeployError
from deploy.gate import is_loopback, read_token
from deploy.images_api import GENERATIONS, Limits
from deploy.pipeline import EdgePipeline
from deploy.server import serve

MakeBundle = Callable[..., Path]
MakeServer = Callable[..., Any]

TOKEN = "0123456789abcdef"
ROOT = Path(__file__).parents[2]


def client(server: Any, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=token, max_retries=0, timeout=30)


def pixels(b64_json: str | None) -> np.ndarray:
    assert b64_json is not None
    with Image.open(io.BytesIO(base64.b64decode(b64_json))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def ask(server: Any, **body: Any) -> httpx.Response:
    return httpx.post(server.address + GENERATIONS, json={"prompt": "a star", **body}, timeout=30)


def ask_aside(server: Any, **body: Any) -> Callable[[], httpx.Response]:
    """Ask from another thread; calling what is returned waits for the answer."""
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(ask, server, **body)
    return lambda: answer.result(timeout=30)


def wait_for_depth(server: Any, depth: int) -> None:
    until = time.monotonic() + 10
    while server.worker.depth != depth:
        assert time.monotonic() < until, server.worker.depth
        time.sleep(0.01)


def sent_events(text: str) -> list[tuple[str, Any]]:
    blocks = [dict(re.findall(r"^(\w+): (.*)$", block, re.MULTILINE)) for block in text.split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks if "event" in block]


# What clients get


def test_openai_client_gets_the_picture_the_pipeline_makes(make_server: MakeServer) -> None:
    server = make_server()
    made = client(server).images.generate(
        prompt="a red circle",
        model="small",
        n=2,
        size="32x64",
        response_format="b64_json",
        user="somebody",
        extra_body={"seed": 5, "steps": 3, "guidance_scale": 2.0, "negative_prompt": "a star"},
    )
    pipeline = EdgePipeline.open(server.worker.opened.result().bundle.path, target="cpu-x86", threads=1)
    expected = pipeline(
        "a red circle", "a star", steps=3, guidance_scale=2.0, width=32, height=64, seed=5, num_images=2
    )
    assert made.data is not None
    for answer, image in zip(made.data, expected.images, strict=True):
        assert (pixels(answer.b64_json) == np.asarray(image)).all()
    assert [answer.seed for answer in made.data] == [5, 6]  # type: ignore[attr-defined]
    assert abs(made.created - time.time()) < 60
    assert made.size == "32x64"
    assert made.usage is not None
    # Two pictures of 2 x 4 tokens, each painted from CLIP's 16 tokens and the 7 in place of T5's.
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (46, 16, 62)
    assert server.outcomes() == {"ok": 1}


def test_defaults_are_those_of_the_bundle_and_a_seed_that_is_told(make_server: MakeServer) -> None:
    server = make_server()
    first, second = (client(server).images.generate(prompt="a star", size="auto") for _ in range(2))
    assert first.data is not None
    assert second.data is not None
    assert pixels(first.data[0].b64_json).shape == (64, 64, 3)
    seed = first.data[0].seed  # type: ignore[attr-defined]
    assert seed != second.data[0].seed  # type: ignore[attr-defined]
    again = ask(server, seed=seed, steps=4, guidance_scale=3.0, size="64x64").json()
    assert (pixels(again["data"][0]["b64_json"]) == pixels(first.data[0].b64_json)).all()


def test_openai_client_reads_the_stream(make_server: MakeServer) -> None:
    stream = client(make_server()).images.generate(prompt="a star", n=2, stream=True, extra_body={"seed": 1})
    seen: list[Any] = list(stream)
    assert [event.type.removeprefix("image_generation.") for event in seen] == [
        "queued", *["progress"] * 4, "completed", *["progress"] * 4, "completed",
    ]  # fmt: skip
    steps = [event for event in seen if event.type == "image_generation.progress"]
    assert [(event.image_index, event.step, event.steps) for event in steps] == [
        (picture, step, 4) for picture in (0, 1) for step in (1, 2, 3, 4)
    ]
    pictures = [event for event in seen if event.type == "image_generation.completed"]
    assert [event.seed for event in pictures] == [1, 2]
    assert (pixels(pictures[0].b64_json) != pixels(pictures[1].b64_json)).any()
    assert pictures[0].output_format == "png"
    assert pictures[0].usage.total_tokens == 16 + 7 + 16


def test_stream_says_how_many_come_before(make_server: MakeServer) -> None:
    server = make_server(held=True)
    with server.painting():
        stream = client(server).images.generate(prompt="a star", stream=True)
        first: Any = next(iter(stream))
        assert (first.type, first.position) == ("image_generation.queued", 1)
        stream.close()


def test_models_are_listed_with_what_may_be_asked(make_server: MakeServer) -> None:
    server = make_server(limits=Limits(side=40, steps=3))
    (listed,) = client(server).models.list()
    assert client(server).models.retrieve("small") == listed
    assert (listed.id, listed.object, listed.created, listed.owned_by) == ("small", "model", 123, "hptool")
    facts = listed.hptool  # type: ignore[attr-defined]
    assert facts["size"] == "32x32"  # the model's own size is above the limit
    assert (facts["steps"], facts["largest_size"], facts["size_unit"]) == (3, 40, 16)
    assert facts["negative_prompt"] is True
    with pytest.raises(openai.NotFoundError, match="There is no model 'dall-e-3' here"):
        client(server).models.retrieve("dall-e-3")
    assert pixels(ask(server).json()["data"][0]["b64_json"]).shape == (32, 32, 3)


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"response_format": "url"}, "response_format", "'b64_json'"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "4 at most here, not 5"),
        ({"n": True}, "n", "valid integer"),
        ({"steps": 101}, "steps", "100 at most"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"prompt": "a" * 4001}, "prompt", "4000 characters at most here, not 4001"),
        ({"negative_prompt": "a" * 4001}, "negative_prompt", "4000 characters"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x65"}, None, "multiples of 16 from 16 to 128. The nearest is 64"),
        ({"size": "1024x64"}, None, "The nearest is 128"),
        ({"size": "64x112"}, "size", "96x96 at most here"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"quality": "hd"}, "quality", "'auto' or 'standard'"),
        ({"style": "vivid"}, "style", "not permitted"),
        ({"nonsense": 1}, "nonsense", "not permitted"),
    ],
)
def test_request_that_cannot_be_met_is_refused_in_openai_s_shape(
    make_server: MakeServer, body: dict[str, Any], param: str | None, message: str
) -> None:
    server = make_server(limits=Limits(side=96 if body.get("size") == "64x112" else None))
    answer = ask(server, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": param, "code": "invalid_request"}
    assert server.outcomes() == {"invalid_request": 1}


def test_body_that_is_no_json_is_refused(make_server: MakeServer) -> None:
    server = make_server()
    for headers, content in (
        ({"content-type": "application/json"}, b"{"),
        ({"content-type": "application/json"}, b"[]"),
        ({"content-type": "text/plain"}, b'{"prompt": "a star"}'),  # as any web page could send it
    ):
        answer = httpx.post(server.address + GENERATIONS, content=content, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_request"


def test_negative_prompt_is_refused_by_a_model_without_a_second_pass(
    make_server: MakeServer, make_flux: MakeBundle
) -> None:
    server = make_server(bundle=make_flux())
    answer = ask(server, negative_prompt="a square")
    assert answer.status_code == 400
    assert "no second pass" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.address}/v1/models").json()["data"][0]["hptool"]["negative_prompt"] is False


def test_unknown_paths_methods_and_models_are_errors_of_the_same_shape(make_server: MakeServer) -> None:
    server = make_server()
    with pytest.raises(openai.NotFoundError) as error:
        client(server).images.generate(prompt="a star", model="dall-e-3")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    nothing = httpx.get(f"{server.address}/v1/nothing")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "not_found")
    method = httpx.get(server.address + GENERATIONS)
    assert (method.status_code, method.json()["error"]["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_is_too_large_is_not_read(make_server: MakeServer, chunked: bool) -> None:
    server = make_server(limits=Limits(body_bytes=1000))
    body = json.dumps({"prompt": "a" * 1000}).encode()
    answer = httpx.post(
        server.address + GENERATIONS,
        content=iter([body[:500], body[500:]]) if chunked else body,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert server.outcomes() == {"request_too_large": 1}


def test_full_queue_is_429_and_says_when_to_come_again(make_server: MakeServer) -> None:
    server = make_server(held=True, limits=Limits(queue=1))
    with server.painting():
        waiting = ask_aside(server)
        wait_for_depth(server, 1)
        with pytest.raises(openai.RateLimitError) as error:
            client(server).images.generate(prompt="a star")
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.address}/healthz").status_code == 200
        assert "hptool_queue_depth 1.0" in httpx.get(f"{server.address}/metrics").text
        server.allow(100)
    assert waiting().status_code == 200
    assert server.outcomes() == {"queue_full": 1, "ok": 1}


def test_full_queue_refuses_what_it_has_not_read(make_server: MakeServer) -> None:
    server = make_server(held=True, limits=Limits(queue=0))
    with server.painting():
        answer = httpx.post(server.address + GENERATIONS, content=b"no JSON")
    assert answer.status_code == 429
    assert server.outcomes() == {"queue_full": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_takes_too_long_is_504_and_cancelled(make_server: MakeServer, stream: bool) -> None:
    server = make_server(held=True, limits=Limits(timeout_seconds=1))
    waiting = ask_aside(server, stream=stream, steps=50)
    server.wait_for_step()
    answer = waiting()
    if stream:
        name, data = sent_events(answer.text)[-1]
        assert (name, data["error"]["code"]) == ("error", "timeout")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
    server.allow(1)  # of 50: the model is free for the next after this step
    done = ask_aside(server, steps=1)
    server.wait_for_step()
    server.allow(1)
    assert done().status_code == 200
    assert server.outcomes() == {"timeout": 1, "ok": 1}


def test_request_that_waits_too_long_leaves_the_queue(make_server: MakeServer) -> None:
    server = make_server(held=True, limits=Limits(timeout_seconds=1))
    with server.painting():
        assert ask(server).status_code == 504
        assert server.worker.depth == 0


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_stops_its_picture(make_server: MakeServer, stream: bool) -> None:
    server = make_server(held=True)
    body = {"prompt": "a star", "steps": 50, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.address + GENERATIONS, json=body, timeout=0.3)
    server.wait_for_outcome("disconnected")
    server.wait_for_step()
    server.allow(1)
    done = ask_aside(server, steps=1)
    server.wait_for_step()
    server.allow(1)
    assert done().status_code == 200


def test_client_that_goes_away_leaves_the_queue(make_server: MakeServer) -> None:
    server = make_server(held=True)
    with server.painting():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.address + GENERATIONS, json={"prompt": "a star"}, timeout=0.3)
        wait_for_depth(server, 0)
        assert server.outcomes() == {"disconnected": 1}


def test_model_that_fails_is_500_and_the_server_goes_on(
    make_server: MakeServer, make_bundle: MakeBundle
) -> None:
    def collapse(path: Path) -> None:
        graph = path / "vae_decoder" / "model.onnx"
        model = onnx.load(str(graph))
        (kernel,) = model.graph.initializer
        kernel.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(kernel)), kernel.name))
        onnx.save(model, str(graph))

    server = make_server(bundle=make_bundle(collapse))
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="the model has collapsed") as error:
            client(server).images.generate(prompt="a star")
        assert error.value.code == "model_failed"
    with pytest.raises(openai.APIError, match="the model has collapsed"):
        list(client(server).images.generate(prompt="a star", stream=True))
    assert server.outcomes() == {"model_failed": 3}


# Who is let in


def test_token_is_asked_for_everywhere_but_where_nothing_is_told(make_server: MakeServer) -> None:
    server = make_server(token=TOKEN)
    for wrong in ("none", TOKEN + "0", TOKEN[:-1]):
        with pytest.raises(openai.AuthenticationError) as error:
            client(server, wrong).images.generate(prompt="a star")
        assert error.value.code == "invalid_api_key"
    assert httpx.get(f"{server.address}/metrics").headers["www-authenticate"] == "Bearer"
    for path, status in {
        "/": 200, "/healthz": 200, "/readyz": 200, "/metrics": 401, "/v1/models": 401, "/openapi.json": 401,
    }.items():  # fmt: skip
        assert httpx.get(server.address + path).status_code == status, path
    assert client(server, TOKEN).images.generate(prompt="a star").data
    assert server.outcomes() == {"invalid_api_key": 3, "ok": 1}


def test_names_of_other_machines_are_refused_without_a_token(make_server: MakeServer) -> None:
    server = make_server()
    for host, status in {
        "localhost:8000": 200, "127.0.0.1": 200, "[::1]:8000": 200, "evil.example": 403, "": 403,
        "localhost.evil.example:80": 403,
    }.items():  # fmt: skip
        answer = httpx.get(f"{server.address}/v1/models", headers={"Host": host})
        assert answer.status_code == status, host


def test_any_name_will_do_where_everyone_is_let_in(make_server: MakeServer) -> None:
    server = make_server(local=False)
    assert httpx.get(f"{server.address}/v1/models", headers={"Host": "box.lan"}).status_code == 200


def test_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPTOOL_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("HPTOOL_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    (tmp_path / "token").write_text("fedcba9876543210\n")
    assert read_token(tmp_path / "token") == "fedcba9876543210"
    for text in ("", "short", "two words of some length"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(DeployError, match="one word of 16 ASCII characters"):
            read_token(tmp_path / "token")
    with pytest.raises(DeployError, match="cannot be read"):
        read_token(tmp_path / "nothing")


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "box.lan", "")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_address_that_others_reach_needs_a_token(make_bundle: MakeBundle, host: str) -> None:
    with pytest.raises(DeployError, match=r"can be reached by others.*--insecure"):
        serve(
            make_bundle(),
            lambda: pytest.fail("opened"),
            limits=Limits(),
            host=host,
            port=0,
            token=None,
            insecure=False,
            on_listen=lambda _: pytest.fail("listens"),
        )


@pytest.mark.parametrize("limits", [{"queue": -1}, {"images": 0}, {"timeout_seconds": 0}, {"steps": 0}])
def test_limits_under_which_nothing_is_painted_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(DeployError, match=r"The limit .* must be"):
        Limits(**limits)


# Health, metrics and the page


def test_server_answers_while_the_model_is_being_opened(make_server: MakeServer) -> None:
    server = make_server(ready=False)
    assert httpx.get(f"{server.address}/healthz").text == "ok\n"
    for answer in (httpx.get(f"{server.address}/readyz"), ask(server)):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_loading"
        assert int(answer.headers["retry-after"]) > 0
    server.opening.set()
    server.worker.opened.result(timeout=30)
    assert httpx.get(f"{server.address}/readyz").status_code == 200


def test_health_is_answered_while_the_model_is_busy(make_server: MakeServer) -> None:
    server = make_server(held=True)
    with server.painting():
        assert httpx.get(f"{server.address}/healthz", timeout=2).text == "ok\n"


def test_metrics_say_what_was_painted_and_what_it_took(make_server: MakeServer) -> None:
    server = make_server()
    ask(server, n=2, steps=3)
    text = httpx.get(f"{server.address}/metrics").text
    assert "hptool_picture_seconds_count 2.0" in text
    assert "hptool_step_seconds_count 6.0" in text
    assert "hptool_queue_depth 0.0" in text
    resident = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    assert resident is not None
    assert float(resident[1]) > 1e6


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_takes_nothing_from_elsewhere_and_runs_only_its_own_script(make_server: MakeServer) -> None:
    answer = httpx.get(make_server().address)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for directive in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[directive])
    elements = Elements(answer.text).found
    addresses = [value for _, of in elements for name, value in of.items() if name in ("src", "href")]
    assert addresses == ["data:,"]
    assert not re.search(r"url\(|@import|https?://", answer.text)
    # The policy would not let these run, without a word.
    assert not [name for _, of in elements for name in of if name == "style" or name.startswith("on")]


def test_every_field_of_the_page_has_a_label(make_server: MakeServer) -> None:
    elements = Elements(httpx.get(make_server().address).text).found
    labelled = [of["for"] for tag, of in elements if tag == "label"]
    fields = [of["id"] for tag, of in elements if tag in ("input", "textarea", "select")]
    assert sorted(fields, key=str) == sorted(labelled, key=str)
    assert len(fields) >= 8


# Stopping


def test_stopping_finishes_what_is_painted_and_refuses_what_waits(make_server: MakeServer) -> None:
    server = make_server(held=True)
    running = ask_aside(server, steps=1)
    server.wait_for_step()
    waiting = ask_aside(server)
    wait_for_depth(server, 1)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    refused = waiting()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    server.allow(1)
    assert running().status_code == 200
    stopping.join(10)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.address}/healthz")


def test_stopping_gives_up_what_is_not_done_in_time(make_server: MakeServer) -> None:
    server = make_server(held=True, limits=Limits(grace_seconds=0.2))
    running = ask_aside(server, stream=True)
    server.wait_for_step()
    server.stop()
    name, data = sent_events(running().text)[-1]
    assert (name, data["error"]["code"]) == ("error", "stopping")


# The process


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_what_paints_yields_to_what_answers(make_bundle: MakeBundle) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with hptool_serve(make_bundle()) as (process, _):
        threads = {int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()}
        found = {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads - {process.pid}}
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == own
    assert own + 5 in found


@contextmanager
def hptool_serve(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`hptool serve` in a process of its own, once it is ready."""
    command = [sys.executable, "-m", "toolchain", "serve", str(bundle), "--port", "0", *options]
    environment = os.environ | {"COLUMNS": "1000", "HPTOOL_CACHE": str(bundle.parent / "cache")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"on (http://\S+)", process.stdout.readline())
        assert found is not None, process.communicate(timeout=30)
        until = time.monotonic() + 60
        while httpx.get(f"{found[1]}/readyz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process, found[1]
    finally:
        process.kill()
        process.communicate(timeout=30)


def paint(address: str, **body: Any) -> httpx.Response:
    return httpx.post(address + GENERATIONS, json={"prompt": "a star", "seed": 1, **body}, timeout=60)


def wait_until_refused(address: str) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            httpx.get(f"{address}/healthz")
        except httpx.TransportError:  # refused, or broken off while it closed
            return
    pytest.fail("it still answers")


def test_sigterm_ends_the_process_after_what_it_paints(make_bundle: MakeBundle) -> None:
    with hptool_serve(make_bundle(), "--max-steps", "100000", "--max-images", "1") as (process, address):
        with httpx.stream(
            "POST",
            address + GENERATIONS,
            json={"prompt": "a star", "stream": True, "steps": 20000},
            timeout=60,
        ) as answer:
            lines = answer.iter_lines()
            while "progress" not in next(lines):
                pass
            process.send_signal(signal.SIGTERM)
            wait_until_refused(address)
            assert process.poll() is None  # it still paints
            assert any("image_generation.completed" in line for line in lines)
        assert process.wait(30) == 0
        _, errors = process.communicate()
        assert "Traceback" not in errors


def test_killed_server_starts_again_and_paints_the_same(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    with hptool_serve(bundle) as (process, address):
        before = paint(address)
        with httpx.stream(
            "POST", address + GENERATIONS, json={"prompt": "a star", "stream": True, "steps": 100}, timeout=60
        ) as answer:
            assert "queued" in next(answer.iter_lines())
            process.kill()
        assert process.wait(30) == -signal.SIGKILL
    with hptool_serve(bundle) as (_, address):
        after = paint(address)
    assert before.json()["data"][0]["b64_json"] == after.json()["data"][0]["b64_json"]


def refused(bundle: Path, *options: str) -> str:
    command = [sys.executable, "-m", "toolchain", "serve", str(bundle), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return message


def test_bundle_that_does_not_open_ends_the_process_with_its_message(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    (bundle / "vae_decoder" / "model.onnx").write_bytes(b"")
    assert "has 0 bytes where its manifest says" in refused(bundle, "--port", "0")


def test_what_cannot_be_served_is_one_message(make_bundle: MakeBundle, tmp_path: Path) -> None:
    assert "no manifest.json" in refused(tmp_path / "nothing")
    bundle = make_bundle()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Cannot listen on 127.0.0.1" in refused(bundle, "--port", str(taken.getsockname()[1]))
    assert "can be reached by others" in refused(bundle, "--host", "0.0.0.0")
    assert "cannot be read" in refused(bundle, "--token-file", str(tmp_path / "nothing"))
