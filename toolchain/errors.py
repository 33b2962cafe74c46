"""The one error of the PyTorch stage that is the user's to mend."""


class ToolchainError(ValueError):
    """Input that cannot be worked with. The text says what was wrong, what was there and what to do."""
