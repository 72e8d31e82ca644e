"""`python -m fp8lab` is the command line."""

from .cli import main

raise SystemExit(main())
