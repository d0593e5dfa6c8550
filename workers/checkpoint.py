"""Safetensors checkpoints: which file holds which tensor, and whether all is there in the right shape.

Reads headers only (8 bytes of length, then JSON) and imports no torch, so the launcher checks a model in milliseconds.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, NotFoundError
from .model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# The format's own bound; a longer header is garbage read as a length.
_MAX_HEADER_BYTES = 100_000_000
_NUM_NAMED = 3

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama checkpoint, by its Hugging Face name."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            shapes |= _linear(f"{layer}.self_attn.{name}", size, hidden, config.attention_bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", hidden, q_size, config.attention_bias)
        shapes |= _linear(f"{layer}.mlp.gate_proj", mlp, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.up_proj", mlp, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.down_proj", hidden, mlp, config.mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _linear(name: str, out_size: int, in_size: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_size, in_size)} | ({f"{name}.bias": (out_size,)} if bias else {})


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str  # as safetensors names it: "F32", "BF16"
    shape: tuple[int, ...]


def verify_checkpoint(path: str | Path, config: ModelConfig) -> None:
    """Raises CheckpointError, in one line, unless the directory holds exactly the model's tensors, in whole files."""
    verify_tensors(path, tensor_shapes(config))


def verify_tensors(path: str | Path, expected: Shapes) -> None:
    """As `verify_checkpoint`, for any model: `expected` are its tensors by name."""
    headers = read_headers(path)
    missing = [name for name in expected if name not in headers]
    extra = [name for name in headers if name not in expected and not _is_harmless(name, expected)]
    wrong = [
        f"{name} is {list(headers[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    not_float = [
        f"{name} is {headers[name].dtype}"
        for name in expected
        if name in headers and headers[name].dtype not in _FLOAT_DTYPES
    ]
    problems = [
        _list_problem("missing", missing),
        _list_problem("not of this model", extra),
        _list_problem("wrongly shaped", wrong),
        _list_problem("of a type that is not served", not_float),
    ]
    if found := "; ".join(filter(None, problems)):
        raise CheckpointError(
            f"checkpoint {path} does not fit its config.json: {found}; download it again, or correct config.json"
        )


def _list_problem(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _NUM_NAMED} more" if len(items) > _NUM_NAMED else ""
    return f"{len(items)} tensor(s) {what}: {', '.join(items[:_NUM_NAMED])}{more}"


def _is_harmless(name: str, expected: Shapes) -> bool:
    """Buffers that old exports wrote, and the head of a tied model, which is the embedding once more."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in expected)


def read_headers(path: str | Path) -> dict[str, TensorHeader]:
    """All tensors of a model directory by name. Raises NotFoundError or CheckpointError."""
    headers: dict[str, TensorHeader] = {}
    for file in checkpoint_files(path):
        for name, header in _read_file_header(file).items():
            if name in headers:
                raise CheckpointError(f"tensor {name} is in both {headers[name].file} and {file}")
            headers[name] = header
    return headers


def checkpoint_files(path: str | Path) -> list[Path]:
    """The safetensors files of a model directory: the single file if there is one, as transformers prefers it, else
    those of the index."""
    path = Path(path)
    if not path.is_dir():
        raise NotFoundError(f"model directory {path} does not exist; give a Hugging Face model directory")
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    if (path / INDEX_FILE).is_file():
        return _indexed_files(path)
    if any(path.glob("*.bin")):
        raise CheckpointError(
            f"{path} holds only .bin weights, which can run code when loaded; convert them to safetensors "
            "(transformers: from_pretrained(...).save_pretrained(...))"
        )
    raise CheckpointError(
        f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; download its weights, or use --load-format dummy"
    )


def _indexed_files(path: Path) -> list[Path]:
    try:
        index = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX_FILE} is malformed: it needs a weight_map of tensor to file") from error
    # A name with a folder in it could point outside of the model directory.
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{path / INDEX_FILE} names {bad[0]!r}, which is no file name of its own directory")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(names)} weight files: {_join_first(missing)}; download them"
        )
    return [path / name for name in names]


def _join_first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")


def _read_file_header(file: Path) -> dict[str, TensorHeader]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            encoded = _read_encoded_header(stream, file, size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(encoded)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        data_end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        parsed = {name: _parse_entry(file, entry) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _corrupt(file, "its header is malformed") from error
    if (expected_size := 8 + len(encoded) + data_end) != size:
        raise _corrupt(file, f"it has {size} bytes, and its header describes {expected_size}")
    return parsed


def _read_encoded_header(stream: BinaryIO, file: Path, size: int) -> bytes:
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
    if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
        raise _corrupt(file, "its header is cut off")
    return stream.read(length)


def _parse_entry(file: Path, entry: dict[str, Any]) -> TensorHeader:
    return TensorHeader(file, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))


def _corrupt(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is corrupt or truncated ({reason}); download or convert it again")
