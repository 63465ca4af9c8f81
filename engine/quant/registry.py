"""The methods by the names users give them, and how to build one."""

from __future__ import annotations

from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.ops.contract import Ops
from engine.ops.fp4.blocks import block_format
from engine.quant.as_stored import AsStored
from engine.quant.fp4 import check_scale_rule
from engine.quant.fp4_linear import CompatSharq, Fp4Linear, Fp4Rule, WeightsOnly
from engine.quant.grades import check_grade
from engine.quant.method import LinearMethod
from engine.workspace import Workspace

AS_STORED = "bf16"
FP4_METHODS: dict[str, Fp4Rule] = {
    "w4a16": Fp4Rule("nvfp4", 16, "weights only"),
    "nvfp4": Fp4Rule("nvfp4", 16, "one"),
    "mxfp4": Fp4Rule("mxfp4", 32, "one"),
    "hif4": Fp4Rule("hif4", 64, "one"),
    "sharq": Fp4Rule("nvfp4", 32, "sparse and dense"),
    "sharq-mxfp4": Fp4Rule("mxfp4", 32, "sparse and dense"),
    "sharq-hif4": Fp4Rule("hif4", 64, "sparse and dense"),
    "sharq-dense": Fp4Rule("nvfp4", 32, "dense and dense"),
}
METHODS = (AS_STORED, *FP4_METHODS)


def bits_per_weight(quant: QuantConfig) -> float | None:
    """Bits a linear layer's weight takes, scales included; None for weights as stored."""
    rule = FP4_METHODS.get(quant.method)
    if rule is None:
        return None
    return 4 + (32 if rule.format == "hif4" else 8) / rule.block


def check_quant(quant: QuantConfig) -> None:
    """Raise InvalidArgument for names this table does not have, or that do not go together."""
    for what, value, known in (
        ("quant", quant.method, METHODS),
        ("quant_fallback", quant.fallback or AS_STORED, (AS_STORED,)),
    ):
        if value not in known:
            raise InvalidArgument(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
    rule = FP4_METHODS.get(quant.method)
    if quant.compat and (rule is None or rule.paths != "sparse and dense"):
        raise InvalidArgument(f"sharq_compat concerns SharQ's two paths; quant {quant.method!r} has none")
    rule = rule or FP4_METHODS["nvfp4"]  # weights as stored have neither grade nor scale, but a misspelling is one
    check_grade(quant.grade, block_format(rule.format, rule.block))
    check_scale_rule(rule.format, quant.scale)


def linear_method(quant: QuantConfig, ops: Ops, workspace: Workspace) -> LinearMethod:
    """The method of a model's linear layers. Raises as `check_quant` does."""
    check_quant(quant)
    full = AsStored(ops, workspace)
    rule = FP4_METHODS.get(quant.method)
    if rule is None:
        return full
    if rule.paths == "weights only":
        return WeightsOnly(quant.method, rule, quant, ops, full)
    return (CompatSharq if quant.compat else Fp4Linear)(quant.method, rule, quant, ops, full)
