"""What starts of a configuration found out on this machine, for those that follow: the compiled kernels that it needs,
the CUDA graphs that are worth having, the KV blocks that fit.

A rank that takes the place of a dead one, and a new group beside others, would find out the same again: 3.5 s of the 5
that an 8B model takes an H100 once its kernels are compiled. A file for each configuration lies with Triton's cache,
since what it says of kernels holds for that cache alone.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import triton

from ..proto import worker_pb2
from .model_config import ModelConfig
from .models.registry import registered_architectures
from .parallel import TensorParallel

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent.parent
_NEEDED_SUFFIXES = (".cubin", ".json")  # of the files of a compiled kernel
# Another process on the GPU shows in its free memory; what the same start leaves differs by a few MiB.
_MOST_OFF_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a start measured: the same on all ranks of a group."""

    num_blocks: int  # of the KV cache
    segments: tuple[int, ...]  # tokens of the buckets of SegmentGraphs
    decodes: tuple[int, ...]  # rows of those of DecodeGraphs

    @property
    def fingerprint(self) -> int:
        """Over 0."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=7).digest()
        return int.from_bytes(digest) + 1


class StartRecord:
    """One configuration's file. One that cannot be read is as none; one that cannot be written costs later starts time,
    and the log has a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = _read(path)

    @classmethod
    def of(cls, request: worker_pb2.ConfigureRequest, tp: TensorParallel) -> Self:
        """Of what `request` describes, on a CUDA device. Raises CheckpointError for a model that is not served."""
        config = type(request.config)()
        config.CopyFrom(request.config)
        config.store_address, config.seed = "", 0
        properties = torch.cuda.get_device_properties(tp.device)
        described = (
            *(_hash_of_sources(), torch.__version__, triton.__version__),
            *(properties.name, properties.total_memory, tp.symmetric_memory is not None),
            *(tp.rank, tp.size, config.SerializeToString(deterministic=True)),
            ModelConfig.from_directory(config.model_path, registered_architectures()),
        )
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16).hexdigest()
        return cls(Path(triton.knobs.cache.dir) / f"octavo-{digest}.json")

    # Kernels

    @property
    def has_kernels(self) -> bool:
        """Whether all that the configuration needs are known, and in Triton's cache."""
        files = self._content.get("kernels", [])
        return bool(files) and all((self._path.parent / file).exists() for file in files)

    @contextmanager
    def noting_kernels(self) -> Iterator[None]:
        """What Triton compiles or finds in its cache meanwhile, on any thread, is what the configuration needs."""
        files: set[str] = set()

        def note(*, metadata_group: dict[str, str], **rest: object) -> None:
            del rest
            files.update(path for path in metadata_group.values() if path.endswith(_NEEDED_SUFFIXES))

        before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = note
        try:
            yield
        finally:
            triton.knobs.compilation.listener = before
        self._content["kernels"] = sorted(os.path.relpath(path, self._path.parent) for path in files)
        self._write()

    # Sizes

    def agreed_sizes(self, tp: TensorParallel, free_bytes: int | None) -> Sizes | None:
        """Those of the last start, if all ranks have the same; all at once. `free_bytes`: on the device before the
        weights are loaded, which must be about what it was then; None if they have been there since."""
        sizes = self._sizes(free_bytes)
        fingerprint = sizes.fingerprint if sizes is not None else 0
        least, most = tp.min_int(fingerprint), -tp.min_int(-fingerprint)
        return sizes if least == most else None

    def _sizes(self, free_bytes: int | None) -> Sizes | None:
        found = self._content.get("sizes")
        if not found:
            return None
        off_bytes = 0 if free_bytes is None else free_bytes - self._content["free_bytes"]
        if abs(off_bytes) > _MOST_OFF_BYTES:
            _log.info("the device has %d MiB more free than at the last start: measuring again", off_bytes >> 20)
            return None
        return Sizes(found["num_blocks"], tuple(found["segments"]), tuple(found["decodes"]))

    def note_sizes(
        self, num_blocks: int, segments: Sequence[int], decodes: Sequence[int], free_bytes: int | None
    ) -> None:
        """As in Sizes. `free_bytes` as in `agreed_sizes`: without, what an earlier start found stays."""
        self._content["sizes"] = asdict(Sizes(num_blocks, tuple(segments), tuple(decodes)))
        self._content["free_bytes"] = self._content.get("free_bytes", 0) if free_bytes is None else free_bytes
        self._write()

    def forget_sizes(self) -> None:
        """They were too large."""
        self._content.pop("sizes", None)
        self._write()

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(self._content, file)
            Path(file.name).replace(self._path)
        except OSError as error:
            _log.warning("what this start found out is not kept: %s", error)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def _hash_of_sources() -> str:
    """Other kernels or another way to measure make other records."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in ("kernels", "workers"):
        for file in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
