"""Bars that show on standard error how far a recipe is."""

from __future__ import annotations

from daam.recipes.errors import extra

with extra():
    from tqdm import tqdm


class Progress(tqdm):
    """Show a bar of tqdm in a terminal; elsewhere, as in a file, write one line when it ends.

    It takes the arguments of tqdm. With leave=False and disable=None, nothing is written elsewhere.
    """

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar in a terminal whenever tqdm asks to, and elsewhere only when it ends."""
        if hasattr(self.fp, "isatty") and self.fp.isatty():
            super().display(msg, pos)
        elif self.disable:  # as tqdm sets it before it draws a bar for the last time, and ends the line
            self.fp.write(str(self))
