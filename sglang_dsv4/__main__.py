"""Entry of ``python -m sglang_dsv4``."""

from sglang_dsv4.cli import main

raise SystemExit(main())
