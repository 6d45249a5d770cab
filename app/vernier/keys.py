"""`python -m vernier.keys NAME`: makes a random key and prints it with the entry for the service's key file."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence

from vernier.api.auth.security import digest_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vernier.keys", description=__doc__)
    parser.add_argument("name", help="whose key it is, such as front-end")
    name = parser.parse_args(arguments).name
    key = secrets.token_urlsafe(32)
    sys.stdout.write(
        f"Give this key to {name}; it is kept nowhere:\n\n    {key}\n\n"
        f"Add this to the file that VERNIER_API_KEYS_FILE names:\n\n"
        f'    [[key]]\n    name = "{name}"\n    sha256 = "{digest_of(key)}"\n'
    )


if __name__ == "__main__":
    main()
