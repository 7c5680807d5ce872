"""``python -m stent`` is the command ``stent``."""

from __future__ import annotations

from stent.cli.main import main

if __name__ == "__main__":
    main(prog_name="stent")
