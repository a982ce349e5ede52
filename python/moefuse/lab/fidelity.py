"""Two gates: the tokens equal stock's, or the logits are shown at least as close to an oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .stats import mean_interval

CHUNK = 64  # forced positions per prompt
MIN_POSITIONS = 32  # fewer show nothing: their interval is too narrow by far
RESOLUTION = 2.0**-12  # of the logits' deviation: the oracle's own float32 sums say no more
VERDICTS = ("identical", "closer", "fail")


@dataclass(frozen=True)
class Window:
    """Forced positions [start, start + count) of one prompt's stock tokens."""

    prompt: str
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class PromptVerdict:
    name: str
    verdict: str
    matched: int  # tokens before the first difference
    total: int
    reason: str


@dataclass(frozen=True)
class Fidelity:
    verdict: str
    matched: int
    total: int
    per_prompt: tuple[PromptVerdict, ...]
    oracle_error: dict | None  # of stock and variant, over the forced positions: see compare

    def record(self) -> dict:
        found = asdict(self)
        found["per_prompt"] = list(found["per_prompt"])
        if self.oracle_error:  # JSON has no infinity or NaN
            found["oracle_error"] = {
                k: None if isinstance(v, float) and not np.isfinite(v) else v
                for k, v in self.oracle_error.items()
            }
        return found


@dataclass(frozen=True)
class Itself:
    """How far stock repeats itself on this device: tokens that agree, of those compared, and the
    logits of two forced passes (`compare` of the second with the first)."""

    matched: int
    total: int
    logits: dict | None = None

    @property
    def repeats(self) -> bool:
        return self.matched == self.total

    @property
    def margin(self) -> float:
        """What a variant's squared error has to be smaller by, in parts of stock's: as much as
        stock's second pass seems to differ by from its first. None where stock repeats itself."""
        if self.repeats or self.logits is None:
            return 0.0
        return float(np.abs(self.logits["difference"]).max())


REPEATS = Itself(0, 0)


def matching(stock: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens agree."""
    pairs = zip(stock, other, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(stock))


def window(prompt: str, matched: int, total: int, chunk: int = CHUNK) -> Window:
    """Positions to force: around the first difference, or the beginning when there is none."""
    count = min(chunk, total)
    start = 0 if matched == total else min(max(0, matched - count // 2), total - count)
    return Window(prompt, start, count)


def logit_error(logits: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Difference per position and token, each row centred: softmax ignores a common shift."""
    error = logits.astype(np.float64) - oracle
    with np.errstate(invalid="ignore"):  # an infinite logit becomes a NaN error, which fails
        return error - error.mean(axis=-1, keepdims=True)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _closeness(logits: Mapping, oracle: Mapping, names: Iterable[str]) -> dict[str, float]:
    """kl: mean KL divergence from the oracle's next-token distribution, in nats; argmax: share of
    positions whose best token is the oracle's. Told, not judged."""
    kl, same = [], []
    with np.errstate(invalid="ignore"):  # infinite logits are told as NaN
        for name in names:
            truth, found = _log_softmax(oracle[name]), _log_softmax(logits[name])
            kl.append((np.exp(truth) * (truth - found)).sum(axis=-1))
            same.append(oracle[name].argmax(axis=-1) == logits[name].argmax(axis=-1))
    return {
        "kl": float(np.concatenate(kl).mean()),
        "argmax": float(np.concatenate(same).mean()),
    }


def _at_divergence(stock: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """Stock's margin between its two best tokens there, and its own largest error there."""
    second, first = np.partition(stock, -2)[-2:]
    return float(first - second), float(np.abs(error).max())


def _difference(
    stock_errors: np.ndarray, variant_errors: np.ndarray, floor: float
) -> tuple[float, float]:
    """Paired interval of the mean of variant - stock, in parts of stock's mean squared error."""
    scale = np.maximum(stock_errors, floor).mean()
    difference = np.maximum(variant_errors, floor) - np.maximum(stock_errors, floor)
    if not np.all(np.isfinite(difference)):
        return np.inf, np.inf
    low, high = mean_interval(difference)
    return (low / scale, high / scale) if scale > 0.0 else (np.sign(low), np.sign(high))


def shown(
    stock_errors: np.ndarray, variant_errors: np.ndarray, floor: float = 0.0, margin: float = 0.0
) -> str:
    """What the squared errors show of the variant: `closer` (no larger than stock's), `further`
    or `neither`; errors below `floor` are not told apart.

    A smaller rms alone would pass half of all kernels that are as noisy as stock, so the whole
    paired bootstrap interval of the difference has to lie beyond `margin` (parts of stock's mean).
    """
    return _shown(_difference(stock_errors, variant_errors, floor), stock_errors.size, margin)


def _shown(difference: tuple[float, float], positions: int, margin: float) -> str:
    low, high = difference
    if np.isinf(low):
        return "further"
    if positions < MIN_POSITIONS:
        return "neither"
    if high <= -margin:
        return "closer"
    return "further" if low > margin else "neither"


def _squares(side: Mapping, oracle: Mapping) -> np.ndarray:
    """Mean squared logit error of every forced position, over all prompts."""
    return np.concatenate([(logit_error(side[n], oracle[n]) ** 2).mean(-1) for n in oracle])


def _floor(oracle: Mapping) -> float:
    return RESOLUTION**2 * np.mean([logits.var(axis=-1).mean() for logits in oracle.values()])


def compare(stock: Mapping, variant: Mapping, oracle: Mapping, margin: float = 0.0) -> dict:
    """Both sides' rms logit error over all forced positions, what it shows, and _closeness."""
    squares = [_squares(side, oracle) for side in (stock, variant)]
    rms = [float(np.sqrt(s.mean())) for s in squares]
    difference = _difference(*squares, _floor(oracle))
    found = {"stock": rms[0], "variant": rms[1], "positions": squares[0].size}
    found["difference"] = None if np.isinf(difference[0]) else [float(d) for d in difference]
    found["shown"] = _shown(difference, squares[0].size, margin)
    for side, logits in (("stock", stock), ("variant", variant)):
        found |= {f"{key}_{side}": v for key, v in _closeness(logits, oracle, oracle).items()}
    return found


def rules_out(whole: Mapping, damaged: Mapping, oracle: Mapping) -> bool:
    """Whether a variant is shown too close to the oracle to hide damage like that of `damaged`.

    Independent errors add by their squares, so damage alone makes damaged - whole: the variant's
    own is below that where it is below half of the damaged one's.
    """
    whole_errors, damaged_errors = (_squares(side, oracle) for side in (whole, damaged))
    return shown(damaged_errors / 2, whole_errors, _floor(oracle)) == "closer"


def judge(
    stock_tokens: Mapping[str, Sequence[int]],
    variant_tokens: Mapping[str, Sequence[int]],
    windows: Mapping[str, Window],
    stock: Mapping[str, np.ndarray],
    variant: Mapping[str, np.ndarray],
    oracle: Mapping[str, np.ndarray],
    itself: Itself = REPEATS,
) -> Fidelity:
    """Verdict per prompt and over all; the arrays hold forced logits by prompt name.

    Every prompt that diverged needs its window in the three arrays; errors are pooled over all
    forced positions. Where stock parts from itself its tokens are one draw of many: where others
    part from them says nothing, and the pooled errors decide, beyond what stock's own draws
    differ by.
    """
    pooled = compare(stock, variant, oracle, itself.margin) if windows else None
    found = []
    for name, tokens in variant_tokens.items():
        matched, total = matching(stock_tokens[name], tokens), len(tokens)
        if matched == total:
            found.append(_equal_tokens(name, total, pooled if name in windows else None))
            continue
        row = matched - windows[name].start
        error = logit_error(stock[name][row], oracle[name][row])
        margin, error = _at_divergence(stock[name][row], error)
        close = pooled["shown"] == "closer"
        reason = (
            f"at token {matched} stock's margin {margin:.3g} against its error {error:.3g}; "
            f"logits {'' if close else 'not '}shown at least as close as stock's{_draw(itself)}"
        )
        near = margin < error or not itself.repeats
        verdict = "closer" if close and near else "fail"
        found.append(PromptVerdict(name, verdict, matched, total, reason))
    return _over_all(found, pooled)


def _draw(itself: Itself) -> str:
    if itself.repeats:
        return ""
    return (
        f", by {itself.margin:.1%} of its squared error or more (stock parts from itself: "
        f"{itself.matched}/{itself.total} tokens agree, so its margin does not decide)"
    )


def _equal_tokens(name: str, total: int, pooled: dict | None) -> PromptVerdict:
    if pooled and pooled["shown"] == "further":
        reason = "every token equal, but logits shown further from the oracle than stock's"
        return PromptVerdict(name, "fail", total, total, reason)
    return PromptVerdict(name, "identical", total, total, "every token equal")


def not_closer(
    stock_tokens: Mapping[str, Sequence[int]],
    tokens: Mapping[str, Sequence[int]],
    pooled: dict,
    reason: str = "logits not shown at least as close as stock's",
) -> Fidelity:
    """The verdict on a planted fault whose forced logits are not shown as close as they must."""
    found = [
        PromptVerdict(name, "fail", matching(stock_tokens[name], t), len(t), reason)
        for name, t in tokens.items()
    ]
    return _over_all(found, pooled)


def _over_all(found: Sequence[PromptVerdict], pooled: dict | None) -> Fidelity:
    worst = max((p.verdict for p in found), key=VERDICTS.index)
    matched_all = sum(p.matched for p in found)
    return Fidelity(worst, matched_all, sum(p.total for p in found), tuple(found), pooled)
