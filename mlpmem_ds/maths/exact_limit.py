"""Up to how many keys exact search is the right choice; for the flags too, which load no torch."""

MAX_KEYS_FOR_EXACT = {"cpu": 200_000, "cuda": 10_000_000}
"""device → keys that are compared with all keys in minutes, on two cores or one GPU; above, lists pay"""
