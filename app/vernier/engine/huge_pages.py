"""Large memory in huge pages: a model that reads all its weights for every batch waits less for addresses.

With pages of 4 KiB a processor remembers the addresses of some megabytes (its TLB); whoever goes through more looks
up every page again, on virtual machines in two tables, and turns what others had remembered out. ONNX Runtime's
memory lies in such pages wherever the system gives huge ones only to those who ask (`madvise`, the default of most
distributions). MADV_COLLAPSE (madvise(2), Linux 6.1) moves memory that is in use into huge pages at once.
"""

from __future__ import annotations

import os
from ctypes import c_size_t, c_void_p
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import numpy as np

from vernier.heap import c_function

_MADV_COLLAPSE = 25
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS = Path("/proc/self/maps")
_PAGEMAP = "/proc/self/pagemap"
_ENTRY_BYTES = 8  # of the page map, for each page
_PRESENT = 1 << 63
#: How much of a huge page must be in use: what is not is taken from the system too.
_FULL = 0.9
#: Huge pages that are looked at together.
_AT_ONCE = 512


def use_huge_pages() -> int:
    """Moves this process's memory, where it is in use without holes, into huge pages.

    Other threads go on meanwhile, and each page is moved at once. Nothing happens where the administrator has turned
    huge pages off (`never`), where the system has none left, or does not know how.

    Returns:
        Bytes in huge pages now, of those that were looked at.
    """
    size = _huge_page_bytes()
    madvise = c_function("madvise")
    if size is None or madvise is None:
        return 0
    try:
        full = list(_full(size))
    except OSError:  # no /proc, or nobody may read it
        return 0
    return sum(size for at in full if madvise(c_void_p(at), c_size_t(size), _MADV_COLLAPSE) == 0)


def _huge_page_bytes() -> Optional[int]:
    """None where there are none to be had."""
    try:
        if "[never]" in (_SYSTEM / "enabled").read_text("ascii"):
            return None
        return int((_SYSTEM / "hpage_pmd_size").read_text("ascii"))
    except (OSError, ValueError):
        return None


def _full(size: int) -> Iterator[int]:
    """Addresses where a huge page could begin that would be full."""
    page = os.sysconf("SC_PAGE_SIZE")
    pages = size // page
    with open(_PAGEMAP, "rb", buffering=0) as pagemap:
        for start, stop in _anonymous():
            first, last = -(-start // size) * size, stop // size * size
            for at in range(first, last, _AT_ONCE * size):
                count = min(_AT_ONCE, (last - at) // size)
                entries = os.pread(
                    pagemap.fileno(), _ENTRY_BYTES * pages * count, _ENTRY_BYTES * (at // page)
                )
                present = np.frombuffer(entries, np.uint64) & np.uint64(_PRESENT) != 0
                share = present[: len(present) // pages * pages].reshape(-1, pages).mean(axis=1)
                yield from (at + size * int(place) for place in np.flatnonzero(share >= _FULL))


def _anonymous() -> List[Tuple[int, int]]:
    """Memory of this process alone that is no file: heaps and what was allocated beside them (proc(5))."""
    found = []
    for line in _MAPS.read_text("utf-8", errors="replace").splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access.startswith("rw") and access.endswith("p") and inode == "0" and _is_heap(name):
            start, _, stop = addresses.partition("-")
            found.append((int(start, 16), int(stop, 16)))
    return found


def _is_heap(name: List[str]) -> bool:
    return not name or name[0].strip() == "[heap]" or name[0].startswith("[anon")
