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
        if "--json" in sys.argv:
            print(json.dumps({"error": message}))
        else:
            print(message, file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
