"""What `engine.quantize` makes of a model's weights: a method's storage format, a grade, and who is left alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Array, Ops
from engine.ops.fp4.blocks import block_format
from engine.quant import fp8, gram
from engine.quant.grades import needs_layer, quantize_shards
from engine.quant.registry import FP4_METHODS, QUANTISING, resolve
from engine.quant.scheme import HEAD, WeightFormat


@dataclass(frozen=True, slots=True)
class Kind:
    """A storage format and the k per scale (FP8: 0, one scale per row)."""

    format: WeightFormat
    block: int

    def fits(self, K: int) -> bool:
        return self.block == 0 or K % self.block == 0

    def __str__(self) -> str:
        return f"{self.format} with a scale per {f'{self.block} k' if self.block else 'row'}"


_FP8 = Kind("fp8", 0)
_HEAD_KINDS = {"bf16": None, "fp8": _FP8, "nvfp4": Kind("nvfp4", 16)}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Raises InvalidArgument for names that are unknown or do not go together."""

    quant: str  # one of `registry.QUANTISING`
    grade: str | None = None  # None: the default, or "rtn" for fp8, which has nothing to choose
    head: str = "bf16"  # one of `registry.HEADS`
    fallback: str | None = None  # "bf16": layers whose K does not fit stay as stored; None: they are refused

    def __post_init__(self) -> None:
        if self.quant not in QUANTISING:
            raise InvalidArgument(f"unknown quant {self.quant!r}; choose one of {', '.join(QUANTISING)}")
        asked = QuantConfig(self.quant, self.grade, fallback=self.fallback, head=self.head)
        object.__setattr__(self, "grade", resolve(asked, None).grade or "rtn")  # which is FP8's only one

    @property
    def body(self) -> Kind:
        """How linear layers other than the head are stored."""
        rule = FP4_METHODS.get(self.quant)
        return _FP8 if rule is None else Kind(rule.format, rule.block)

    @property
    def head_kind(self) -> Kind | None:
        return _HEAD_KINDS[self.head]

    def kinds(self, linears: Mapping[str, tuple[int, int]]) -> dict[str, Kind]:
        """The linear layers (module -> (N, K)) that get quantised, and how.

        Raises InvalidArgument naming those that do not fit, unless the fallback leaves them alone.
        """
        wanted = {module: self.head_kind if module == HEAD else self.body for module in linears}
        kinds = {module: kind for module, kind in wanted.items() if kind is not None}
        unfit = [module for module, kind in kinds.items() if not kind.fits(linears[module][1])]
        if unfit and self.fallback is None:
            more = f" and {len(unfit) - 1} more" if len(unfit) > 1 else ""
            raise InvalidArgument(
                f"{unfit[0]}{more}: K = {linears[unfit[0]][1]} is not a multiple of {kinds[unfit[0]].block}, as "
                f"{kinds[unfit[0]].format} needs here; --quant-fallback bf16 leaves such layers as stored"
            )
        return {module: kind for module, kind in kinds.items() if module not in unfit}

    def quantize(self, w: Array, kind: Kind, ops: Ops) -> Fp4Matrix | Fp8Matrix:
        """A weight [N, K] by itself. Raises NumericalError (NaN, infinity)."""
        if kind.format == "fp8":
            return fp8.quantize_weight(w)
        assert self.grade is not None  # set above
        return quantize_shards(ops, [w], format=kind.format, block=kind.block, grade=self.grade)[0]

    def layer_of(self, name: str, kind: Kind) -> Mapping[str, str] | None:
        """Where the weight `name` has to be quantised with its decoder layer: field of `gram.Layer` -> tensor."""
        prefix = next((name.removesuffix(part) for part in gram.PARTS.values() if name.endswith(f".{part}")), None)
        if prefix is None or kind.format == "fp8" or not needs_layer(self.grade):
            return None
        return {field: prefix + part for field, part in gram.PARTS.items()}

    def quantize_layer(
        self, layer: gram.Layer, fields: Collection[str], kind: Kind, ops: Ops
    ) -> Mapping[str, Fp4Matrix]:
        """The layer's weights that are named. Raises NumericalError (NaN, infinity)."""
        assert kind.format != "fp8"
        return gram.quantize_layer(ops, layer, fields, block_format(kind.format, kind.block))
