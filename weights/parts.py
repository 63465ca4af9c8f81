"""Which tensors a quantised weight X [N, K] is stored as, in each convention. All block scales are plain row-major.

    ModelOpt (and our own)       X.weight U8 [N, K/2] · X.weight_scale [N, K/group] · X.weight_scale_2 F32, multiplied
    compressed-tensors           X.weight_packed U8 [N, K/2] · X.weight_scale [N, K/group] / X.weight_global_scale F32
    FP8, everywhere              X.weight F8_E4M3 [N, K] · X.weight_scale, or HF's weight_scale_inv, multiplied as well

NVFP4's block scales are F8_E4M3, MXFP4's E8M0 bytes (U8), HiF4's 32-bit words (ours alone). Input scales may be there
and are not read: activations are scaled as they come. K sits two codes a byte, even k in the low nibble.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.quant.scheme import Naming, Storage, WeightFormat

FLOATS = ("F32", "F16", "BF16")
_E4M3 = ("F8_E4M3",)
_BYTES = ("U8", "F8_E8M0")
_WORDS = ("U32",)


@dataclass(frozen=True, slots=True)
class Parts:
    """Suffixes of a module's tensors and the dtypes they may have."""

    payload: tuple[str, tuple[str, ...]]
    scale: tuple[str, tuple[str, ...]]
    global_scale: str | None = None  # F32, one number
    divides: bool = False  # whether values are divided by the global scale
    unread: tuple[str, ...] = ()  # may be there; not needed

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The required ones."""
        names = (self.payload[0], self.scale[0])
        return names if self.global_scale is None else (*names, self.global_scale)


_PARTS: dict[tuple[Naming, WeightFormat], Parts] = {
    ("modelopt", "nvfp4"): Parts(
        ("weight", ("U8",)), ("weight_scale", _E4M3), global_scale="weight_scale_2", unread=("input_scale",)
    ),
    ("modelopt", "mxfp4"): Parts(("weight", ("U8",)), ("weight_scale", _BYTES)),
    ("modelopt", "hif4"): Parts(("weight", ("U8",)), ("weight_scale", _WORDS)),
    ("modelopt", "fp8"): Parts(("weight", _E4M3), ("weight_scale", FLOATS), unread=("input_scale",)),
    ("compressed-tensors", "nvfp4"): Parts(
        ("weight_packed", ("U8",)),
        ("weight_scale", _E4M3),
        global_scale="weight_global_scale",
        divides=True,
        unread=("input_global_scale",),
    ),
    ("compressed-tensors", "mxfp4"): Parts(("weight_packed", ("U8",)), ("weight_scale", _BYTES)),
    ("compressed-tensors", "fp8"): Parts(("weight", _E4M3), ("weight_scale", FLOATS), unread=("input_scale",)),
    ("hf-fp8", "fp8"): Parts(("weight", _E4M3), ("weight_scale_inv", FLOATS), unread=("input_scale",)),
}
# Every suffix that says "part of a quantised weight", those of methods that are refused included: a tensor with one of
# them belongs to a module and is never passed on as a parameter of its own.
MARKS = {suffix for parts in _PARTS.values() for suffix in (*parts.suffixes, *parts.unread)} - {"weight"} | {
    "pre_quant_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "activation_scale",
    "forward_hadamard_matrix",
    "backward_hadamard_matrix",
    "svdquant_lora_a",
    "svdquant_lora_b",
}
KV_SCALES = ("k_scale", "v_scale")


def parts_of(storage: Storage) -> Parts:
    return _PARTS[storage.naming, storage.format]
