"""From a row of logits to the next token, and to log-probabilities: the definition every sampler must reproduce.

One row z (float32 [V], raw logits), one answer position t (0 for the first answer token), one sequence. In order:

 1. check      max z must be finite (so: no NaN, no +inf, not all -inf).
 2. min_tokens while t < min_tokens: x[s] = -inf for every s that would stop (stop_token_ids; eos unless ignore_eos).
 3. bias       x[i] = f32(x[i] + logit_bias[i]).                                   Before 2. and 3., x = z.
 4. penalties  for every token i of the answer so far, c[i] times in it (and, if repetition_penalty r != 1, for every
               token i of the prompt), in float64, rounded to float32 once:
                   x[i] = x[i] / r if x[i] > 0 else x[i] * r
                   x[i] = x[i] - (frequency_penalty * c[i] + presence_penalty * (c[i] > 0))
 5. greedy     temperature T < 1e-5: the largest x[i], on ties the lowest i. Done. Otherwise, in float64:
 6. weights    d[i] = (max x - x[i]) / T >= 0,  w[i] = exp(-d[i]); so max w = 1 and nothing overflows.
 7. top_k      keep the k largest x, on ties the lower i (0, -1 or >= V: keep all).
 8. min_p      keep w[i] >= min_p: probabilities relative to the largest one.
 9. top_p      of those kept, in order of (d, i), keep the shortest beginning whose weights sum to at least top_p times
               the sum of the kept weights; 1 keeps all. Sums are float64 in any order.
10. draw       c = running sum of the kept w in order of i; the token is the first i with c[i] > u * c[last].
    u          = (first 64-bit word of Philox4x64-10 with key (seed, sample index) and counter (t + 1, 0, 0, 0) >> 11)
               * 2^-53; NumPy steps the counter before use, so it is Philox(key=.., counter=t).random_raw().

The log-probability of token i is z[i] - (m + log(sum exp(z - m))), m = max z, in float64, of the raw row: steps 2 to 10
do not show in it. Its rank is 1 + the number of tokens with a larger z.

Nothing depends on other rows or on earlier draws, so a seed gives the same text in any batch and after preemption;
choosing changes no state, the caller appends what it accepts. Stop conditions and text are not decided here.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core import Logprob, SamplingParams, SamplingRow
from engine.errors import NumericalError, RequestError

TokenText = Callable[[int], str]
Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

GREEDY_BELOW = 1e-5  # temperature; as close to 0 as makes no difference unless logits are within 1e-4 of each other
_SEED_BITS = 64  # one word of Philox's key; the other is the sample index
_BINS, _MASS_SPAN = 4096, 64.0  # top-p: enough bins that each holds few tokens; below e^-64 there is no mass to divide
_GROUP = 64  # top-k: values per group maximum; the k-th largest maximum then leaves little more than k candidates


class SampledToken(NamedTuple):
    """A chosen token; logprobs (the chosen token first, then by rank) where the request asked for them."""

    token_id: int
    logprobs: dict[int, Logprob] | None


class SamplerState:
    """What choosing one sequence's next token needs beside its logits: parameters, seed, tokens so far.

    params: fields still None take their neutral value. seed: from `resolve_seed`, one per request; index: which of the
    request's n samples. prompt, answer: token ids so far; a state rebuilt from them goes on exactly as the old one.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        index: int = 0,
        prompt: Sequence[int] = (),
        answer: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.position = 0  # answer tokens so far
        self.temperature: float = _or(params.temperature, 1.0)
        self.top_k = int(_or(params.top_k, 0))
        self.top_p: float = _or(params.top_p, 1.0)
        self.min_p: float = _or(params.min_p, 0.0)
        self._seed, self._index = seed, index
        stops = (*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids))
        self._stop_ids = np.unique(np.array(stops, dtype=np.int64))
        bias = params.logit_bias or {}
        self._bias_ids = np.array(list(bias), dtype=np.int64)
        self._bias = np.array(list(bias.values()), dtype=np.float64)
        self._penalties = _Penalties.of(params, prompt)
        for token_id in answer:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Record an accepted answer token; the next choice is for the position after it."""
        self.position += 1
        if self._penalties:
            self._penalties.count(token_id)

    def uniform(self) -> float:
        """u in [0, 1) for this position."""
        raw = np.random.Philox(key=self._seed | self._index << _SEED_BITS, counter=self.position).random_raw()
        return (raw >> 11) * 2.0**-53

    def adjusted(self, row: Logits) -> Logits:
        """Steps 2 to 4 on a copy of the row, float32 [V]; the row itself if they change nothing."""
        masked = self._masked()
        if not (masked.size or self._bias_ids.size or self._penalties):
            return row
        x: Logits = row.copy()
        x[masked] = -np.inf
        x[self._bias_ids] += self._bias
        if self._penalties:
            self._penalties.apply(x)
        return x

    def as_row(self) -> SamplingRow:
        """Steps 2 to 10 for a sampler elsewhere, of this position; the arrays are the state's own."""
        penalties = self._penalties or _NO_PENALTIES
        return SamplingRow(
            temperature=self.temperature if self.temperature >= GREEDY_BELOW else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self._seed,
            index=self._index,
            position=self.position,
            masked=self._masked(),
            bias_ids=self._bias_ids,
            bias=self._bias,
            penalised=penalties.ids,
            counts=penalties.counts,
            repetition=penalties.repetition,
            presence=penalties.presence,
            frequency=penalties.frequency,
        )

    def _masked(self) -> Ids:
        return self._stop_ids if self.position < self.params.min_tokens else self._stop_ids[:0]


class _Penalties:
    """The penalised tokens, each once, in order of first sight, with their count in the answer: [0, used) is in use.

    Arrays that grow by doubling: a new token costs O(1), applying costs a gather over the distinct tokens.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Ids) -> None:
        self.repetition = _or(params.repetition_penalty, 1.0)
        self.presence, self.frequency = params.presence_penalty, params.frequency_penalty
        self._ids = prompt_ids
        self._counts = np.zeros(prompt_ids.size)
        self._slots = {int(token_id): slot for slot, token_id in enumerate(prompt_ids)}

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int]) -> _Penalties | None:
        """None where no penalty is on, so that nothing is counted."""
        if _or(params.repetition_penalty, 1.0) != 1.0:
            return cls(params, np.unique(np.asarray(prompt, dtype=np.int64)))
        if params.presence_penalty or params.frequency_penalty:
            return cls(params, np.empty(0, dtype=np.int64))  # these two look at the answer only
        return None

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float64]:
        return self._counts[: len(self._slots)]

    def count(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == self._ids.size:
            spare = slot + 16
            self._ids = np.concatenate([self._ids, np.zeros(spare, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(spare)])
        self._ids[slot] = token_id
        self._counts[slot] += 1

    def apply(self, x: Logits) -> None:
        """Step 4 in place. An absurdly small repetition penalty may overflow to +inf, which `_checked` refuses."""
        ids, counts = self.ids, self.counts
        values = x[ids].astype(np.float64)
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / self.repetition, values * self.repetition)
            x[ids] = values - (self.frequency * counts + self.presence * (counts > 0))


def resolve_seed(params: SamplingParams) -> int:
    """The request's seed, drawn from the operating system where it gives none. Raises RequestError beyond 64 bits."""
    if params.seed is None:
        return secrets.randbits(_SEED_BITS)
    if params.seed >> _SEED_BITS:
        raise RequestError(f"seed must be below 2^{_SEED_BITS}, not {params.seed}")
    return int(params.seed)


def check_against_vocab(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError if a token id in `params` is outside the model's vocabulary [0, vocab_size)."""
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        for token_id in ids or ():
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name} has token {token_id}, but the model's vocabulary is [0, {vocab_size})")


def sample(logits: Logits, states: Sequence[SamplerState], token_text: TokenText) -> list[SampledToken]:
    """`sample_row` for each row of logits [S, V] and its state; raises what the first bad row raises."""
    assert len(logits) == len(states), f"{len(logits)} rows of logits for {len(states)} sequences"
    return [sample_row(row, state, token_text) for row, state in zip(logits, states, strict=True)]


def sample_row(row: Logits, state: SamplerState, token_text: TokenText) -> SampledToken:
    """Choose the next token from row, float32 [V], which is not changed; nor is `state`: the caller appends.

    token_text(id) gives `Logprob.decoded_token`. Raises NumericalError for NaN, +inf or nothing but -inf in the row,
    RequestError where the request's own settings leave nothing to choose.
    """
    assert row.dtype == np.float32 and row.ndim == 1, f"logits row is {row.dtype} {row.shape}"
    chosen = _finite_argmax(row, f"answer position {state.position}")
    x = state.adjusted(row)
    if x is not row:
        chosen = _checked_argmax(x, state.position)
    if state.temperature >= GREEDY_BELOW:
        chosen = _draw(x, float(x[chosen]), state)
    count = state.params.logprobs
    return SampledToken(chosen, None if count is None else _row_logprobs(row, chosen, count, token_text))


def prompt_logprobs(
    logits: Logits, next_tokens: Sequence[int], count: int, token_text: TokenText, *, first_position: int
) -> list[dict[int, Logprob]]:
    """For logits [R, V] after R prompt tokens: the top `count` candidates and the token that follows, for each row.

    next_tokens: [R]; first_position: the first row's position in the prompt (prefill may come in chunks), for errors.
    Raises NumericalError as `sample_row` does.
    """
    for r, row in enumerate(logits):
        _finite_argmax(row, f"prompt position {first_position + r}")
    return [_row_logprobs(row, int(t), count, token_text) for row, t in zip(logits, next_tokens, strict=True)]


def _or(value: float | None, neutral: float) -> float:
    return neutral if value is None else value


_NO_PENALTIES = _Penalties(SamplingParams(), np.empty(0, dtype=np.int64))


def _finite_argmax(row: Logits, where: str) -> int:
    best = int(row.argmax())  # the first NaN if there is one: one pass finds every kind of bad row
    if not math.isfinite(row[best]):
        raise NumericalError(
            f"the logits at {where} are unusable: their maximum is {row[best]} (token {best} of {row.size})"
        )
    return best


def _checked_argmax(x: Logits, position: int) -> int:
    best = int(x.argmax())
    if not math.isfinite(x[best]):
        raise RequestError(
            f"no token can be chosen at answer position {position}: after min_tokens, logit_bias and penalties the "
            f"largest of {x.size} logits is {x[best]}; relax these settings"
        )
    return best


def _draw(x: Logits, top: float, state: SamplerState) -> int:
    """Steps 6 to 10. (Steps 7 and 8 both keep the beginning of one ranking, so their order is free.)"""
    ids = _top_ids(x, state.top_k) if 0 < state.top_k < x.size else None  # None: every token, id = index
    drop = np.subtract(top, x if ids is None else x[ids], dtype=np.float64)
    drop /= state.temperature
    weight = np.exp(-drop)
    if state.min_p > 0:
        keep = np.flatnonzero(weight >= state.min_p)
        ids, drop, weight = keep if ids is None else ids[keep], drop[keep], weight[keep]
    if state.top_p < 1:
        keep = np.flatnonzero(_nucleus(drop, weight, state.top_p))
        ids, weight = keep if ids is None else ids[keep], weight[keep]
    mass = np.cumsum(weight, out=weight)
    index = int(np.searchsorted(mass, state.uniform() * mass[-1], side="right"))
    return index if ids is None else int(ids[index])


def _top_ids(x: Logits, k: int) -> Ids:
    """Ids, ascending, of the k largest of x, 0 < k <= V; on ties the lower id."""
    ids = _candidates(x, k)
    values = x[ids]
    least = np.partition(values, values.size - k)[values.size - k]
    keep = values > least
    keep[np.flatnonzero(values == least)[: k - np.count_nonzero(keep)]] = True
    kept: Ids = ids[keep]
    return kept


def _candidates(x: Logits, k: int) -> Ids:
    """Few ids, ascending, that include the k largest of x: what reaches the k-th largest of many groups' maxima."""
    groups = x.size // _GROUP
    if k > groups:
        return np.arange(x.size)
    maxima = x[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)  # strided groups: whole-vector maxima
    return np.flatnonzero(x >= np.partition(maxima, groups - k)[groups - k])


def _nucleus(drop: NDArray[np.float64], weight: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Step 9 as a mask: whole bins of `drop` until the one where the mass reaches top_p; only that one is sorted."""
    need = top_p * weight.sum()
    span = max(min(float(drop.max()), _MASS_SPAN), 1e-300)  # 1e-300: all drops are 0, and so are all bins
    scaled = drop * ((_BINS - 1) / span)
    bins = np.minimum(scaled, _BINS - 1, out=scaled).astype(np.int32)
    mass = np.cumsum(np.bincount(bins, weights=weight))
    edge = int(np.searchsorted(mass, need))  # the first bin at which the mass is enough
    keep = bins < edge
    border = np.flatnonzero(bins == edge)
    border = border[np.argsort(drop[border], kind="stable")]
    before = mass[edge - 1] if edge else 0.0
    keep[border[: np.searchsorted(before + np.cumsum(weight[border]), need) + 1]] = True
    return keep


def _row_logprobs(row: Logits, chosen: int, count: int, token_text: TokenText) -> dict[int, Logprob]:
    """The chosen token first, then the `count` most probable by rank, on ties the lower id first."""
    ids = _top_ids(row, min(count, row.size)) if count else np.empty(0, dtype=np.int64)
    ids = ids[np.argsort(-row[ids], kind="stable")]
    falling = -row[ids]
    ranks = np.searchsorted(falling, falling) + 1  # all that is larger than a top token is a top token
    top = float(row.max())
    log_sum = top + math.log(np.exp(row.astype(np.float64) - top).sum())
    found = {chosen: int(np.count_nonzero(row > row[chosen])) + 1}
    found.update(zip(ids.tolist(), ranks.tolist(), strict=True))
    return {i: Logprob(float(row[i]) - log_sum, rank, token_text(i)) for i, rank in found.items()}
