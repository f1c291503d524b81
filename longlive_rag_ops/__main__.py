"""``python -m longlive_rag_ops``: the same program as ``longlive-rag``."""

import sys

from .cli import main

sys.exit(main())
