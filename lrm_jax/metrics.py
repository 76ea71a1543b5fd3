"""How often a reward model agrees with the preferences, and how sure we are of it.

Three parts: accuracy of pairs per noise level, agreement with ranked lists of images
(pairs are lists of two), and calibration of scores as probabilities.
docs/evaluation.md defines every figure.

Axes: s noise levels, n pairs (or images, in ranked lists), l lists, p pairs of images
of one list. Everything is float64 numpy on the host.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from jaxtyping import Float, Int, Real
import numpy as np

INTERVALS = ("auto", "wilson", "bootstrap")


def pair_accuracy(
  r_chosen: Float[np.ndarray, " n"], r_rejected: Float[np.ndarray, " n"]
) -> float:
  """Share of pairs whose chosen side scores higher; a tie counts one half.

  Raises ValueError on no pairs and on NaN or infinite scores: a comparison with NaN
  is False and would pass for an honest mistake.
  """
  return _num_correct(r_chosen, r_rejected) / len(r_chosen)


def wilson_interval(
  successes: float | int, n: int, z: float = 1.96
) -> tuple[float, float]:
  """Wilson's score interval (low, high) for a proportion (Wilson 1927).

  `successes` of `n` trials, fractional where ties count half; `z` is the normal
  quantile (1.96: 95 %). Unlike the plain normal interval it stays inside [0, 1] and
  has a width even at 0 or n successes.
  """
  if n <= 0 or not 0 <= successes <= n:
    raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
  p = successes / n
  scale = 1 + z * z / n
  centre = (p + z * z / (2 * n)) / scale
  half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_table(
  r_chosen: Float[np.ndarray, "s n"],
  r_rejected: Float[np.ndarray, "s n"],
  *,
  sigmas: Sequence[float | int],
  kind: Int[np.ndarray, " n"] | None = None,
  kind_names: Sequence[str] = (),
  ensembles: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> list[dict]:
  """Accuracy per noise level, over all pairs and over each kind of pair.

  Args:
    kind: indexes `kind_names`; a kind that no pair has gets no row.
    ensembles: name -> (r_chosen (n), r_rejected (n)): scores of several noise levels
      together, which get rows after those of the single ones.

  Returns: rows `{level, sigma, kind, n, acc, lo, hi}` (95 % Wilson bounds), level by
    level, `kind="all"` first. `level` is `sigma=0.4` or an ensemble's name, whose
    `sigma` is None.
  """
  if len(sigmas) != len(r_chosen):
    raise ValueError(f"{len(sigmas)} sigmas for {len(r_chosen)} rows of scores")
  groups = {"all": np.ones(r_chosen.shape[1], bool)}
  if kind is not None:
    if kind.min() < 0 or kind.max() >= len(kind_names):
      raise ValueError(
        f"kinds span {kind.min()}..{kind.max()}, but there are {len(kind_names)} names"
      )
    groups |= {name: kind == i for i, name in enumerate(kind_names)}
  levels = [
    (f"sigma={sigma:g}", float(sigma), r_chosen[i], r_rejected[i])
    for i, sigma in enumerate(sigmas)
  ]
  levels += [(name, None, *scores) for name, scores in (ensembles or {}).items()]
  rows = []
  for level, sigma, chosen, rejected in levels:
    for name, members in groups.items():
      n = int(members.sum())
      if n == 0:
        continue
      correct = _num_correct(chosen[members], rejected[members])
      lo, hi = wilson_interval(correct, n)
      row = dict(level=level, sigma=sigma, kind=name, n=n)
      rows.append(row | dict(acc=correct / n, lo=lo, hi=hi))
  return rows


def named_accuracies(rows: Sequence[dict], prefix: str) -> dict[str, float]:
  """Rows of `accuracy_table` as flat metrics.

  Names are `val/acc@sigma=0.4`, for one kind of pair `val/acc/wrong_digit@sigma=0.4`,
  and for an ensemble `val/acc@NAME`, with `prefix` "val".
  """
  return {
    f"{prefix}/acc{'' if row['kind'] == 'all' else '/' + row['kind']}"
    f"@{row['level']}": row["acc"]
    for row in rows
  }


def _num_correct(r_chosen: np.ndarray, r_rejected: np.ndarray) -> float:
  if r_chosen.shape != r_rejected.shape or r_chosen.ndim != 1 or not len(r_chosen):
    raise ValueError(
      f"need two equal, non-empty vectors of scores, got {r_chosen.shape} "
      f"and {r_rejected.shape}"
    )
  for name, scores in dict(r_chosen=r_chosen, r_rejected=r_rejected).items():
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
      raise ValueError(
        f"{name}: {len(bad)} of {len(scores)} scores are NaN or infinite, "
        f"the first at pair {bad[0]}"
      )
  wins = np.sum(r_chosen > r_rejected)
  ties = np.sum(r_chosen == r_rejected)
  return float(wins + 0.5 * ties)


# --- ranked lists ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RankedLists:
  """Images in lists, ranked by people, and all pairs within the lists.

  Make one with `ranked_lists`.

  Attributes:
    list_of: (n) number of each image's list, 0 to num_lists - 1.
    ranks: (n) lower is better; equal ranks are a tie.
    cluster_of: (l) number of each list's cluster; what a bootstrap draws.
    better, worse: (p) images of each pair with different ranks.
    tied: (t 2) images of each pair with equal ranks.
    independent: every list is a pair, and no image is in two of them.
  """

  list_of: np.ndarray
  ranks: np.ndarray
  cluster_of: np.ndarray
  better: np.ndarray
  worse: np.ndarray
  tied: np.ndarray
  independent: bool

  @property
  def num_lists(self) -> int:
    return len(self.cluster_of)

  @property
  def sizes(self) -> np.ndarray:
    """(l) images per list."""
    return np.bincount(self.list_of, minlength=self.num_lists)


def ranked_lists(
  list_of: Int[np.ndarray, " n"],
  ranks: Real[np.ndarray, " n"],
  *,
  clusters: Sequence | np.ndarray | None = None,
  items: Sequence | np.ndarray | None = None,
) -> RankedLists:
  """Finds all pairs within lists.

  Args:
    list_of: number of each image's list; each of 0 to l - 1 at least twice.
    ranks: lower is better.
    clusters: (n) any labels; lists of one label (the prompt) are drawn together by a
      bootstrap. None: each list on its own.
    items: (n) any labels; equal ones are the same image. None: all different.

  Raises:
    ValueError: lengths that differ, no list, one without two images, ranks that are
      not finite.
  """
  num = len(list_of)
  given = dict(ranks=ranks, clusters=clusters, items=items)
  for name, values in given.items():
    if values is not None and len(values) != num:
      raise ValueError(f"{len(values)} {name} for {num} images")
  if not np.isfinite(ranks).all():
    raise ValueError("ranks hold NaN or infinity")
  sizes = np.bincount(list_of) if num else np.zeros(0, int)
  if not num or sizes.min() < 2:
    small = "there is none" if not num else f"list {sizes.argmin()} has {sizes.min()}"
    raise ValueError(f"every list needs two images or more, {small}")
  order = np.argsort(list_of, kind="stable")
  starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

  pairs = []
  for size in np.unique(sizes):
    rows = order[starts[sizes == size][:, None] + np.arange(size)]  # lists, images
    a, b = np.triu_indices(size, 1)
    pairs.append(np.stack([rows[:, a], rows[:, b]], axis=-1).reshape(-1, 2))
  pairs = np.concatenate(pairs)
  pairs = pairs[np.argsort(list_of[pairs[:, 0]], kind="stable")]
  a, b = pairs.T
  ranks = np.asarray(ranks, np.float64)
  different = ranks[a] != ranks[b]
  swap = ranks[a] > ranks[b]

  cluster_of = np.arange(len(sizes))
  if clusters is not None:
    of_first = np.asarray(clusters)[order[starts]]
    cluster_of = np.unique(of_first, return_inverse=True)[1]
  unique = items is None or len(np.unique(np.asarray(items))) == num
  return RankedLists(
    list_of=np.asarray(list_of),
    ranks=ranks,
    cluster_of=cluster_of,
    better=np.where(swap, b, a)[different],
    worse=np.where(swap, a, b)[different],
    tied=pairs[~different],
    independent=bool(unique and sizes.max() == 2),
  )


def list_statistics(
  lists: RankedLists, scores: Float[np.ndarray, " n"]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Measures of agreement as (sum (l), weight (l)): each is sum.sum() / weight.sum().

  Pairs that people tie count in none of them.
    acc: pairs whose better image scores higher; equal scores count one half.
    acc_by_list: mean over lists of the list's accuracy.
    tau_b: mean over lists of Kendall's tau-b (Kendall 1945), which corrects for ties
      on both sides.
    top1: mean over lists of the chance that the highest-scored image (any of them,
      where several are equal) is one of the best-ranked.
    rank_corr: mean over lists of Spearman's correlation, ties at their mean rank.
  A list whose images all have one rank has weight 0 everywhere; one whose scores are
  all equal counts as 0 in tau_b and rank_corr.

  Raises:
    ValueError: another number of scores, or one that is not finite.
  """
  scores = np.asarray(scores, np.float64)
  if scores.shape != lists.ranks.shape:
    raise ValueError(f"{len(scores)} scores for {len(lists.ranks)} images")
  if not np.isfinite(scores).all():
    raise ValueError(
      f"the score of image {np.argmin(np.isfinite(scores))} is not finite"
    )
  num = lists.num_lists

  def per_list(values, of):
    # Without the cast it is integers where there are none.
    return np.bincount(lists.list_of[of], values, minlength=num).astype(float)

  wins = (scores[lists.better] > scores[lists.worse]).astype(float)
  equal = (scores[lists.better] == scores[lists.worse]).astype(float)
  correct = per_list(wins + 0.5 * equal, lists.better)
  count = per_list(np.ones(len(wins)), lists.better)
  ranked = (count > 0).astype(float)

  sizes = lists.sizes
  all_pairs = sizes * (sizes - 1) / 2
  tied_a, tied_b = lists.tied.T
  equal_tied = (scores[tied_a] == scores[tied_b]).astype(float)
  score_ties = per_list(equal, lists.better) + per_list(equal_tied, tied_a)
  tau = _ratio(
    2 * correct - count,  # concordant - discordant
    np.sqrt(count * (all_pairs - score_ties)),
  )

  order = np.argsort(lists.list_of, kind="stable")
  starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
  highest = np.maximum.reduceat(scores[order], starts)[lists.list_of]
  best = np.minimum.reduceat(lists.ranks[order], starts)[lists.list_of]
  at_top, at_best = scores == highest, lists.ranks == best
  every = np.arange(len(scores))
  top1 = per_list((at_top & at_best).astype(float), every) / per_list(
    at_top.astype(float), every
  )

  human = _mean_ranks(lists, -lists.ranks)
  model = _mean_ranks(lists, scores)
  mean = (sizes + 1) / 2
  human, model = (r - mean[lists.list_of] for r in (human, model))
  corr = _ratio(
    per_list(human * model, every),
    np.sqrt(per_list(human**2, every) * per_list(model**2, every)),
  )
  return {
    "acc": (correct, count),
    "acc_by_list": (_ratio(correct, count), ranked),
    "tau_b": (tau * ranked, ranked),
    "top1": (top1 * ranked, ranked),
    "rank_corr": (corr * ranked, ranked),
  }


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b, and 0 where b is 0."""
  return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _mean_ranks(lists: RankedLists, values: np.ndarray) -> np.ndarray:
  """(n) place of each value within its list, 1 is lowest, equal ones at their mean."""
  pairs = np.concatenate([np.stack([lists.better, lists.worse], 1), lists.tied])
  a, b = pairs.T
  above = (values[a] > values[b]) + 0.5 * (values[a] == values[b])
  num = len(values)
  places = np.bincount(a, above, minlength=num)
  return 1 + places + np.bincount(b, 1 - above, minlength=num)


def bootstrap_interval(
  sums: Float[np.ndarray, "l q"],
  weights: Float[np.ndarray, "l q"],
  cluster_of: Int[np.ndarray, " l"],
  *,
  num_resamples: int = 1000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
  """Percentile bootstrap of `sums.sum(0) / weights.sum(0)` over clusters (Efron 1979).

  Clusters are drawn with replacement, each with everything in it; the same seed draws
  the same ones.

  Returns: (low, high), each (q); NaN where there are fewer than two clusters or
    nothing has weight.
  """
  clusters = int(cluster_of.max()) + 1
  totals = np.zeros((2, clusters, sums.shape[1]))
  np.add.at(totals[0], cluster_of, sums)
  np.add.at(totals[1], cluster_of, weights)
  if clusters < 2:
    nothing = np.full(sums.shape[1], np.nan)
    return nothing, nothing
  rng = np.random.default_rng(seed)
  draws = np.empty((num_resamples, sums.shape[1]))
  for i in range(num_resamples):
    times = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)
    over, under = times @ totals[0], times @ totals[1]
    draws[i] = np.where(under > 0, over / np.where(under > 0, under, 1), np.nan)
  bounds = np.full((2, sums.shape[1]), np.nan)
  tail = (1 - level) / 2
  for q, column in enumerate(draws.T):
    column = column[~np.isnan(column)]  # draws of nothing but ties
    if len(column):
      bounds[:, q] = np.quantile(column, [tail, 1 - tail])
  return bounds[0], bounds[1]


def agreement(
  lists: RankedLists,
  scores: Float[np.ndarray, " n"],
  *,
  interval: str = "auto",
  num_resamples: int = 1000,
  seed: int = 0,
) -> dict[str, Any]:
  """One row of a table: `list_statistics` over all lists, with 95 % intervals.

  Args:
    interval: of the accuracy: `wilson` for independent pairs, `bootstrap` over
      clusters, `auto`: Wilson's if `lists.independent`, else the bootstrap.

  Returns: `num_lists`, `num_pairs` (with different ranks), `num_ties`, `acc`, `lo`,
    `hi`, `interval` (which one it is), and `acc_by_list`, `tau_b`, `top1`, `rank_corr`,
    each also with `_lo` and `_hi` from the bootstrap. The latter are None where all
    lists are pairs: they would say no more than the accuracy. What cannot be known
    (no ranked pair, a single cluster) is None.

  Raises:
    ValueError: as `list_statistics`; another interval.
  """
  if interval not in INTERVALS:
    raise ValueError(f"interval={interval!r}: use one of {INTERVALS}")
  if interval == "auto":
    interval = "wilson" if lists.independent else "bootstrap"
  statistics = list_statistics(lists, scores)
  only_pairs = lists.sizes.max() == 2
  asked = ["acc"] if only_pairs else list(statistics)
  low = high = np.full(len(asked), np.nan)
  if interval == "bootstrap" or not only_pairs:
    sums, weights = (
      np.stack([statistics[name][i] for name in asked], axis=1) for i in (0, 1)
    )
    low, high = bootstrap_interval(
      sums, weights, lists.cluster_of, num_resamples=num_resamples, seed=seed
    )
  row: dict[str, Any] = dict(
    num_lists=lists.num_lists,
    num_pairs=len(lists.better),
    num_ties=len(lists.tied),
    interval=interval,
  )
  for name in statistics:
    row |= {name: None, f"{name}_lo": None, f"{name}_hi": None}
  for i, name in enumerate(asked):
    total, weight = (float(part.sum()) for part in statistics[name])
    if weight > 0:
      bounds = low[i], high[i]
      if name == "acc" and interval == "wilson":
        bounds = wilson_interval(total, int(weight))
      row[name] = total / weight
      if not np.isnan(bounds[0]):
        row[f"{name}_lo"], row[f"{name}_hi"] = map(float, bounds)
  return {dict(acc_lo="lo", acc_hi="hi").get(k, k): v for k, v in row.items()}


# --- accuracy that counts ties -----------------------------------------------------


def tie_accuracy(
  lists: RankedLists,
  scores: Float[np.ndarray, " n"],
  *,
  threshold: float | int | None = None,
  credit: float | int = 0,
) -> tuple[float, float]:
  """(accuracy, threshold) over all pairs, those that people tie included.

  The model ties a pair whose scores differ by at most the threshold. A pair counts 1
  where both tie it or both prefer the same side, `credit` where only one of them ties
  it, else 0. With credit 0 this is the accuracy of Deutsch, Foster and Freitag 2023
  (arXiv 2305.14324), with 0.5 that of Pick-a-Pic (Kirstain et al. 2023).

  Args:
    threshold: in units of the score, 0 or more. None takes the best one for these very
      pairs (the "tie calibration" of Deutsch et al.), the smallest of equally good
      ones: an upper bound of what a threshold chosen elsewhere gives.

  Raises:
    ValueError: a negative threshold, no pairs, scores that are not finite.
  """
  scores = np.asarray(scores, np.float64)
  gaps = np.concatenate(
    [
      scores[lists.better] - scores[lists.worse],
      scores[lists.tied[:, 0]] - scores[lists.tied[:, 1]],
    ]
  )
  if not len(gaps) or not np.isfinite(gaps).all():
    raise ValueError(f"{len(gaps)} pairs, whose scores must all be finite")
  human_tie = np.arange(len(gaps)) >= len(lists.better)
  if_tied = np.where(human_tie, 1.0, credit)
  if_decided = np.where(human_tie, credit, gaps > 0)
  size = np.abs(gaps)
  if threshold is not None:
    if threshold < 0:
      raise ValueError(f"threshold={threshold} must be 0 or more")
    points = np.where(size <= threshold, if_tied, if_decided)
    return float(points.mean()), float(threshold)
  order = np.argsort(size, kind="stable")
  size = size[order]
  # Entry i: the i smallest gaps are ties. Only whole groups of equal gaps can be.
  gained = np.concatenate([[0.0], np.cumsum((if_tied - if_decided)[order])])
  possible = np.concatenate([[size[0] > 0], np.diff(size) > 0, [True]])
  best = int(np.argmax(np.where(possible, gained, -np.inf)))
  return (
    float((if_decided.sum() + gained[best]) / len(gaps)),
    float(size[best - 1]) if best else 0.0,
  )


# --- calibration -------------------------------------------------------------------


def fit_scale(gaps: Float[np.ndarray, " p"]) -> tuple[float, str | None]:
  """Maximum likelihood of `P(a preferred to b) = sigmoid(scale (s_a - s_b))`.

  There is no offset: swapping a and b must turn P into 1 - P. 1 / scale is the
  temperature of a Bradley-Terry model.

  Args:
    gaps: score of the preferred image minus that of the other, pair by pair.

  Returns: the scale, and a remark where it is no ordinary maximum or not positive.
    Scores that order all pairs rightly (or wrongly) have no finite one: the scale is
    then that of Platt's targets (1999), which let one pair in N + 2 go the other way.
    Scores that are all equal get 0.

  Raises:
    ValueError: no pairs, or gaps that are not finite.
  """
  gaps = np.asarray(gaps, np.float64)
  if not len(gaps) or not np.isfinite(gaps).all():
    raise ValueError(f"{len(gaps)} gaps, which must all be finite")
  gaps = gaps[gaps != 0]  # their probability is 1/2 at every scale
  if not len(gaps):
    return 0.0, "all scores are equal: every pair gets probability 1/2"
  note, target = None, 1.0
  if gaps.min() > 0 or gaps.max() < 0:
    rightly = gaps.min() > 0
    target = (len(gaps) + 1) / (len(gaps) + 2)
    note = (
      f"the scores order all {len(gaps)} pairs {'as' if rightly else 'against what'} "
      "people do, so the likelihood has no maximum: fitted as if one pair in "
      f"{len(gaps) + 2} went the other way"
    )

  def slope(scale):  # of the log-likelihood, which is concave
    return float(np.sum(gaps * (target - _sigmoid(scale * gaps))))

  reach = 1 / float(np.median(np.abs(gaps)))
  while slope(reach) > 0 or slope(-reach) < 0:
    reach *= 2
  low, high = -reach, reach
  for _ in range(200):  # halves down to neighbouring floats; a few dozen suffice
    middle = 0.5 * (low + high)
    if middle in (low, high):
      break
    low, high = (middle, high) if slope(middle) > 0 else (low, middle)
  scale = 0.5 * (low + high)
  if note is None and scale <= 0:
    note = "the scale is not positive: higher scores are not preferred"
  return scale, note


def calibrate(
  gaps: Float[np.ndarray, " p"],
  groups: Int[np.ndarray, " p"],
  *,
  num_folds: int = 5,
  num_bins: int = 10,
  seed: int = 0,
) -> dict[str, Any]:
  """`fit_scale`, and how well its probabilities hold on pairs it was not fitted on.

  Groups (prompts) are dealt at random to `num_folds` folds, or to as many as there are
  groups; each fold's probabilities come from the scale of the other folds.

  Args:
    gaps: as for `fit_scale`.
    groups: (p) any numbers; equal ones stay in one fold.

  Returns: `scale` and `note` of all pairs together, `fold_scales`, `num_pairs`, and
    under `before` (scale 1: raw scores taken as log-odds) and `after` each the
    figures of `probability_scores`.

  Raises:
    ValueError: fewer than two groups or folds, and as `fit_scale`.
  """
  scale, note = fit_scale(gaps)
  distinct, group = np.unique(groups, return_inverse=True)
  folds = min(num_folds, len(distinct))
  if folds < 2:
    raise ValueError(
      f"{len(distinct)} group(s) in {num_folds} fold(s): a fit and its check need two "
      "of each"
    )
  dealt = np.random.default_rng(seed).permutation(len(distinct)) % folds
  fold = dealt[group]
  scales = [fit_scale(gaps[fold != i])[0] for i in range(folds)]
  return dict(
    scale=scale,
    note=note,
    fold_scales=scales,
    num_pairs=len(gaps),
    before=probability_scores(gaps, num_bins=num_bins),
    after=probability_scores(np.asarray(scales)[fold] * gaps, num_bins=num_bins),
  )


def probability_scores(
  log_odds: Float[np.ndarray, " p"], *, num_bins: int = 10
) -> dict[str, Any]:
  """How good the probabilities `sigmoid(log_odds)` of what people preferred are.

  A pair is as good as its mirror image, so confidence is the probability of the side
  that the model favours, in [0.5, 1], and it is right if people favour it too.

  Args:
    log_odds: (p) of the preferred side.

  Returns:
    log_loss: mean of -log P(preferred side), in nats; log 2 = 0.693 knows nothing.
    brier: mean of (1 - P(preferred side))^2; 0.25 knows nothing.
    ece: expected calibration error (Guo et al. 2017): mean distance of confidence and
      accuracy over `num_bins` equal bins of confidence, weighted by their pairs.
    bins: the bins that hold pairs: `{n, confidence, acc}`.
  """
  p = _sigmoid(log_odds)
  confidence = np.maximum(p, 1 - p)
  right = (log_odds > 0) + 0.5 * (log_odds == 0)
  place = np.minimum((2 * confidence - 1) * num_bins, num_bins - 1).astype(int)
  n = np.bincount(place, minlength=num_bins)
  held = n > 0
  mean_confidence = np.bincount(place, confidence, minlength=num_bins)[held] / n[held]
  acc = np.bincount(place, right, minlength=num_bins)[held] / n[held]
  return dict(
    log_loss=float(np.mean(np.logaddexp(0.0, -log_odds))),
    brier=float(np.mean((1 - p) ** 2)),
    ece=float(np.sum(n[held] * np.abs(mean_confidence - acc)) / len(p)),
    bins=[
      dict(n=int(count), confidence=float(c), acc=float(a))
      for count, c, a in zip(n[held], mean_confidence, acc, strict=True)
    ],
  )


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows
