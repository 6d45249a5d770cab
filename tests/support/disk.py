"""A small file system of a test's own, which can be filled."""

from __future__ import annotations

import os
from pathlib import Path


def on_a_small_disk(disk: Path, kilobytes: int, then: str = 'exec "$@"') -> list[str]:
    """A command prefix: what follows sees a file system of that size at `disk`, in a mount namespace of its own.

    Args:
        then: shell text; `"$@"` is the command that follows.
    """
    disk.mkdir(exist_ok=True)
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mount = f"mount -t tmpfs -o size={kilobytes}k,mode=700 tmpfs '{disk}' || exit 99"
    return ["unshare", *user, "--mount", "sh", "-c", f"{mount}; {then}", "sh"]
