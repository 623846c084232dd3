"""Pages of a Parquet column chunk, checked against their own checksums and the chunk's footer.

A chunk is a run of pages, each a header in Thrift's compact protocol and its data. The header holds
the CRC-32 of the data as they are stored; it has none of its own, so that what it says is compared
with what the footer says of the chunk.
"""

import zlib
from typing import Any, NamedTuple

import pyarrow as pa

_PAGE_TYPES = {0: 5, 2: 7, 3: 8}  # data, dictionary, data v2: field of the header that they need
_WIDTHS = {"INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_ENCODINGS = {
    0: "PLAIN",
    2: "PLAIN_DICTIONARY",
    3: "RLE",
    4: "BIT_PACKED",
    5: "DELTA_BINARY_PACKED",
    6: "DELTA_LENGTH_BYTE_ARRAY",
    7: "DELTA_BYTE_ARRAY",
    8: "RLE_DICTIONARY",
    9: "BYTE_STREAM_SPLIT",
}


class Chunk(NamedTuple):
    """What a file's footer says of a column chunk.

    Attributes:
        start, end: its bytes in the file.
        group, column: row group, and name of the column.
        n_values: values of all its data pages.
        n_bytes: uncompressed bytes of all its pages, headers included.
        encodings: of its pages, by name.
        physical_type, compression: of its values and pages, by name.
    """

    start: int
    end: int
    group: int
    column: str
    n_values: int
    n_bytes: int
    encodings: tuple[str, ...]
    physical_type: str
    compression: str


def chunks_of(metadata: Any) -> list[Chunk]:
    """The column chunks of a pyarrow FileMetaData, by their place in the file."""
    chunks = []
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            column = group.column(c)
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset is not None:
                start = min(start, column.dictionary_page_offset)
            chunks.append(
                Chunk(
                    start,
                    start + column.total_compressed_size,
                    g,
                    column.path_in_schema.partition(".")[0],
                    column.num_values,
                    column.total_uncompressed_size,
                    column.encodings,
                    column.physical_type,
                    column.compression,
                )
            )
    return sorted(chunks)


def page_error(data: memoryview, chunk: Chunk) -> str | None:
    """What is wrong with the bytes of a chunk, in words; None if nothing is, "" if no page of it
    has a checksum.
    """
    at = n_values = n_bytes = n_checked = n_pages = 0
    while at < len(data):
        try:
            header, start = _struct(data, at)
            crc = header.get(4)
            size = header[3]
            page = header[_PAGE_TYPES[header[1]]]
            values, encoding = page[1], _ENCODINGS[page[4 if header[1] == 3 else 2]]
        except (IndexError, KeyError, TypeError, ValueError, RecursionError):
            return f"page {n_pages} has no readable header"
        end = start + size
        fits = end <= len(data) and 0 <= header[2] <= chunk.n_bytes
        if min(size, values) < 0 or not fits or encoding not in chunk.encodings:
            return f"page {n_pages} is not what the footer says of its column"
        if crc is not None:
            if zlib.crc32(data[start:end]) != crc & 0xFFFFFFFF:
                return f"page {n_pages} does not have its checksum"
            n_checked += 1
        if header[1] == 2:
            if _dictionary_values(data[start:end], header[2], chunk) != values:
                return f"page {n_pages} holds another number of values than its header says"
        else:
            n_values += values
        n_bytes += start - at + header[2]
        n_pages += 1
        at = end
    if n_values != chunk.n_values or n_bytes != chunk.n_bytes:
        return "its pages hold other numbers of values or bytes than the footer says"
    if 0 < n_checked < n_pages:
        return "some of its pages have a checksum and others none"
    return None if n_checked or not n_pages else ""


def _dictionary_values(page: memoryview, n_bytes: int, chunk: Chunk) -> int:
    """Values of a dictionary page, which the footer does not say; -1 if it cannot be read."""
    width = _WIDTHS.get(chunk.physical_type)
    if width is not None:
        return n_bytes // width if n_bytes % width == 0 else -1
    try:
        codec = None if chunk.compression == "UNCOMPRESSED" else pa.Codec(chunk.compression.lower())
        plain = bytes(page) if codec is None else codec.decompress(page, n_bytes, asbytes=True)
    except (pa.ArrowException, ValueError, OSError):
        return -1
    at = values = 0
    while at + 4 <= len(plain):
        at += 4 + int.from_bytes(plain[at : at + 4], "little")
        values += 1
    return values if at == len(plain) else -1


def _struct(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """(fields by number, the place after it) of a struct in Thrift's compact protocol."""
    fields: dict[int, Any] = {}
    number = 0
    while byte := data[at]:
        at += 1
        kind = byte & 15
        if byte > 15:
            number += byte >> 4
        else:
            number, at = _integer(data, at)
        if kind in (5, 6):  # i32, i64: all integers of a page header
            value = data[at]
            if value < 128:  # most are of one byte, and there are many headers
                fields[number], at = (value >> 1) ^ -(value & 1), at + 1
            else:
                fields[number], at = _integer(data, at)
        elif kind == 12:
            fields[number], at = _struct(data, at)
        elif kind == 8:  # binary: smallest and largest values
            length, at = _varint(data, at)
            if length > len(data) - at:
                raise ValueError("a text longer than the page")
            fields[number], at = None, at + length
        elif kind in (1, 2):
            fields[number] = kind == 1
        else:
            raise ValueError(f"type {kind}")
    return fields, at + 1


def _integer(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")
