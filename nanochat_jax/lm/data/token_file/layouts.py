"""Layouts of token files: type, place and number of ids, from headers and neighbours.

llm.c      256 int32, magic number, version and count, then the ids
npy        the header of NumPy, one axis of any little-endian integer type
megatron   ids without header, and `X.idx` beside `X.bin` with type and lengths
datatrove  ids without header, `X.ds.metadata` with the width, `X.ds.index` with ends
raw        ids without header, of the type that is said, else uint32
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.config import TokenDtype, TokenFormat, schema
from nanochat_jax.lm.data.token_file import foreign

_LLM_C_HEADER = 256 * 4
# Type of the ids, by magic number and version of the header.
_LLM_C: dict[tuple[int, int], TokenDtype] = {
    (20240520, 1): "uint16",
    (20240801, 7): "uint32",
}
# Magic numbers of llm.c are dates.
_LLM_C_DATES = range(20240101, 20301231)
_NPY_MAGIC = b"\x93NUMPY"
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_HEADER = 34
_MEGATRON_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16",
}  # fmt: skip
_DATATROVE_DTYPES = {1: "uint8", 2: "uint16", 4: "uint32"}


class Layout(NamedTuple):
    """Where the ids of a file are, as far as the file and its neighbours tell.

    Attributes:
      format: Name of the format.
      source: What tells type and number, for messages.
      dtype: Type of the ids, if told.
      offset: Byte at which they begin.
      length: Number of ids, if told.
      documents: Number of documents, if told.
    """

    format: TokenFormat
    source: str = "its name"
    dtype: str | None = None
    offset: int = 0
    length: int | None = None
    documents: int | None = None


def find_layout(
    path: Path, token_format: TokenFormat | None, token_dtype: TokenDtype | None
) -> Layout:
    """Returns the layout of a token file.

    Args:
      path: The file.
      token_format: Its format; recognised if not given.
      token_dtype: Type of the ids, if said.

    Raises:
      ValueError: If it is no token file, not of that format, or broken.
    """
    if token_format is not None:
        layout = _READERS[token_format](path)
        if layout is None:
            raise ValueError(f"{path}: {_WANTED[token_format]}.")
        return layout
    for reader in (_npy, _llm_c, _megatron, _datatrove):
        if (layout := reader(path)) is not None:
            return layout
    if found := foreign.recognise(path, text=token_dtype != "uint8"):
        raise ValueError(
            f"{path}: is no token file, but {found.name}. {found.advice}. If these are "
            "plain ids all the same, set `token_format` to raw."
        )
    return Layout("raw")


def _raw(path: Path) -> Layout:
    return Layout("raw")


def _llm_c(path: Path) -> Layout | None:
    head = np.fromfile(path, "<i4", count=3).tolist()
    size = path.stat().st_size - _LLM_C_HEADER
    if len(head) < 3 or size < 0:
        return None
    magic, version, count = head
    dtype = _LLM_C.get((magic, version))
    if dtype is None:
        schema.require(
            (
                magic not in _LLM_C_DATES or not 0 <= version < 100,
                f"{path}: has a header of llm.c with the magic number {magic} and "
                f"version {version}. Token files have {[*_LLM_C]}; files of "
                "evaluations and of models hold no plain ids.",
            )
        )
        return None
    if dtype == "uint16" and size == count:
        dtype = "uint8"  # protein models keep bytes under the same header
    return Layout("llm.c", "its header", dtype, _LLM_C_HEADER, count)


def _npy(path: Path) -> Layout | None:
    with path.open("rb") as file:
        if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            return None
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(file)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}: the header of NumPy cannot be read: {error}."
            ) from None
        offset = file.tell()
    schema.require(
        (
            dtype.kind in "iu",
            f"{path}: is an array of {dtype}, and ids must be integers.",
        ),
        (
            dtype.itemsize == 1 or dtype.newbyteorder("<") == dtype,
            f"{path}: is big-endian, {dtype.str}. Write it with "
            "`numpy.save(path, ids.astype(ids.dtype.newbyteorder('<')))`.",
        ),
        (
            len(shape) == 1,
            f"{path}: has the shape {shape}, and ids must have one axis. If its rows "
            "go on in one another and have no padding, write `ids.reshape(-1)`.",
        ),
    )
    return Layout("npy", "its header", dtype.name, offset, *shape)


def _megatron(path: Path) -> Layout | None:
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return None
    with index.open("rb") as file:
        head = file.read(_MEGATRON_HEADER)
    if not head.startswith(_MEGATRON_MAGIC):
        return None
    schema.require((len(head) == _MEGATRON_HEADER, f"{index}: is cut short."))
    version = int.from_bytes(head[9:17], "little")
    dtype = _MEGATRON_DTYPES.get(head[17])
    count, documents = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    size = _MEGATRON_HEADER + 12 * count + 8 * documents
    schema.require(
        (version == 1, f"{index}: has version {version}, and only 1 is read."),
        (dtype is not None, f"{index}: ids of the type {head[17]} are no integers."),
        (
            index.stat().st_size == size,
            f"{index}: has {index.stat().st_size} bytes, and its header says {size}.",
        ),
    )
    lengths = np.fromfile(index, "<i4", count, offset=_MEGATRON_HEADER)
    length = int(lengths.sum(dtype=np.int64))
    return Layout("megatron", index.name, dtype, 0, length, documents - 1)


def _datatrove(path: Path) -> Layout | None:
    metadata, index = (
        path.with_name(path.name + end) for end in (".metadata", ".index")
    )
    if path.suffix != ".ds" or not (metadata.is_file() or index.is_file()):
        return None
    length = documents = None
    if index.is_file():
        documents, rest = divmod(index.stat().st_size, 8)
        schema.require(
            (documents > 0 and rest == 0, f"{index}: is empty or cut short.")
        )
        length = int(np.fromfile(index, "<u8", 1, offset=8 * (documents - 1))[0])
    if metadata.is_file():
        text = metadata.read_text(encoding="utf-8", errors="replace")
        width = text.partition("\n")[0].rpartition("|")[2].strip()
        source, dtype = (
            metadata.name,
            _DATATROVE_DTYPES.get(int(width) if width.isdecimal() else 0),
        )
        where = f"{metadata}: its first line must end in |1, |2 or |4"
    else:
        width = path.stat().st_size // max(length or 0, 1)
        source, dtype = index.name, _DATATROVE_DTYPES.get(width)
        where = f"{index}: {length} ids make {width} bytes an id in {path}"
    schema.require((dtype is not None, f"{where}, the bytes of an id."))
    return Layout("datatrove", source, dtype, 0, length, documents)


_READERS: dict[TokenFormat, Callable[[Path], Layout | None]] = {
    "raw": _raw,
    "llm.c": _llm_c,
    "npy": _npy,
    "megatron": _megatron,
    "datatrove": _datatrove,
}
_WANTED: dict[TokenFormat, str] = {
    "llm.c": "has no header of llm.c",
    "npy": "has no header of NumPy. For ids without it set `token_format` to raw",
    "megatron": "must be a .bin with its .idx beside it",
    "datatrove": "must be a .ds with its .ds.metadata or .ds.index beside it",
}
