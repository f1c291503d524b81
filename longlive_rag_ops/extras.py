"""Optional dependencies, asked for where they are used."""

import importlib
from types import ModuleType

__all__ = ["need"]


def need(module: str, purpose: str, extra: str = "demo") -> ModuleType:
    """Imports ``module``, or says which extra of the package installs it.

    Raises:
        RuntimeError: the module cannot be imported; the message names the module, the purpose and the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise RuntimeError(
            f"{purpose} needs the Python module {package!r}, which could not be imported ({error}); "
            f'pip install "longlive-rag-ops[{extra}]" installs it'
        ) from error
