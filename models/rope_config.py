"""Read how a config.json describes its rotary embedding, in either spelling, as a `RopeConfig`.

Older files hold `rope_theta` beside an optional `rope_scaling` object whose kind is called `type` or `rope_type`; newer
ones hold one `rope_parameters` object with everything in it. Every value there changes each token's output, so the
rule is stricter than elsewhere: a key that the named kind does not define is refused, and where a file says a thing
twice, both must agree. Not done: `dynamic`, `longrope`, multimodal (`mrope_section`) and per-layer-type RoPE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from engine.config import RopeConfig, RopeKind
from engine.models.fields import Fields

_BIG = 1e30  # larger bases or factors make no frequency that float32 can hold
_COMMON_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
# Says how the model was trained; the kinds that need it read it, to the others it is a remark.
_REMARKS = {"original_max_position_embeddings", "finetuned"}
_KIND_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
}
_DEFAULT_THETA = 10000.0  # of every family we read


def read_rope(fields: Fields, max_position: int) -> RopeConfig:
    """The rotary embedding that config.json's top-level `fields` describe.

    max_position: the model's max_position_embeddings, which stands in for a missing original length.
    """
    objects = [child for key in ("rope_scaling", "rope_parameters") if (child := fields.child(key)) is not None]
    if not objects:
        return RopeConfig(theta=_theta(fields, _DEFAULT_THETA))
    ropes = [_read_object(rope, fields, max_position) for rope in objects]
    if ropes[0] != ropes[-1]:
        fields.fail("rope_scaling and rope_parameters describe different rotary embeddings; remove one of them")
    return ropes[0]


def _read_object(rope: Fields, top: Fields, max_position: int) -> RopeConfig:
    kind = _kind(rope)
    for key in rope.present():
        if key not in _COMMON_KEYS | _REMARKS | _KIND_KEYS[kind]:
            rope.refuse(key, f"not part of rotary embedding kind {kind!r} as the engine computes it")
    rope.refuse_unless({"partial_rotary_factor": (1.0,)})
    theta = _theta(rope, _theta(top, _DEFAULT_THETA))
    if "rope_theta" in top and theta != _theta(top, theta):
        top.refuse("rope_theta", f"differs from the {theta:g} given with the other rotary parameters")
    config = RopeConfig(theta=theta)
    if kind == "default":
        return config
    original = _original_length(rope, top, max_position)
    if kind == "linear":
        return replace(config, kind="linear", factor=_factor(rope))
    if kind == "llama3":
        return replace(config, kind="llama3", original_max_position=original, factor=_factor(rope), **_llama3(rope))
    factor = _factor(rope) if "factor" in rope else max(max_position / original, 1.0)
    return replace(config, kind="yarn", original_max_position=original, factor=factor, **_yarn(rope))


def _kind(rope: Fields) -> str:
    for key in rope.present():
        if isinstance(rope.raw(key), dict):
            rope.refuse(key, "rotary parameters per layer type are not supported, one set for all layers is")
    kinds = get_args(RopeKind)
    spelled = [rope.choice(key, kinds) for key in ("rope_type", "type") if key in rope]
    if len(set(spelled)) > 1:
        rope.refuse("rope_type", f"differs from type = {spelled[1]!r}")
    return spelled[0] if spelled else "default"


def _theta(fields: Fields, default: float) -> float:
    # Above 1: the frequencies must fall, and YaRN divides by the logarithm.
    return fields.number("rope_theta", 1.0 + 1e-6, _BIG, default)


def _factor(rope: Fields) -> float:
    return rope.number("factor", 1.0, _BIG)


def _original_length(rope: Fields, top: Fields, max_position: int) -> int:
    """The context length before extension; Phi-style files keep it at the top level."""
    key, limit = "original_max_position_embeddings", 1 << 24
    inner, outer = (f.optional_integer(key, 1, limit) for f in (rope, top))
    if inner is not None and outer is not None and inner != outer:
        rope.refuse(key, f"differs from the top-level value {outer}")
    return inner or outer or max_position


def _llama3(rope: Fields) -> dict[str, Any]:
    low, high = (rope.number(f"{name}_freq_factor", 1e-6, _BIG) for name in ("low", "high"))
    if low >= high:
        rope.refuse("low_freq_factor", f"must be less than high_freq_factor = {high:g}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn(rope: Fields) -> dict[str, Any]:
    neutral = RopeConfig()
    values: dict[str, Any] = {"truncate": rope.flag("truncate", True)}
    for key, default in (("beta_fast", neutral.beta_fast), ("beta_slow", neutral.beta_slow)):
        values[key] = rope.optional_number(key, 1e-6, 1e6) or default
    if values["beta_fast"] < values["beta_slow"]:
        rope.refuse("beta_fast", f"must be at least beta_slow = {values['beta_slow']:g}")
    values["attention_factor"] = rope.optional_number("attention_factor", 1e-6, 1e6)
    for key in ("mscale", "mscale_all_dim"):  # 0 means "not given" in the files that have them
        values[key] = rope.optional_number(key, 0.0, 1e6) or None
    return values
