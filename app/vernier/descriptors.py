"""Every connection is a file descriptor: takes as many as the system's hard limit grants."""

from __future__ import annotations


def raise_descriptor_limit() -> None:
    """Raises this process's soft limit, and so that of processes it starts. Without effect outside of Unix.

    Many systems start services with a soft limit of 1,024 and a hard one far above it.
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS refuses an unlimited soft limit
        return
