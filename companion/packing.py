"""A model in as few bytes as its zeros and few distinct weights allow: Huffman coded, checked, without loss.

After Deep Compression (Han, Mao and Dally 2016): a tensor's non-zero weights are numbers in a table of the
values that there are, and each is found by how many zeros lie before it; both are coded by Huffman (zlib's).
A file holds numbers and shapes alone: nothing in it is executed.

    magic | checksum | length of the head | head (JSON: names, shapes, codings) | the tensors' bytes
"""

import copy
import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

MAGIC = b"APPACK1\n"
_CHECK_BYTES = 16
_MOST_VALUES = 256  # distinct values that fit into a byte
_FAR = 255  # in a list of gaps: 255 zeros, and no value after them
_TYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}


class PackingError(ValueError):
    """The file is damaged or of another model, or the model cannot be packed; the message says which."""


@dataclass(frozen=True)
class Packed:
    """What a packed file's bytes go into: name of the tensor -> bytes; `head_bytes` are names and shapes."""

    total_bytes: int
    head_bytes: int
    by_tensor: dict[str, int]


def pack(model: nn.Module, path: str | Path) -> Packed:
    """Writes the model's parameters and buffers, in one move; `unpack` gives the very same, bit for bit.

    A tensor of at most 256 distinct values becomes a table of them and the coded numbers of the entries.
    Others are stored as they are, in half the bytes where float16 holds them exactly. Raises PackingError for
    masks that are not permanent yet, and for other types of tensors.
    """
    state = model.state_dict()
    if masked := [name for name in state if name.endswith("_mask")]:
        raise PackingError(f"{masked[0]} is a mask: make it part of the weights first, by pruning.permanent")
    head, bodies = [], []
    for name, tensor in state.items():
        entry, body = _encoded(name, tensor.detach().cpu().contiguous())
        head.append(entry | {"name": name, "shape": list(tensor.shape), "bytes": len(body)})
        bodies.append(body)
    described = zlib.compress(json.dumps(head, separators=(",", ":")).encode(), 9)
    content = struct.pack("<I", len(described)) + described + b"".join(bodies)
    whole = MAGIC + hashlib.sha256(content).digest()[:_CHECK_BYTES] + content
    _write(Path(path), whole)
    return Packed(len(whole), len(whole) - sum(map(len, bodies)), {e["name"]: e["bytes"] for e in head})


def unpack(path: str | Path, like: nn.Module) -> nn.Module:
    """What `pack` wrote, in a copy of `like`, a model of the same architecture.

    The whole file is checked before anything is taken from it. Raises PackingError for a file that is
    truncated, damaged, no packed model, or of a model with other names or shapes.
    """
    whole = Path(path).read_bytes()
    if not whole.startswith(MAGIC):
        raise PackingError(f"{path} is not a packed model")
    check, content = whole[len(MAGIC) : len(MAGIC) + _CHECK_BYTES], whole[len(MAGIC) + _CHECK_BYTES :]
    if hashlib.sha256(content).digest()[:_CHECK_BYTES] != check:
        raise PackingError(f"{path} is damaged: its checksum is wrong")
    (length,) = struct.unpack_from("<I", content)
    described = zlib.decompress(content[4 : 4 + length])
    state, place = {}, 4 + length
    for entry in json.loads(described):
        body = content[place : place + entry["bytes"]]
        state[entry["name"]] = _decoded(entry, body)
        place += entry["bytes"]
    made = copy.deepcopy(like)
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        raise PackingError(f"{path} is of another model: {str(error).splitlines()[-1].strip()}") from error
    return made


def _encoded(name: str, tensor: torch.Tensor) -> tuple[dict, bytes]:
    """How a tensor is written, for the head of the file, and its bytes."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _TYPES:
        raise PackingError(f"{name} is {tensor.dtype}; only {', '.join(_TYPES)} can be packed")
    exact_half = kind == "float32" and torch.equal(tensor.half().float(), tensor)
    stored = (tensor.half() if exact_half else tensor).numpy().ravel()
    entry = {"kind": kind, "stored": str(stored.dtype)}
    stored = stored.view(f"u{stored.itemsize}")  # bits: 0.0 and -0.0 are two values
    ways = [({"parts": []}, stored.tobytes())]
    values, numbers = np.unique(stored, return_inverse=True)
    if 0 < len(values) <= _MOST_VALUES:
        ways.append(_joined(values, [numbers]))
        (places,) = np.nonzero(stored)
        there, numbers = np.unique(stored[places], return_inverse=True)
        ways.append(_joined(there, [_gaps(places), numbers]))
    coding, body = min(ways, key=lambda way: len(way[1]))
    return entry | coding, body


def _joined(values: np.ndarray, streams: list[np.ndarray]) -> tuple[dict, bytes]:
    """A table of values and the streams of bytes, each coded by Huffman, in one piece."""
    parts = [values.tobytes(), *(_huffman(stream.astype(np.uint8).tobytes()) for stream in streams)]
    return {"parts": [len(part) for part in parts]}, b"".join(parts)


def _huffman(content: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(content) + coder.flush()


def _gaps(places: np.ndarray) -> np.ndarray:
    """How many zeros lie before each place; long gaps begin with entries of `_FAR`."""
    found: list[int] = []
    for gap in np.diff(places, prepend=-1) - 1:
        found += [_FAR] * (gap // _FAR) + [gap % _FAR]
    return np.array(found, dtype=np.uint8)


def _decoded(entry: dict, body: bytes) -> torch.Tensor:
    size, stored = math.prod(entry["shape"]), np.dtype(entry["stored"])
    if not entry["parts"]:
        flat = np.frombuffer(body, stored)
    else:
        ends = np.cumsum(entry["parts"])
        table = np.frombuffer(body[: ends[0]], stored)
        streams = [zlib.decompress(body[a:b], -15) for a, b in itertools.pairwise(ends)]
        *gaps, numbers = (np.frombuffer(stream, np.uint8) for stream in streams)
        flat = table[numbers] if not gaps else _spread(size, table[numbers], gaps[0])
    if len(flat) != size:
        raise PackingError(f"{entry['name']} has {len(flat)} values, not those of {entry['shape']}")
    return torch.from_numpy(flat.copy()).to(_TYPES[entry["kind"]]).view(entry["shape"])


def _spread(size: int, values: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """The values at their places `[size]`, zeros between them."""
    steps = np.where(gaps == _FAR, _FAR, gaps.astype(np.int64) + 1)
    places = (np.cumsum(steps) - 1)[gaps != _FAR]
    flat = np.zeros(size, values.dtype)
    flat[places] = values
    return flat


def _write(path: Path, whole: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(whole)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
