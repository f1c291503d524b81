"""The folder that results are written to."""

import tempfile
from pathlib import Path

__all__ = ["prepare_folder"]


def prepare_folder(out: Path) -> None:
    """Makes a folder where there is none; ValueError, of ``--out``, where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(
            f"--out: got {str(out)!r}, which cannot be written ({error.strerror or error}); it must be a folder that "
            "exists or can be made"
        ) from error
