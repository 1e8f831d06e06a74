"""Files that are no token files, known by their names and first bytes.

With 65,536 ids of 16 bits any file of even length reads as ids in the vocabulary, so
what a file holds has to be recognised before its numbers are looked at.
"""

import codecs
from pathlib import Path
from typing import NamedTuple

import numpy as np

_UNPACK = "Unpack it first"
_CONVERT = "Read it with its own library, and write the ids with `numpy.save`"
_TEXT = (
    "Give text with `--dataset text`, JSON lines with `--dataset jsonl`, or write its "
    "ids with `prepare-data`"
)
_HEAD = 1 << 16


class Foreign(NamedTuple):
    """A format that holds no plain ids.

    Attributes:
      name: What the file is, for a message.
      advice: How to go on.
    """

    name: str
    advice: str


_BY_SUFFIX = {
    ".idx": Foreign("the index of a Megatron data set", "Give the .bin beside it"),
    ".ds.index": Foreign("the index of a datatrove file", "Give the .ds beside it"),
    ".ds.metadata": Foreign(
        "the metadata of a datatrove file", "Give the .ds beside it"
    ),
    ".ds.loss": Foreign("the loss mask of a datatrove file", "Give the .ds beside it"),
}

_BY_MAGIC = {
    b"MMIDIDX\0\0": _BY_SUFFIX[".idx"],
    b"\xff\xff\xff\xff": Foreign("an Arrow stream", _CONVERT),
    b"ARROW1": Foreign("an Arrow file", _CONVERT),
    b"PAR1": Foreign(
        "a Parquet file",
        "Give a column of text with `--dataset parquet`, or write a column of ids with "
        "`numpy.save`",
    ),
    b"\x83\xaf\x70\xd1": Foreign("an ArrayRecord file", _CONVERT),
    b"\x89HDF\r\n\x1a\n": Foreign("an HDF5 file", _CONVERT),
    b"\x1f\x8b\x08": Foreign("packed with gzip", _UNPACK),
    b"\x28\xb5\x2f\xfd": Foreign("packed with zstd", _UNPACK),
    b"\xfd7zXZ\0": Foreign("packed with xz", _UNPACK),
    b"BZh91AY&SY": Foreign("packed with bzip2", _UNPACK),
    b"\x04\x22\x4d\x18": Foreign("packed with lz4", _UNPACK),
    b"PK\x03\x04": Foreign("a zip archive, such as .npz or .pt", _CONVERT),
    **dict.fromkeys(
        (b"\x80\x02\x8a\x0a", b"\x80\x04\x95", b"\x80\x05\x95"),
        Foreign("a pickle, such as an old .pt", _CONVERT),
    ),
    b"PK\x05\x06": Foreign("an empty zip archive", _UNPACK),
}
_LITDATA = Foreign("a chunk of litdata", _CONVERT)
_MDS = Foreign("a shard of MosaicML Streaming", _CONVERT)


def recognise(path: Path, text: bool = True) -> Foreign | None:
    """Returns the format of a file that is no token file, if it is known.

    Args:
      path: File to look at.
      text: Whether to recognise text; bytes as ids may be text, and rightly so.
    """
    for suffix, found in _BY_SUFFIX.items():
        if path.name.endswith(suffix):
            return found
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for magic, found in _BY_MAGIC.items():
        if head.startswith(magic):
            return found
    if _is_safetensors(head, path.stat().st_size):
        return Foreign("a safetensors file", _CONVERT)
    if found := _records_with_offsets(path) or _indexed(path):
        return found
    return Foreign("text", _TEXT) if text and _is_text(head) else None


def _is_safetensors(head: bytes, size: int) -> bool:
    """Tells whether a length and a JSON object of that length come first."""
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= size - 8 and head[8:10] in (b'{"', b"{}")


def _records_with_offsets(path: Path) -> Foreign | None:
    """Recognises litdata and MDS: a count, where each record begins, and the end.

    All are uint32, and the last offset is the length of the file. In litdata the first
    record follows at once, in MDS the names of the columns lie between.
    """
    size = path.stat().st_size
    count = int(np.fromfile(path, "<u4", 1).sum())
    table = 4 + 4 * (count + 1)
    if count < 1 or table > size:
        return None
    first, last = (
        int(np.fromfile(path, "<u4", 1, offset=at)[0]) for at in (4, table - 4)
    )
    if last != size or not table <= first <= last:
        return None
    return _LITDATA if first == table else _MDS


def _indexed(path: Path) -> Foreign | None:
    """Recognises litdata and MDS by the `index.json` beside, which names the file."""
    index = path.with_name("index.json")
    if not index.is_file():
        return None
    text = index.read_text(encoding="utf-8", errors="replace")
    if f'"{path.name}"' not in text:
        return None
    return _LITDATA if '"chunks"' in text else _MDS if '"shards"' in text else None


def _is_text(head: bytes) -> bool:
    """Tells whether bytes are UTF-8 without control characters."""
    control = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
    if not head or len(head.translate(None, control)) < len(head):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
