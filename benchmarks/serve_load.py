"""A server under load: everyone gets a picture or is told when to come again, and its memory stays.

    python -m benchmarks.serve_load measure BUNDLE     # into benchmarks/results/serve_load.json
    python -m benchmarks.serve_load table              # writes the end of docs/serve.md

Two hundred requests come at once to a line of sixteen; then pictures are painted one after another.
"""

from __future__ import annotations

import asyncio
import statistics
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
PICTURES = 1000
WARM_UP = 50
"""Pictures after which memory is looked at first."""
GENERATIONS = "/v1/images/generations"


@app.command()
def measure(
    bundle: Annotated[Path, typer.Argument(help="Directory.")],
    pictures: Annotated[int, typer.Option(help="To paint one after another.")] = PICTURES,
    steps: Annotated[int, typer.Option(help="Of each.")] = 2,
    port: Annotated[int, typer.Option(help="Of this machine.")] = 8765,
) -> None:
    """Start a server and ask much of it."""
    command = [sys.executable, "-m", "toolchain", "serve", str(bundle), "--port", str(port)]
    process = subprocess.Popen([*command, "--queue", str(QUEUE)], stderr=subprocess.DEVNULL)
    try:
        found = asyncio.run(_ask(f"http://127.0.0.1:{port}", process.pid, pictures, steps))
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
    grown = memory["last_bytes"] - memory["first_bytes"]
    lines = [
        HEADING,
        "Made by `python -m benchmarks.serve_load table` of what `python -m benchmarks.serve_load measure`",
        f"measured on {made_on['processor']}, {made_on['cores']} cores, with clients on the same machine.",
        "",
        "| | |",
        "|---|---|",
        (
            f"| {AT_ONCE} requests at once, a line of {QUEUE} | {outcomes.get('200', 0)} pictures, "
            f"{outcomes.get('429', 0)} told to come again, {results['others']} anything else |"
        ),
        (
            f"| `/healthz` meanwhile | median {results['healthz_ms']['p50']:.1f} ms, "
            f"95 % within {results['healthz_ms']['p95']:.1f} ms |"
        ),
        (
            f"| {memory['pictures']} pictures one after another | {memory['first_bytes'] / 1e6:.1f} MB of "
            f"memory after the first {WARM_UP}, {grown / 1e6:+.1f} MB at the end |"
        ),
    ]
    return "\n".join(lines) + "\n"


async def _ask(address: str, process: int, pictures: int, steps: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=AT_ONCE + 10)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as client:
        await _until_ready(client)
        body = {"prompt": "a red circle", "steps": steps}
        flood = asyncio.gather(*(_status(client, body | {"seed": seed}) for seed in range(AT_ONCE)))
        delays = []
        while not flood.done():
            start = time.perf_counter()
            (await client.get("/healthz")).raise_for_status()
            delays.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(0.01)
        outcomes = Counter(await flood)
        first = 0
        for index in range(pictures):
            (await client.post(GENERATIONS, json=body | {"seed": index})).raise_for_status()
            if index == WARM_UP:
                first = memory(process)["VmRSS"]
        last = memory(process)["VmRSS"]
    clean = outcomes["200"] + outcomes["429"]
    p50, p95 = (float(np.percentile(delays, share)) for share in (50, 95))
    return {
        "outcomes": dict(outcomes),
        "others": AT_ONCE - clean,
        "healthz_ms": {"p50": p50, "p95": p95, "asked": len(delays), "mean": statistics.mean(delays)},
        "memory": {"pictures": pictures, "first_bytes": first, "last_bytes": last},
    }


async def _until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await client.get("/readyz")).status_code == 200:
                return
        except httpx.ConnectError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the server did not become ready")


async def _status(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The status of an answer; a refusal counts only if it says when to come again."""
    answer = await client.post(GENERATIONS, json=body)
    if answer.status_code == 429 and not int(answer.headers.get("Retry-After", "0")) >= 1:
        return "429 without Retry-After"
    if answer.status_code == 200 and not answer.json()["data"][0]["b64_json"]:
        return "200 without a picture"
    return str(answer.status_code)


if __name__ == "__main__":
    app()
