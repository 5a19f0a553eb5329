"""Files of pictures: which there may be, and writing one whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = (".png", ".pdf", ".svg", ".jpg")


def require_new_picture(name: str) -> Path:
    """The file that `--plot` names. Raises InputError where it is there, or of no kind that we draw."""
    file = require_new_file(name)
    if file.suffix.lower() not in _KINDS:
        raise InputError(f"--plot {file}: the name of a picture ends in {', '.join(_KINDS)}")
    return file


def save_figure(figure: "Figure", file: Path) -> None:
    """Writes it beside its place and moves it there."""
    draft = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        figure.savefig(draft, dpi=120, format=file.suffix[1:].lower())
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
