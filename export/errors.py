"""The one error of the export stage that is the user's to mend."""

from __future__ import annotations


class ExportError(ValueError):
    """A model that cannot be exported as asked; the text says what was wrong, what was there, what to do."""
