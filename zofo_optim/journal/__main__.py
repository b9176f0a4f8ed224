"""``python -m zofo_optim.journal info|verify|replay``."""

from .cli import main

raise SystemExit(main())
