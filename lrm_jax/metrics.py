"""How often a reward model agrees with the preferences, and how sure we are of it.

Axes: s noise levels, n pairs. Everything is float64 numpy on the host.
"""

from collections.abc import Sequence
import math

from jaxtyping import Float, Int
import numpy as np


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
) -> list[dict]:
  """Accuracy per noise level, over all pairs and over each kind of pair.

  Returns rows `{sigma, kind, n, acc, lo, hi}` (95 % Wilson bounds), noise level by
  noise level, `kind="all"` first. `kind` indexes `kind_names`; a kind that no pair
  has gets no row.
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
  rows = []
  for i, sigma in enumerate(sigmas):
    for name, members in groups.items():
      n = int(members.sum())
      if n == 0:
        continue
      correct = _num_correct(r_chosen[i, members], r_rejected[i, members])
      lo, hi = wilson_interval(correct, n)
      rows.append(
        dict(sigma=float(sigma), kind=name, n=n, acc=correct / n, lo=lo, hi=hi)
      )
  return rows


def named_accuracies(rows: Sequence[dict], prefix: str) -> dict[str, float]:
  """Rows of `accuracy_table` as flat metrics.

  Names are `val/acc@sigma=0.4` and, for one kind of pair,
  `val/acc/wrong_digit@sigma=0.4`, with `prefix` "val".
  """
  return {
    f"{prefix}/acc{'' if row['kind'] == 'all' else '/' + row['kind']}"
    f"@sigma={row['sigma']:g}": row["acc"]
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
