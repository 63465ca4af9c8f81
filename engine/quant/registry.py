"""The methods by the names users give them: checked, completed from what a checkpoint says, and built.

layer                                       is served by
plain, in a plain checkpoint                the method asked for, quantised as it is loaded
the head, in a plain checkpoint             as stored, or with its weights alone in FP8 or NVFP4 (`head`)
stored in the method's own format           the method, without quantising again
stored in another format                    its weights alone: mixed files mean such layers to be kept finer
plain, in a quantised checkpoint            as stored, which is what its publisher wanted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.fp4_types import Format
from engine.ops.contract import Ops
from engine.ops.fp4.blocks import block_format
from engine.quant.as_stored import AsStored
from engine.quant.fp4 import check_scale_rule
from engine.quant.fp4_linear import CompatSharq, Fp4Linear, Fp4Rule, WeightsOnly
from engine.quant.fp8_linear import Fp8Linear, Fp8WeightsOnly
from engine.quant.grades import check_grade
from engine.quant.method import LinearMethod
from engine.quant.scheme import HEAD, QuantScheme, Storage
from engine.workspace import Workspace

AUTO, AS_STORED, FP8 = "auto", "bf16", "fp8"
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
QUANTISING = (*FP4_METHODS, FP8)
METHODS = (AS_STORED, *QUANTISING)
HEADS = (AS_STORED, FP8, "nvfp4")
_HEAD_RULE = FP4_METHODS["w4a16"]
_DEFAULT_GRADE = "sweep"


def weight_format(method: str) -> str | None:
    """The format a method's weights have; None: as stored."""
    rule = FP4_METHODS.get(method)
    return rule.format if rule is not None else FP8 if method == FP8 else None


def bits_per_weight(quant: QuantConfig) -> float | None:
    """Bits a linear layer's weight takes, block scales included; None for weights as stored."""
    rule = FP4_METHODS.get(quant.method)
    if rule is None:
        return 8 if quant.method == FP8 else None
    return 4 + (32 if rule.format == "hif4" else 8) / rule.block


def check_quant(quant: QuantConfig) -> None:
    """Raise InvalidArgument for names this table does not have, or that do not go together."""
    for what, value, known in (
        ("quant", quant.method, (AUTO, *METHODS)),
        ("quant_head", quant.head or AS_STORED, HEADS),
        ("quant_fallback", quant.fallback or AS_STORED, (AS_STORED,)),
    ):
        if value not in known:
            raise InvalidArgument(f"unknown {what} {value!r}; choose one of {', '.join(known)}")
    rule = FP4_METHODS.get(quant.method)
    if quant.compat and quant.method != AUTO and (rule is None or rule.paths != "sparse and dense"):
        raise InvalidArgument(f"sharq_compat concerns SharQ's two paths; quant {quant.method!r} has none")
    if quant.method == FP8 and quant.grade not in (None, "rtn") and quant.head != "nvfp4":
        raise InvalidArgument(f"fp8 has one scale rule, called rtn; the grade {quant.grade!r} is for FP4")
    rule = rule or FP4_METHODS["nvfp4"]  # weights as stored have neither grade nor scale, but a misspelling is one
    check_grade(quant.grade or _DEFAULT_GRADE, block_format(rule.format, rule.block))
    check_scale_rule(rule.format, quant.scale)


def resolve(quant: QuantConfig, scheme: QuantScheme | None, *, tied_head: bool = False) -> QuantConfig:
    """What was left open decided: method, head, and the grade, None where no weight has one.

    scheme: what the checkpoint says of itself; None for a plain one. tied_head: whether the head is the embedding,
    which is never stored quantised. Raises InvalidArgument as `check_quant` does, and for what the stored weights do
    not allow.
    """
    check_quant(quant)
    resolved = _resolve_plain(quant) if scheme is None else _resolve_stored(quant, scheme, tied_head)
    check_quant(resolved)
    return resolved


def _resolve_plain(quant: QuantConfig) -> QuantConfig:
    method, head = AS_STORED if quant.method == AUTO else quant.method, quant.head or AS_STORED
    fp4 = method in FP4_METHODS or head == "nvfp4"
    return replace(quant, method=method, head=head, grade=(quant.grade or _DEFAULT_GRADE) if fp4 else None)


def _resolve_stored(quant: QuantConfig, scheme: QuantScheme, tied_head: bool) -> QuantConfig:
    method = scheme.method if quant.method == AUTO else quant.method
    formats = {rule.storage.format for rule in scheme.rules}
    if weight_format(method) not in formats:
        able = [name for name in METHODS if weight_format(name) in formats]
        raise InvalidArgument(
            f"the checkpoint's weights are {' and '.join(sorted(formats))} ({scheme.name}), which quant {method!r} "
            f"does not multiply; choose one of {', '.join(able)}, or start from the original model"
        )
    storage = None if tied_head else scheme.storage(HEAD)
    if storage is not None and quant.head not in (None, storage.format):
        raise InvalidArgument(f"the checkpoint's head is stored as {storage.format}; it cannot become {quant.head}")
    head = quant.head or (AS_STORED if storage is None else storage.format)
    new_head = storage is None and head == "nvfp4"  # the only weight that is still to be quantised in a grade
    if quant.grade is not None and not new_head:
        raise InvalidArgument(
            f"the checkpoint's weights are quantised already ({scheme.name}); a grade, here {quant.grade!r}, is chosen "
            "when quantising"
        )
    grade = (quant.grade or _DEFAULT_GRADE) if new_head else scheme.grade
    return replace(quant, method=method, head=head, grade=grade)


class LayerMethods:
    """Which method serves which linear layer of one model.

    quant: resolved. stored: how a quantised checkpoint stores its linear layers, plain ones left out; None: it is
    plain.
    """

    def __init__(
        self, quant: QuantConfig, ops: Ops, workspace: Workspace, stored: Mapping[str, Storage] | None = None
    ) -> None:
        self._quant = quant
        self._ops = ops
        self._stored = stored
        self._full = AsStored(ops, workspace)

    def __call__(self, names: Sequence[str], K: int) -> LinearMethod:
        """The method of the layer whose shards have these checkpoint prefixes and share an input of K.

        Raises InvalidArgument, naming the layer, where K does not fit or the shards are not stored alike.
        """
        storage = self._storage(names)
        if storage is not None:
            return self._as_stored(names[0], K, storage)
        if tuple(names) == (HEAD,):
            return self._head(K)
        if self._stored is not None or self._quant.method == AS_STORED:
            return self._full
        return self._body(names[0], K, self._full)

    def _storage(self, names: Sequence[str]) -> Storage | None:
        stored = {name: (self._stored or {}).get(name) for name in names}
        kinds = {storage and storage.format for storage in stored.values()}
        if len(kinds) > 1:
            each = ", ".join(f"{name} {storage.format if storage else 'plain'}" for name, storage in stored.items())
            raise InvalidArgument(f"layers that share an input must be stored in one format; the checkpoint has {each}")
        return stored[names[0]]

    def _as_stored(self, name: str, K: int, storage: Storage) -> LinearMethod:
        weights_only = self._weights_only(storage)
        if name == HEAD or storage.format != weight_format(self._quant.method):
            return weights_only
        return self._body(name, K, weights_only)

    def _weights_only(self, storage: Storage) -> LinearMethod:
        if storage.format == FP8:
            return Fp8WeightsOnly(self._ops, self._full)
        rule = Fp4Rule(cast(Format, storage.format), storage.tile[1], "weights only")
        return WeightsOnly("w4a16", rule, self._quant, self._ops, self._full)

    def _body(self, name: str, K: int, unfit: LinearMethod) -> LinearMethod:
        """The method asked for; `unfit` where K does not fit it and that was allowed."""
        quant, ops = self._quant, self._ops
        rule = FP4_METHODS.get(quant.method)
        if rule is None:
            return Fp8Linear(ops)
        if K % rule.block:
            if quant.fallback is None:
                raise InvalidArgument(
                    f"{quant.method} needs inputs in multiples of {rule.block} and {name} has {K}; "
                    f"allow such layers to keep their activations with quant_fallback='bf16'"
                )
            return unfit
        if rule.paths == "weights only":
            return WeightsOnly(quant.method, rule, quant, ops, self._full)
        return (CompatSharq if quant.compat else Fp4Linear)(quant.method, rule, quant, ops)

    def _head(self, K: int) -> LinearMethod:
        """A plain head, quantised if that was asked for: its weights alone, because it sees few rows."""
        if self._quant.head == FP8:
            return Fp8WeightsOnly(self._ops, self._full)
        if self._quant.head != "nvfp4":
            return self._full
        if K % _HEAD_RULE.block:
            raise InvalidArgument(f"a head in nvfp4 needs inputs in multiples of {_HEAD_RULE.block}, not {K}")
        return WeightsOnly("w4a16", _HEAD_RULE, self._quant, self._ops, self._full)
