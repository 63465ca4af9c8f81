"""What a quantised checkpoint says about itself: for each linear layer, whether and how its weight is stored.

`engine.models.quantization` reads a `QuantScheme` from a checkpoint's JSON files; `engine.weights` reads the tensors by
it and proves that they agree. Plain data on a floor below both, which do not know each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

WeightFormat = Literal["nvfp4", "mxfp4", "hif4", "fp8"]
Naming = Literal["modelopt", "compressed-tensors", "hf-fp8"]
HEAD = "lm_head"  # the one linear layer that methods treat apart
_WILD = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class Storage:
    """How one weight [N, K] is stored: its format, the names of its tensors, and who shares a scale."""

    format: WeightFormat
    naming: Naming
    tile: tuple[int, int]  # rows and k per scale, 0 = all of them: (1, 16) NVFP4, (1, 0) FP8 per row, (0, 0) one scale

    @property
    def dtype(self) -> str:
        """What stands where a plain tensor's dtype would: "NVFP4", "FP8", …"""
        return self.format.upper()


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of a list of modules, in the meaning that its file gives to such entries."""

    text: str
    kind: Literal["name", "glob", "part", "regex", "linear"]

    def matches(self, module: str) -> bool:
        """module: a linear layer's dotted name."""
        match self.kind:
            case "name":
                return module == self.text
            case "glob":  # a name or fnmatch pattern, of the module or of one that contains it
                if not _WILD.search(self.text):  # the common case, in files that list hundreds of names
                    return f"{module}.".startswith(f"{self.text}.")
                return any(fnmatchcase(ancestor, self.text) for ancestor in _ancestors(module))
            case "part":  # whole dotted parts, anywhere in the name
                return f".{self.text}." in f".{module}."
            case "regex":  # from the name's beginning
                return re.match(self.text, module) is not None
            case "linear":
                return True


@dataclass(frozen=True, slots=True)
class Rule:
    """The modules that are stored in one way."""

    target: Pattern
    storage: Storage


_PRECEDENCE = ("name", "regex", "glob", "part", "linear")  # of two rules for one module the more exact one holds


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """A checkpoint's quantisation. Only linear layers have one: embeddings and norms are stored plain."""

    name: str  # as users read it: "modelopt NVFP4", "sharq nvfp4"
    method: str  # the `quant=` that the file is made for: "w4a16", "nvfp4", "sharq", "mxfp4", "hif4", "fp8", …
    rules: tuple[Rule, ...]
    ignore: tuple[Pattern, ...] = ()
    grade: str | None = None  # how the scales were chosen, where the file says
    kv_cache: str | None = None  # the KV cache's format the file may have scales for; "FP8": one for a tensor of E4M3

    def storage(self, module: str) -> Storage | None:
        """How the linear layer `module` is stored; None: plain."""
        if module.rpartition(".")[2] == "embed_tokens" or matches(self.ignore, module):
            return None
        found = [rule for rule in self.rules if rule.target.matches(module)]
        return min(found, key=lambda rule: _PRECEDENCE.index(rule.target.kind)).storage if found else None


def matches(patterns: Iterable[Pattern], module: str) -> bool:
    return any(pattern.matches(module) for pattern in patterns)


def _ancestors(module: str) -> Iterator[str]:
    """The module's own name and those of all that contain it."""
    while module:
        yield module
        module = module.rpartition(".")[0]
