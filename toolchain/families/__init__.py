"""One view of a text-to-image MMDiT for every stage, whatever its family."""

from toolchain.families.view import GenerationDefaults, Model, open_model

__all__ = ["GenerationDefaults", "Model", "open_model"]
