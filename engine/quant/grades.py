"""Weight grades by name: how codes and block scales are chosen, without calibration data. A file records its grade.

rtn, 4over6 and sweep choose block scales, each shard for itself and to the last bit: `engine.ops.fp4.grades`. gram
makes up for errors along K as well, layer by layer (a weight alone: see `engine.quant.gram`).

What is left of NVFP4's loss on the bundled model, whose share 1 is nvfp4 rtn's Kullback-Leibler divergence from full
precision (results/compare_demo.json has all methods, perplexities and their intervals):

                   rtn   4over6   sweep   gram
    w4a16          .42    .35      .30     .21
    sharq          .59    .54      .48     .36
    sharq-dense    .49    .44      .39     .26
    sharq-mxfp4    .83             .78     .59
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from engine.errors import InvalidArgument
from engine.fp4_types import Format, Fp4Matrix
from engine.ops.contract import Array, Ops
from engine.ops.fp4 import grades
from engine.ops.fp4.blocks import BlockFormat, block_format
from engine.quant import gram

GRADES = ("rtn", "4over6", "sweep", "gram")
_FORMATS = {"4over6": ("nvfp4",), "gram": ("nvfp4", "mxfp4")}  # of grades that not all formats have


def check_grade(grade: str, fmt: BlockFormat) -> None:
    """Raise InvalidArgument for a name that is unknown or a grade the format does not have."""
    if grade not in GRADES:
        raise InvalidArgument(f"unknown weight grade {grade!r}; known: {', '.join(GRADES)}")
    if not has_grade(fmt.name, grade):
        able = [known for known in GRADES if has_grade(fmt.name, known)]
        raise InvalidArgument(
            f"the weight grade {grade} is defined for {' and '.join(_FORMATS[grade])}, not for {fmt.name}; "
            f"choose one of {', '.join(able)}"
        )


def has_grade(format: str, grade: str) -> bool:
    return format in _FORMATS.get(grade, (format,))


def needs_layer(grade: str | None) -> bool:
    """Whether the grade looks at a whole decoder layer; its weights alone get what is left of it."""
    return grade == "gram"


def quantize_shards(ops: Ops, shards: Sequence[Array], *, format: Format, block: int, grade: str) -> list[Fp4Matrix]:
    """Shards [N_i, K] that share an input, each with a global scale of its own. Raises as `Ops.quantize_weight`."""
    fmt = block_format(format, block)
    check_grade(grade, fmt)
    if grade == "gram":
        return gram.quantize_alone(ops, shards, fmt)
    own = cast(grades.Grade, grade)
    return [ops.quantize_weight(w, format=format, block=block, grade=own) for w in shards]
