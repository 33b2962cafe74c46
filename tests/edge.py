"""Check an environment that holds `hptool[edge]` alone; `make test-edge` makes one and runs this in it.

    python tests/edge.py [BUNDLE]

Given a bundle, it paints with it too.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import distributions
from pathlib import Path

import deploy
from deploy.errors import DeployError

UNWANTED = {"accelerate", "diffusers", "nncf", "onnx", "onnxscript", "scipy", "torch", "transformers"}
HPTOOL = str(Path(sysconfig.get_path("scripts")) / "hptool")


def main(bundles: list[str]) -> None:
    unwanted = {found.name for found in distributions()} & UNWANTED
    assert not unwanted, f"the edge extra installs {sorted(unwanted)}"

    for module in pkgutil.walk_packages(deploy.__path__, "deploy."):
        try:
            importlib.import_module(module.name)
        except DeployError as error:  # what serves is an extra of its own
            if "pip install 'hptool[serve]'" not in str(error):
                raise

    subprocess.run([HPTOOL, "--help"], check=True, stdout=subprocess.DEVNULL)

    with tempfile.TemporaryDirectory() as directory:
        command = [HPTOOL, "run", directory, "a red circle", "--output", f"{directory}/picture.png"]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode != 0, "an empty directory was taken for a bundle"
        assert "manifest.json" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr, refused.stderr

        for bundle in bundles:
            picture = Path(directory) / "picture.png"
            command[2] = bundle
            subprocess.run(command, check=True)
            assert picture.read_bytes().startswith(b"\x89PNG"), f"{bundle} painted no PNG"


if __name__ == "__main__":
    main(sys.argv[1:])
