"""Up to how many keys exact search is the right choice; for the flags too, which load no torch."""

MAX_KEYS_FOR_EXACT = {"cpu": 200_000, "cuda": 10_000_000}
"""device → keys that are compared with all keys in minutes, on two cores or one GPU; above, lists pay"""


def max_keys_for_exact(device: str, key_bytes: int = 0, device_bytes: int = 0) -> int:
    """Up to how many keys of so many bytes exact search is the right choice on a kind of device, "cpu" or
    "cuda", with so many bytes of memory (0: not known).

    A GPU must hold all keys in half of its memory: they come from the host more slowly than they are
    compared.
    """
    limit = MAX_KEYS_FOR_EXACT[device]
    if device == "cpu" or not key_bytes or not device_bytes:
        return limit
    return min(limit, device_bytes // 2 // key_bytes)
