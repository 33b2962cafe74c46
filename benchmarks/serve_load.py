"""A server under load: everyone gets a picture or is told when to come again, and its memory stays.

    python -m benchmarks.serve_load measure     # into benchmarks/results/serve_load.json
    python -m benchmarks.serve_load table       # writes the end of docs/serve.md

Two hundred requests come at once to a line of sixteen, some times over; then pictures are painted one after
another. Server, flood and probe are processes of their own, so that none waits for another's event loop.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from benchmarks.machine import machine
from benchmarks.watch import memory
from toolchain.artifacts import read_json, write_json

app = typer.Typer(add_completion=False, help=__doc__)

RESULTS = Path(__file__).parent / "results" / "serve_load.json"
PAGE = Path(__file__).parents[1] / "docs" / "serve.md"
HEADING = "## Load\n"
AT_ONCE, QUEUE = 200, 16
FLOODS = 10
PICTURES = 1000
PROBE_SECONDS = 0.02
"""Between two looks at /healthz. Each counts from when it was due, or a long one would hide the next ones."""
WARM_UP = 50
"""Pictures after which memory is looked at first."""
GENERATIONS = "/v1/images/generations"
PROMPT = "a red circle"


@app.command()
def measure(
    bundle: Annotated[Path | None, typer.Argument(help="Default: `shapes`, exported for it.")] = None,
    pictures: Annotated[int, typer.Option(help="To paint one after another.")] = PICTURES,
    steps: Annotated[int, typer.Option(help="Of each of these.")] = 2,
    port: Annotated[int, typer.Option(help="Of this machine.")] = 8765,
) -> None:
    """Start a server and ask much of it."""
    if bundle is None and not (bundle := Path("build") / "serve-bundle").exists():
        export = [sys.executable, "-m", "toolchain", "export", "shapes", "--output", str(bundle)]
        subprocess.run(export, check=True)
    command = [sys.executable, "-m", "toolchain", "serve", str(bundle), "--port", str(port)]
    process = subprocess.Popen([*command, "--queue", str(QUEUE)], stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(address)
        found = _flooded(address) | {"memory": _painted(address, process.pid, pictures, steps)}
    finally:
        process.terminate()
        status = process.wait(60)
    write_json(RESULTS, {"schema_version": 1, "machine": machine(), "exit_status": status, **found})
    print(found)


@app.command()
def table() -> None:
    """Write the end of docs/serve.md."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(HEADING)] + section(read_json(RESULTS)), encoding="utf-8")


def section(results: dict[str, Any]) -> str:
    """The end of docs/serve.md."""
    made_on, outcomes, memory = results["machine"], results["outcomes"], results["memory"]
    healthz, grown = results["healthz_ms"], memory["last_bytes"] - memory["first_bytes"]
    others = sum(outcomes.values()) - outcomes.get("200", 0) - outcomes.get("429", 0)
    lines = [
        HEADING,
        "Made by `python -m benchmarks.serve_load table` of what `python -m benchmarks.serve_load measure`",
        f"measured on {made_on['processor']}, {made_on['cores']} cores, with clients beside it, each",
        "in a process of its own. `/healthz` was due every 20 ms, and is timed from then.",
        "",
        "| | |",
        "|---|---|",
        (
            f"| {results['floods']} times {AT_ONCE} requests at once, a line of {QUEUE} | "
            f"{outcomes.get('200', 0)} pictures, {outcomes.get('429', 0)} told to come again, "
            f"{others} anything else |"
        ),
        (
            f"| `/healthz` meanwhile | median {healthz['p50']:.1f} ms, 95 % within {healthz['p95']:.1f} ms, "
            f"99 % within {healthz['p99']:.1f} ms, the longest {healthz['most']:.0f} ms |"
        ),
        (
            f"| {memory['pictures']} pictures one after another | {memory['first_bytes'] / 1e6:.1f} MB of "
            f"memory after the first {WARM_UP}, {grown / 1e6:+.1f} MB at the end |"
        ),
    ]
    return "\n".join(lines) + "\n"


def _flooded(address: str) -> dict[str, Any]:
    """What became of the floods, and how long /healthz took meanwhile."""
    flood = subprocess.Popen([sys.executable, "-m", __spec__.name, "flood", address], stdout=subprocess.PIPE)
    looks = []
    with httpx.Client(base_url=address, timeout=60) as client:
        due = time.monotonic()
        while flood.poll() is None:
            time.sleep(max(0.0, due - time.monotonic()))
            client.get("/healthz", headers={"Connection": "close"}).raise_for_status()
            looks.append((due, time.monotonic()))
            due += PROBE_SECONDS
    assert flood.stdout is not None
    floods = json.load(flood.stdout)
    delays = [
        1000 * (answered - due)
        for due, answered in looks
        if any(one["began"] <= due <= one["ended"] for one in floods)
    ]
    outcomes = sum((Counter(one["outcomes"]) for one in floods), Counter[str]())
    p50, p95, p99, most = (float(np.percentile(delays, share)) for share in (50, 95, 99, 100))
    return {
        "floods": len(floods),
        "outcomes": dict(outcomes),
        "healthz_ms": {"p50": p50, "p95": p95, "p99": p99, "most": most, "asked": len(delays)},
    }


@app.command()
def flood(address: Annotated[str, typer.Argument(help="Of a server.")]) -> None:
    """Ask for many pictures at once, some times over; prints what came of it as JSON."""
    print(json.dumps([asyncio.run(_flood(address)) for _ in range(FLOODS)]))


async def _flood(address: str) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        began = time.monotonic()
        statuses = await asyncio.gather(*(_status(client, seed) for seed in range(AT_ONCE)))
        return {"began": began, "ended": time.monotonic(), "outcomes": Counter(statuses)}


def _painted(address: str, process: int, pictures: int, steps: int) -> dict[str, int]:
    """Memory after the first pictures and after the last."""
    first = 0
    with httpx.Client(base_url=address, timeout=300) as client:
        for index in range(pictures):
            body = {"prompt": PROMPT, "steps": steps, "seed": index}
            client.post(GENERATIONS, json=body).raise_for_status()
            if index == WARM_UP:
                first = memory(process)["VmRSS"]
    return {"pictures": pictures, "first_bytes": first, "last_bytes": memory(process)["VmRSS"]}


def _wait_until_ready(address: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not become ready")


async def _status(client: httpx.AsyncClient, seed: int) -> str:
    """The status of an answer; a refusal counts only if it says when to come again."""
    answer = await client.post(GENERATIONS, json={"prompt": PROMPT, "seed": seed})
    if answer.status_code == 429 and not int(answer.headers.get("Retry-After", "0")) >= 1:
        return "429 without Retry-After"
    if answer.status_code == 200 and not answer.json()["data"][0]["b64_json"]:
        return "200 without a picture"
    return str(answer.status_code)


if __name__ == "__main__":
    app()
