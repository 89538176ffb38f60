"""Every object of a mirror is read, and those that are not what the list says are named."""

from __future__ import annotations

from pathlib import Path

from mlpmem_ds.core.objects.contents import directories_in
from mlpmem_ds.core.objects.push import Push
from mlpmem_ds.core.objects.store import Store
from mlpmem_ds.core.objects.verify import verify


def test_a_whole_mirror_has_no_fault_and_a_damaged_one_names_each(url: str, stage_dir: Path) -> None:
    store = Store(url)
    Push(directories_in(stage_dir)[0], store).send()
    verified = verify(store, flag="SOURCE")
    assert verified.faults == () and verified.num_files == 14
    content = store.read("part-1.npy")
    assert content is not None
    store.write("part-1.npy", content[:-1] + b"X")
    store.write("part-2.npy", content[:-1])
    store.remove("part-3.npy")
    assert verify(store, flag="SOURCE").faults == (
        f"{url}/part-1.npy does not have its checksum",
        f"{url}/part-2.npy has {len(content) - 1} bytes of {len(content)}",
        f"{url}/part-3.npy is missing",
    )
