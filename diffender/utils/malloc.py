"""How the C library holds the memory that this process frees."""

import ctypes


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of giving each back to the kernel, which zeroes the next one page by
    page. Elsewhere, nothing."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for parameter in (trim_threshold, mmap_threshold):
        mallopt(parameter, 2**31 - 1)
