"""Thread-local symbols of an ELF file: under emulation, the __shared__ arrays of its kernels.

Only what the emulator needs of the format: 64-bit little-endian files, section headers of type SYMTAB, symbols of type
STT_TLS (System V ABI, Object Files).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

SHT_SYMTAB = 2
STT_TLS = 6
SHN_UNDEF = 0


@dataclass(frozen=True)
class TlsSymbol:
    name: str
    defined: bool
    offset: int  # in the thread-local segment; meaningless where undefined
    size: int  # bytes


def tls_symbols(path: Path) -> list[TlsSymbol]:
    """All thread-local symbols of an object file or shared library, by offset."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    (section_offset,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * entry_size) for i in range(count)]
    symbols: list[TlsSymbol] = []
    for _, kind, _, _, offset, size, link, _, _, symbol_size in sections:
        if kind != SHT_SYMTAB:
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, symbol_size):
            name_offset, info, _, section, value, bytes_ = struct.unpack_from("<IBBHQQ", data, at)
            if info & 15 == STT_TLS and name_offset:
                start = strings + name_offset
                name = data[start : data.index(0, start)].decode()
                symbols.append(TlsSymbol(name, section != SHN_UNDEF, value, bytes_))
    return sorted(symbols, key=lambda symbol: symbol.offset)
