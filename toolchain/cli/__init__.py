"""The `hptool` command: every command is a typed signature, one call and one rendered result."""

# In the order of the help.
from toolchain.cli import compressing, recipes, exporting, device, machines, reporting  # isort: skip
from toolchain.cli.shell import app, main

__all__ = ["app", "compressing", "device", "exporting", "machines", "main", "recipes", "reporting"]
