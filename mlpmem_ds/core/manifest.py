"""What a later stage reads of an earlier one's directory first: its manifest, and whether its files are all
there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import FileRecord, fault_of_file, read_json, sha256_of_file

_FRONT_ENDS = {
    "corpus": "prepare_corpus",
    "base": "train_base",
    "keys": "extract_keys",
    "index": "build_index",
    "targets": "write_targets",
    "memory": "train",
    "report": "evaluate",
}  # format → what writes it, for messages


def read_manifest(root: Path, *, stage: str, version: int, flag: str) -> tuple[dict[str, Any], str]:
    """Read the manifest of a complete stage and check that its files are all there, by size.

    Args:
        root: the stage's directory.
        stage: format name, such as "keys".
        version: the version that the caller understands.
        flag: how the user named the directory, for messages.

    Returns:
        the manifest and its SHA-256.

    Raises:
        UserError: missing, incomplete or of another kind.
        DamagedDataError: of another version, unreadable, or with a file missing or of another size.
    """
    path = root / "manifest.json"
    if not root.is_dir():
        raise UserError(f"{flag} {root} {'is a file' if root.exists() else 'does not exist'}{_remedy(stage)}")
    if not path.is_file():
        state = (
            "is not complete: run its stage again, it continues"
            if (root / "identity.json").is_file()
            else f"is not a directory of mlpmem {stage}{_remedy(stage)}"
        )
        raise UserError(f"{flag} {root} {state}")
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise DamagedDataError(
            f"{path} is damaged: not a JSON object; run its stage again, it writes it anew"
        )
    if manifest.get("format") != f"mlpmem-{stage}":
        raise UserError(f"{flag} {root} holds {manifest.get('format')}, not mlpmem-{stage}{_remedy(stage)}")
    if manifest.get("version") != version:
        raise DamagedDataError(
            f"{flag} {root} has version {manifest.get('version')}, this program reads {version}: "
            "use the release that wrote it, or remake it"
        )
    try:
        records = [FileRecord(**entry) for entry in manifest["files"]]
    except (KeyError, TypeError) as error:
        raise DamagedDataError(
            f"{path} is damaged: its list of files cannot be read; run its stage again, it writes it anew"
        ) from error
    for record in records:
        if fault := fault_of_file(root, record, checksum=False):
            raise DamagedDataError(
                f"{fault}: run the stage that made {root} again, it remakes only what is damaged"
            )
    return manifest, sha256_of_file(path)


def _remedy(stage: str) -> str:
    return f": give the output of {_FRONT_ENDS[stage]}" if stage in _FRONT_ENDS else ""
