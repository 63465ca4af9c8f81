"""NVRTC's machine code, read: which instructions a kernel has, and how many one round of a loop executes."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from engine.errors import DeviceError
from engine.ops.gpu import compile as compiling

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/ +(?P<predicate>@!?U?P\w+ +)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    name: str  # with its modifiers
    operands: str
    predicated: bool


@dataclass(frozen=True)
class Kernel:
    """Instructions in order, and those that may follow each."""

    instructions: tuple[Instruction, ...]
    successors: tuple[tuple[int, ...], ...]

    def round(self, wanted: Callable[[Instruction], bool]) -> int:
        """How many instructions the shortest way round a loop executes that passes a wanted one; 0: none does."""
        found = [self._round(i) for i, instruction in enumerate(self.instructions) if wanted(instruction)]
        return min((length for length in found if length), default=0)

    def _round(self, start: int) -> int:
        lengths = {start: 0}
        waiting = deque([start])
        while waiting:
            here = waiting.popleft()
            for there in self.successors[here]:
                if there == start:
                    return lengths[here] + 1
                if there not in lengths:
                    lengths[there] = lengths[here] + 1
                    waiting.append(there)
        return 0


def disassembler() -> str | None:
    """nvdisasm of a wheel, else on PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or () if spec else ()
    wheels = [path for folder in folders for path in sorted(Path(folder).glob("*/bin/nvdisasm"))]
    return str(wheels[0]) if wheels else shutil.which("nvdisasm")


@lru_cache
def kernels(source: str, arch: str) -> dict[str, Kernel]:
    """Those of a file in cuda/, by name. Skips the test where a tool is missing."""
    tool = disassembler()
    if tool is None:
        pytest.skip("nvdisasm is not installed (pip install nvidia-nvdisasm)")
    try:
        cubin = compiling.cubin(source, arch)
    except DeviceError as error:
        if "NVRTC" in str(error) and "compile" not in str(error):
            pytest.skip(str(error))
        raise
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.text\.(\w+):", text, flags=re.MULTILINE)[1:]
    return {name: _kernel(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def _kernel(body: str) -> Kernel:
    found = list(INSTRUCTION.finditer(body))
    starts = [match.start() for match in found]
    labels = {label[1]: sum(start < label.start() for start in starts) for label in LABEL.finditer(body)}
    instructions = tuple(Instruction(match["name"], match["operands"], bool(match["predicate"])) for match in found)
    successors = []
    for i, instruction in enumerate(instructions):
        kind = instruction.name.split(".")[0]
        # BRA with a predicate among its operands, or BRA.DIV, may fall through; calls return.
        branches = kind == "BRA" and not re.search(r"\bU?P\d|DIV", instruction.operands + instruction.name)
        ends = not instruction.predicated and (branches or kind in ("EXIT", "RET"))
        target = re.search(r"\.L_x_\d+", instruction.operands) if kind == "BRA" else None
        after = ([] if ends else [i + 1]) + ([labels[target[0]]] if target and target[0] in labels else [])
        successors.append(tuple(there for there in after if there < len(instructions)))
    return Kernel(instructions, tuple(successors))
