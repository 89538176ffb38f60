"""Directories of ours in an object store: at any URL that fsspec opens (`s3:`, `gs:`, `file:`, `memory:`).

A *mirror* is a directory at a URL: the same files under the same names, and `.mirror/`, which says what they
are (`listing.py`). It is whole when `.mirror/files.json` is there, the last object that is written.

- `urls.py`: which words of a command line are URLs
- `store.py`: the objects below a URL, and errors in words; the one file that uses fsspec; `locks.py`: for
  threads at one path
- `parts.py`: a large file sent to S3 in parts, of which finished ones are not sent again
- `contents.py`: the files of a local directory, and what its records say of them
- `listing.py`: what a mirror holds, and whose it is
- `journal.py`: what was sent, for a push that was interrupted
- `push.py`, `fetch.py`, `verify.py`: a directory to a URL, files from a URL, and whether all are as they were
- `cache.py`: what is read from URLs, on a local disk, up to a size; `homes.py`: a directory of it, how much
  it counts for and who uses it; `on_demand.py`: files of it that are fetched when they are first read
- `inputs.py`: the URLs among a command's flags, replaced by directories of the cache
"""
