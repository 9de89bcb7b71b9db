"""Hostile safetensors files, and why each is refused. A new case: one line."""

import json
from typing import Any

DATA = bytes(range(16))


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    """What a header says of one tensor; of a good one unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file of this header (bytes, or what JSON makes of an object), which is said to be so long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = file({"a": entry()})
_TENSOR = b'{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
UNREADABLE = "cannot be read as a safetensors file"
NO_DTYPE = "it must be F32, BF16, F16, U8, and not empty"

# name -> the file, why it is refused
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", UNREADABLE),
    "seven-bytes": (GOOD[:7], UNREADABLE),
    "length-alone": (GOOD[:8], UNREADABLE),
    "cut-in-the-header": (GOOD[:30], UNREADABLE),
    "cut-in-the-data": (GOOD[:-1], UNREADABLE),
    "more-data": (GOOD + b"x", UNREADABLE),
    "length-zero": (file(b"", DATA), UNREADABLE),
    "length-beyond-the-file": (file({"a": entry()}, length=2**20), UNREADABLE),
    "length-of-16-exabytes": (file({"a": entry()}, length=2**64 - 1), "a header of 18,446,744,073,709,551,615 bytes"),
    "length-that-is-negative-to-some": (file({"a": entry()}, length=2**63), "a header of .* more than the"),
    "length-above-ours": (file(b" " * 2**24 + b'{"a":' + _TENSOR + b"}"), "a header of .* more than the"),
    "length-in-the-middle": (file({"a": entry()}, length=20), UNREADABLE),
    "a-pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", UNREADABLE),
    "a-zip": (b"PK\x03\x04" + bytes(60), UNREADABLE),
    "no-json": (file(b"{" * 40), UNREADABLE),
    "not-utf8": (file(b'{"\xff\xfe":' + _TENSOR + b"}"), UNREADABLE),
    "half-a-pair": (file(b'{"\\ud800":' + _TENSOR + b"}"), UNREADABLE),
    "two-objects": (file(b'{"a":' + _TENSOR + b"}{}"), UNREADABLE),
    "array": (file(b"[" + _TENSOR + b"]"), UNREADABLE),
    "deep": (file(b'{"a":' * 100_000), UNREADABLE),
    "name-twice": (file(b'{"a":' + _TENSOR + b',"a":' + _TENSOR + b"}"), "the key 'a' is there twice"),
    "metadata-twice": (file(b'{"__metadata__":{},"__metadata__":{},"a":' + _TENSOR + b"}"), UNREADABLE),
    "metadata-number": (file({"__metadata__": {"x": 1}, "a": entry()}), UNREADABLE),
    "metadata-key-twice": (file(b'{"__metadata__":{"x":"1","x":"2"},"a":' + _TENSOR + b"}"), "'x' is there twice"),
    "entry-text": (file({"a": "x"}), UNREADABLE),
    "entry-null": (file({"a": None}), UNREADABLE),
    "no-offsets": (file({"a": {"dtype": "F32", "shape": [2, 2]}}), UNREADABLE),
    "negative-offset": (file({"a": entry(offsets=(-16, 0))}), UNREADABLE),
    "offset-of-65-bits": (file({"a": entry(offsets=(0, 2**64))}), UNREADABLE),
    "overflowing-offset": (file({"a": entry(offsets=(2**64 - 16, 2**64 - 1))}), UNREADABLE),
    "offset-beyond-the-file": (file({"a": entry(offsets=(16, 32))}), UNREADABLE),
    "offsets-backwards": (file({"a": entry(offsets=(16, 0))}), UNREADABLE),
    "offsets-of-one": (file({"a": entry(offsets=(0,))}), UNREADABLE),
    "offset-nan": (file(b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,NaN]}}'), UNREADABLE),
    "overlap": (file({"a": entry(), "b": entry()}), UNREADABLE),
    "part-overlap": (file({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)), UNREADABLE),
    "hole": (file({"a": entry(), "b": entry(offsets=(20, 36))}, bytes(36)), UNREADABLE),
    "into-the-header": (file({"a": entry(offsets=(4, 20))}, bytes(20)), UNREADABLE),
    "shape-too-large": (file({"a": entry(shape=(2, 3))}), UNREADABLE),
    "shape-too-small": (file({"a": entry(shape=(1, 2))}), UNREADABLE),
    "shape-negative": (file({"a": entry(shape=(-2, -2))}), UNREADABLE),
    "shape-overflows-to-fit": (file({"a": entry(shape=(2**62, 2**62, 2, 2))}), UNREADABLE),
    "shape-overflows-to-zero": (file({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}, b""), UNREADABLE),
    "shape-fraction": (file({"a": entry(shape=(2.0, 2))}), UNREADABLE),
    "shape-bool": (file({"a": entry(shape=(True, 4))}), UNREADABLE),
    "shape-null": (file({"a": entry(shape=None)}), UNREADABLE),
    "dtype-unknown": (file({"a": entry("object")}), UNREADABLE),
    "dtype-number": (file({"a": entry(3)}), UNREADABLE),
    "dtype-twice": (file(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}'), UNREADABLE),
    "dtype-of-another-size": (file({"a": entry("F64")}), UNREADABLE),
    "dtype-of-no-chain": (file({"a": entry("I64", (2,))}), NO_DTYPE),
    "dtype-bool": (file({"a": entry("BOOL", (16,))}), NO_DTYPE),
    "dtype-complex": (file({"a": entry("C64", (2,))}), NO_DTYPE),
    "nothing-in-it": (file({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, b""), NO_DTYPE),
}
