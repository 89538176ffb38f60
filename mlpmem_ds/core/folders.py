"""Where a file lies among many of its kind: in one folder up to a thousand, above that a thousand a folder.

File systems slow down, or stop, at some millions of names in one directory, and a listing of it is one long
answer of one server.
"""

from __future__ import annotations

MAX_FILES = 1000
"""of a kind in a folder"""


def folder_of(number: int, count: int) -> str:
    """The folder of the file `number` of `count` files of a kind, with a slash at its end; "" up to 1,000.

    `folder_of(1234, 5000)` is "0001/".
    """
    if count <= MAX_FILES:
        return ""
    width = max(4, len(str((count - 1) // MAX_FILES)))
    return f"{number // MAX_FILES:0{width}d}/"
