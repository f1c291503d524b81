"""An error on its way to other processes."""

from __future__ import annotations

import pickle


def sent_error(error: BaseException) -> BaseException:
    """The error, if other processes can have it; else a RuntimeError that says what it was."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
