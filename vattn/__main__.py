"""``python -m vattn``: the same as the ``vattn`` command."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
