"""What is done with a bundle: run, serve, verify, sign, push, pull, bench."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal
from rich.logging import RichHandler
from rich.table import Column, Table

from deploy.errors import DeployError
from toolchain.cli.shell import Json, Seed, app, bars, console, emit, print_

if TYPE_CHECKING:
    from deploy.bench import Bench

Address = Annotated[str, typer.Argument(help="hf://owner/name[@revision] or oci://registry/repository:tag.")]
PublicKey = Annotated[
    Path | None,
    typer.Option(help="Public key, in PEM: a bundle that it did not sign is refused."),
]
OnRuntime = Annotated[
    str | None, typer.Option(help="What has to run it, as onnxruntime-cpu; default: the best.")
]


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("out.png"),
    negative_prompt: Annotated[str, typer.Option(help="What not to paint.")] = "",
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less is none.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    count: Annotated[int, typer.Option("--num-images", "-n", help="Pictures, side by side.", min=1)] = 1,
    seed: Seed = 0,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Variant to run; default: the best that runs here.")
    ] = None,
    runtime: OnRuntime = None,
    keep: Annotated[
        Literal["all", "one"] | None,
        typer.Option(help="Parts that stay in memory; default: all, if they fit into what is free."),
    ] = None,
    key: PublicKey = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Refuse to run without a --key to check with.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Paint a picture with a bundle; needs only the `edge` extra."""
    if require_signature and key is None:
        raise DeployError("--require-signature needs the public key of whoever is trusted: --key public.pem")

    from deploy.pipeline import EdgePipeline

    # Why this variant, what is prepared, what of a prompt was left out.
    logging.basicConfig(
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_level=False, show_path=False)],
    )
    logging.getLogger("deploy").setLevel(logging.INFO)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise DeployError(f"cannot write {output}: it is a directory or lies in none; choose another -o")
    pipeline = EdgePipeline.open(bundle, target=target, runtime=runtime, keep=keep, key=key)
    with bars() as bar:
        advance = bar("sampling", steps or pipeline.bundle.manifest.defaults.num_inference_steps)
        result = pipeline(
            prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_images=count,
            seed=seed,
            on_step=lambda *_: advance(),
        )
    from deploy.pipeline import save_png

    save_png(result.images, output)
    facts = {"output": str(output), "variant": asdict(result.variant), "timings_ms": result.timings_ms}
    emit(facts, as_json, lambda: print_(f"{output}  ({result.variant.target}, {result.variant.runtime})"))


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients send; or set HPTOOL_TOKEN.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen to other machines without a token.")
    ] = False,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come again later.", min=0)
    ] = 16,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request is given up, waiting included.", min=1)
    ] = 300,
    grace: Annotated[
        float, typer.Option(help="Seconds for the picture being painted when the server is to stop.", min=0)
    ] = 30,
    max_images: Annotated[int, typer.Option(help="Pictures of one request.", min=1)] = 4,
    max_steps: Annotated[int, typer.Option(help="Sampling steps of a picture.", min=1)] = 100,
    max_size: Annotated[
        int | None,
        typer.Option(help="Pixels of the largest height and width; default: what the model can.", min=1),
    ] = None,
    max_prompt: Annotated[int, typer.Option(help="Characters of a prompt.", min=1)] = 4000,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Variant to run; default: the best that runs here.")
    ] = None,
    keep: Annotated[
        Literal["all", "one"] | None,
        typer.Option(help="Parts that stay in memory; default: all, if they fit into what is free."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of onnxruntime; default: one for every core.", min=1)
    ] = None,
) -> None:
    """Serve a bundle over HTTP: OpenAI's images API and a web page; needs the `serve` extra."""
    from deploy.gate import read_token
    from deploy.images_api import Limits
    from deploy.pipeline import EdgePipeline
    from deploy.server import serve as serve_bundle

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("deploy").setLevel(logging.INFO)
    limits = Limits(
        queue=queue,
        timeout_seconds=timeout,
        grace_seconds=grace,
        images=max_images,
        steps=max_steps,
        side=max_size,
        prompt_characters=max_prompt,
    )
    serve_bundle(
        bundle,
        lambda: EdgePipeline.open(bundle, target=target, keep=keep, threads=threads),
        limits=limits,
        host=host,
        port=port,
        token=read_token(token_file),
        insecure=insecure,
        on_listen=lambda address: print_(f"Serving {bundle} on {address}"),
    )


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Check that a bundle is whole and unchanged, and with a key that it is from whom you trust."""
    from deploy.bundle import MANIFEST, SIGNATURE, open_bundle
    from deploy.signature import open_signed_bundle

    opened = open_bundle(bundle) if key is None else open_signed_bundle(bundle, key)
    if key is not None:
        signature = f"made with the key of {key}"
    else:
        signature = "not checked, no --key" if (bundle / SIGNATURE).exists() else "none"
    files = opened.manifest.files

    def show() -> None:
        table = Table("file", "bytes", "sha256", title=f"bundle {bundle}")
        for name, file in files.items():
            table.add_row(name, f"{file.bytes:,}", file.sha256[:16])
        print_(table)
        print_(f"{MANIFEST}: schema {opened.manifest.schema_version}, its parts agree")
        print_(f"{len(files)} files: all listed, none missing, added or changed; no links")
        print_(f"signature: {signature}")

    facts = {
        "bundle": str(bundle),
        "schema_version": opened.manifest.schema_version,
        "signature": {"checked": key is not None, "present": (bundle / SIGNATURE).exists()},
        "provenance": asdict(opened.manifest.provenance),
        "files": {name: asdict(file) for name, file in files.items()},
    }
    emit(facts, as_json, show)


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    key: Annotated[Path, typer.Option(help="Private key of an elliptic curve, in PEM.")],
    as_json: Json = False,
) -> None:
    """Sign a bundle, so that devices can tell it from one that somebody else made."""
    from deploy.bundle import SIGNATURE
    from deploy.signature import sign_bundle

    sign_bundle(bundle, key, password=os.environ.get("HPTOOL_KEY_PASSWORD"))
    written = str(bundle / SIGNATURE)
    emit({"signature": written}, as_json, lambda: print_(written))


@app.command()
def push(
    source: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Of a bundle, or of a student that `compress` wrote.")
    ],
    destination: Address,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository on the hub that only you see.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a bundle on the Hugging Face hub or in a registry of containers, or a student on the hub."""
    from deploy.bundle import MANIFEST
    from deploy.transfer import push_bundle, push_files

    place = destination.removeprefix("hf://").partition("@")[0]
    if (source / "model_index.json").exists() and not (source / MANIFEST).exists():
        from toolchain.publish import student_files

        files = student_files(source, place)
        push_files(files, destination, message=f"hptool push {source.resolve().name}", private=private)
        facts = {"student": str(source), "destination": destination, "files": sorted(files)}
        emit(facts, as_json, lambda: print_(f"Use it:  hptool export {place}"))
        return
    with bars() as bar:
        push_bundle(source, destination, private=private, bar=bar)
    facts = {"bundle": str(source), "destination": destination}
    emit(facts, as_json, lambda: print_(f"Fetch it:  hptool pull {destination} {source.resolve().name}"))


@app.command()
def pull(
    source: Address,
    directory: Annotated[Path, typer.Argument(help="New directory for the bundle.")],
    key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Fetch a bundle, check it, and only then give it its name."""
    from deploy.transfer import pull_bundle

    with bars() as bar:
        bundle = pull_bundle(source, directory, key=key, bar=bar)
    size = sum(file.bytes for file in bundle.manifest.files.values())
    facts = {"bundle": str(directory), "bytes": size, "signature_checked": key is not None}
    emit(facts, as_json, lambda: print_(f"{directory}  ({decimal(size)})"))


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    prompt: Annotated[str, typer.Argument(help="What to paint.")] = "a photo of a red bicycle",
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    repeats: Annotated[int, typer.Option(help="Pictures after the first.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Default: one for every core.", min=1)] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Variant to run; default: the best that runs here.")
    ] = None,
    runtime: OnRuntime = None,
    as_json: Json = False,
) -> None:
    """Measure how long pictures take here, part by part; needs only the `edge` extra."""
    from deploy.bench import run_bench

    with bars() as bar:
        advance = bar("painting", 1 + repeats)
        found = run_bench(
            bundle,
            target=target,
            runtime=runtime,
            prompt=prompt,
            steps=steps,
            height=height,
            width=width,
            repeats=repeats,
            threads=threads,
            on_picture=advance,
        )
    emit(asdict(found), as_json, lambda: _show_bench(found))


def _show_bench(found: Bench) -> None:
    title = f"{found.width} x {found.height}, {found.steps} steps, {found.target} ({found.runtime})"
    headings = (Column(text, justify="right") for text in ("p50, ms", "p95, ms", "fewest, ms"))
    table = Table("", *headings, title=title)
    for name, spread in found.parts_ms.items():
        times = (spread.p50, spread.p95, spread.fewest)
        table.add_row(name.replace("_", " "), *(f"{item:.1f}" for item in times))
    print_(table)
    peak = "" if found.peak_bytes is None else f"; at most {decimal(found.peak_bytes)} of memory"
    print_(
        f"{found.repeats} pictures after the first, which took {found.cold_ms / 1000:.1f} s from nothing"
        f"{peak}."
    )
