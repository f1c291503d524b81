"""The package without its bank, until somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import longlive_rag_ops
from longlive_rag_ops import MemoryWindow
assert not [name for name in sys.modules if name.startswith("longlive_rag_ops.bank")], "imported with the package"
assert {"MemoryBank", "bank"} <= set(dir(longlive_rag_ops))
{use}
assert "longlive_rag_ops.bank.memory_bank" in sys.modules
"""


@pytest.mark.parametrize(
    "use",
    [
        "from longlive_rag_ops import BankConfig, MemoryBank",
        "from longlive_rag_ops import *; MemoryBank, PageFormat",
        "longlive_rag_ops.BankFull",
        "longlive_rag_ops.bank.Lost",
        "import longlive_rag_ops.bank",
    ],
)
def test_the_bank_is_imported_when_it_is_asked_for(use: str) -> None:
    subprocess.run([sys.executable, "-c", CODE.replace("{use}", use)], check=True)


def test_other_names_are_unknown() -> None:
    import longlive_rag_ops

    with pytest.raises(AttributeError, match="module 'longlive_rag_ops' has no attribute 'banks'"):
        longlive_rag_ops.banks  # noqa: B018
