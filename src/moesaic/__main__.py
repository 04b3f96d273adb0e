"""``moesaic`` and ``python -m moesaic``."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Runs the command line and exits with its code; without the ``bench`` extra it says how to install it."""
    try:
        from moesaic.bench.cli import main as run
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        message = 'the command line needs tyro: pip install "moesaic[bench]"'
        print(json.dumps({"error": message}) if "--json" in sys.argv else message, file=_stream())
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


def _stream() -> object:
    return sys.stdout if "--json" in sys.argv else sys.stderr


if __name__ == "__main__":
    main()
