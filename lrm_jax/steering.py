"""What steering by a reward buys: measured rows, equal costs, shares of a gain.

Numbers in, numbers and tables out; train/sample.py makes the rows.

Axes: s seeds, b samples of a seed.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from lrm_jax import explore, flops, sample
from lrm_jax.models import mmdit, reward

# Figures of merit: of each sample, and of a seed's samples together. `reward` and
# `head_only` are two reward models' scores, accuracy and probability an oracle's.
PER_SAMPLE = ("reward", "head_only", "accuracy", "probability")
PER_SET = ("frechet", "diversity")
# SD3.5-Medium at 512 pixels: side of the latent, prompt tokens.
PUBLISHED_SIDE, PUBLISHED_TOKENS = 64, 333


@dataclasses.dataclass(frozen=True)
class Row:
  """One way to sample, measured.

  Attributes:
    settings: what it was, for results.json.
    evaluations: passes of the generator per sample.
    seconds: per sample, compilation excluded.
    values: PER_SAMPLE -> (s b), PER_SET -> (s,).
    images: (s b 8 8).
  """

  settings: dict[str, Any]
  evaluations: float
  seconds: float
  values: dict[str, np.ndarray]
  images: np.ndarray

  def mean(self, name: str) -> float:
    return float(self.values[name].mean())

  def spread(self, name: str) -> float:
    """Standard deviation of the seeds' means (ddof 1); 0 with one seed."""
    means = self.values[name].reshape(len(self.values[name]), -1).mean(axis=1)
    return float(means.std(ddof=1)) if len(means) > 1 else 0.0

  def to_dict(self) -> dict[str, Any]:
    return {
      **self.settings,
      "evaluations": self.evaluations,
      "seconds_per_sample": self.seconds,
      **{
        name: {
          "mean": self.mean(name),
          "spread": self.spread(name),
          "seeds": values.reshape(len(values), -1).mean(axis=1).tolist(),
        }
        for name, values in self.values.items()
      },
    }


def at_evaluations(rows: Sequence[Row], name: str, evaluations: float) -> float:
  """A mean between two rows: what a mixture of both with this mean cost has.

  Exact for means over samples; an interpolation for distances between sets.

  Args:
    rows: by increasing evaluations.

  Raises:
    ValueError: evaluations beyond those of the rows.
  """
  costs = [row.evaluations for row in rows]
  if not costs[0] <= evaluations <= costs[-1]:
    raise ValueError(
      f"{evaluations:g} evaluations are not within {costs[0]:g}..{costs[-1]:g} of "
      "best-of-n: raise sample.best_of"
    )
  return float(np.interp(evaluations, costs, [row.mean(name) for row in rows]))


def share_of_gain(
  name: str, plain: Row, part: Row, full: Row, *, draws: int = 1000
) -> dict[str, float] | None:
  """`(part - plain) / (full - plain)` of a mean, with a 95 % bootstrap interval.

  Samples are drawn anew together: all three rows started from the same noise. None
  where the full gain's own interval reaches 0: there is nothing to have a share of.
  """
  a, b, c = (row.values[name].reshape(-1).astype(float) for row in (plain, part, full))
  picks = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
  part_gains, full_gains = (b - a)[picks].mean(axis=1), (c - a)[picks].mean(axis=1)
  if np.quantile(full_gains, 0.025) <= 0:
    return None
  shares = part_gains[full_gains > 0] / full_gains[full_gains > 0]
  low, high = np.quantile(shares, [0.025, 0.975])
  share = (b - a).mean() / (c - a).mean()
  return {"share": float(share), "low": float(low), "high": float(high)}


def make_windows(
  sigmas: np.ndarray, levels: Iterable[tuple[float, float]], parts: Iterable[float]
) -> dict[tuple[int, int], str]:
  """Exploring windows and what they are; equal ones once.

  Args:
    sigmas: (T+1,).
    levels: noise levels (low, high) that the steps arrive at.
    parts: shares of the steps, from the noisy end.

  Raises:
    ValueError: no step arrives at such noise levels.
  """
  num_steps = len(sigmas) - 1
  named = []
  for low, high in levels:
    if high >= 1:
      name = f"sigma >= {low:g}"
    elif low <= 0:
      name = f"sigma <= {high:g}"
    else:
      name = f"{low:g} <= sigma <= {high:g}"
    named.append((sample.window_of(sigmas, low, high), name))
  for part in parts:
    stop = max(1, int(part * num_steps))
    named.append(((0, stop), f"first {part:.0%}"))
  windows: dict[tuple[int, int], str] = {}
  for window, name in named:
    windows[window] = f"{windows[window]}; {name}" if window in windows else name
  return windows


def published_cost(num_steps: int, k: int, mode: str, *, shared: bool) -> float:
  """Cost of k candidates over that of 1 on SD3.5-Medium, by FLOPs, with guidance.

  The scorer is a head on the first 12 of 24 blocks, without adapters.
  """
  config = reward.RewardConfig.dina_sd35m_12layers()
  scorer = dataclasses.replace(config, lora=None)
  tokens = flops.image_tokens(config.backbone, PUBLISHED_SIDE, PUBLISHED_SIDE)
  whole = flops.mmdit(mmdit.MMDiTConfig.sd35_medium(), tokens, PUBLISHED_TOKENS)
  scoring = flops.reward(scorer, PUBLISHED_SIDE, PUBLISHED_SIDE, PUBLISHED_TOKENS)
  blocks = flops.mmdit(scorer.backbone, tokens, PUBLISHED_TOKENS)  # without the head
  window = explore.mode_window(mode, num_steps, explore.Explore(k))
  schedule = sample.make_schedule(
    np.linspace(1, 0, num_steps + 1), explore_window=window
  )
  cost = [
    explore.evaluations(
      schedule,
      explore.Explore(candidates),
      guided=True,
      scoring=scoring / whole,
      shared=blocks / whole if shared else 0.0,
    )
    for candidates in (1, k)
  ]
  return cost[1] / cost[0]


def first_best(scores: np.ndarray) -> np.ndarray:
  """(n b) -> (n b): row i is the index of the best of rows 0..i, the first of equals.

  A score that is not finite never wins against one that is.
  """
  merit = np.where(np.isfinite(scores), scores, -np.inf)
  best = [merit[: i + 1].argmax(axis=0) for i in range(len(merit))]
  return np.stack(best)


# --- all of them together ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Results:
  """All rows.

  Attributes:
    explore: (scale, k) -> Row, k = 1 included.
    best_of: scale -> rows of n = 1, 2, ...
    windows: (k, window) -> Row, at the first scale.
    names: window -> name.
    cheap: (k, mode) -> Row, steered by the head-only reward, at the first scale.
    variations: name -> Row, at the first scale.
  """

  explore: dict[tuple[float, int], Row]
  best_of: dict[float, list[Row]]
  windows: dict[tuple[int, tuple[int, int]], Row]
  names: dict[tuple[int, int], str]
  cheap: dict[tuple[int, str], Row]
  variations: dict[str, Row]


def equal_evaluations(results: Results) -> list[dict[str, Any]]:
  """Explore-and-select and best-of-n at the evaluations of each k."""
  found = []
  for (scale, k), row in results.explore.items():
    if k == 1:
      continue
    rivals = results.best_of[scale]
    entry = {
      "guidance_scale": scale,
      "candidates": k,
      "evaluations": row.evaluations,
      "n": float(
        np.interp(
          row.evaluations,
          [r.evaluations for r in rivals],
          [r.settings["n"] for r in rivals],
        )
      ),
    }
    for name in (*PER_SAMPLE, *PER_SET):
      entry[name] = {
        "explore": row.mean(name),
        "best_of_n": at_evaluations(rivals, name, row.evaluations),
      }
    found.append(entry)
  return found


def window_shares(results: Results) -> list[dict[str, Any]]:
  """What each exploring window keeps of the gain of exploring everywhere."""
  scale = next(iter(results.best_of))
  plain = results.explore[scale, 1]
  found = []
  for (k, window), row in results.windows.items():
    full = results.explore[scale, k]
    found.append(
      {
        "candidates": k,
        "window": list(window),
        "name": results.names[window],
        "evaluations": row.evaluations,
        "seconds_ratio": row.seconds / plain.seconds,
        **{
          name: share_of_gain(name, plain, row, full)
          for name in ("reward", "accuracy", "probability")
        },
      }
    )
  return found


def cheap_shares(results: Results, num_steps: int) -> list[dict[str, Any]]:
  """What each mode keeps of the dearest one's gain, and at which price.

  The dearest is full mode with the most candidates, of the same head-only reward.
  """
  scale = next(iter(results.best_of))
  plain = results.explore[scale, 1]
  dearest = results.cheap[max(k for k, _ in results.cheap), "full"]
  found = []
  for (k, mode), row in results.cheap.items():
    own = results.cheap[k, "full"]
    shares = {}
    for name in ("head_only", "accuracy", "probability"):
      shares[name] = share_of_gain(name, plain, row, dearest)
      shares[f"{name}_of_own"] = share_of_gain(name, plain, row, own)
    found.append(
      {
        "candidates": k,
        "mode": mode,
        "window": row.settings["window"],
        "cost_ratio": row.evaluations / plain.evaluations,
        "seconds_ratio": row.seconds / plain.seconds,
        "cost_ratio_sd35_medium": published_cost(num_steps, k, mode, shared=True),
        **shares,
      }
    )
  return found


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """A table that reads well as text, too."""
  table = [list(header), *(list(line) for line in lines)]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  rule = ["-" * w for w in widths]
  out = [
    "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
    for row in (table[0], rule, *table[1:])
  ]
  return "\n".join(out)


def tables(results: Results, intro: str, *, num_steps: int) -> str:
  """All tables as Markdown, `intro` before them."""
  plain_seconds = {s: results.explore[s, 1].seconds for s in results.best_of}

  def cells(row: Row, reward_name: str = "reward") -> list[str]:
    ratio = row.seconds / plain_seconds[row.settings["guidance_scale"]]
    pm = lambda name, d: f"{row.mean(name):.{d}f} ± {row.spread(name):.{d}f}"  # noqa: E731
    return [
      f"{row.evaluations:.1f}",
      f"{ratio:.2f}",
      pm(reward_name, 2),
      pm("accuracy", 3),
      pm("probability", 3),
      f"{row.mean('frechet'):.2f}",
      f"{row.mean('diversity'):.2f}",
    ]

  columns = ["evaluations", "time", "reward", "oracle accuracy", "oracle probability"]
  columns += ["Frechet", "diversity"]
  parts = [intro]
  for scale in results.best_of:
    lines = [
      [f"explore, k = {k}", *cells(row)]
      for (s, k), row in results.explore.items()
      if s == scale
    ]
    lines += [
      [f"best of {row.settings['n']}", *cells(row)]
      for row in results.best_of[scale][1:]
    ]
    parts.append(f"## Guidance {scale:g}\n\n" + markdown(["", *columns], lines))

  lines = [
    [
      f"{e['guidance_scale']:g}",
      str(e["candidates"]),
      f"{e['evaluations']:.1f}",
      f"{e['n']:.2f}",
      *(
        f"{e[name]['explore']:.{d}f} / {e[name]['best_of_n']:.{d}f}"
        for name, d in (
          ("reward", 2),
          ("accuracy", 3),
          ("probability", 3),
          ("frechet", 2),
          ("diversity", 2),
        )
      ),
    ]
    for e in equal_evaluations(results)
  ]
  parts.append(
    "## Explore / best-of-n at equal evaluations\n\n"
    + markdown(["guidance", "k", "evaluations", "n", *columns[2:]], lines)
  )

  def percent(share: Mapping[str, float] | None) -> str:
    if share is None:
      return "no gain"
    return f"{share['share']:.0%} ({share['low']:.0%}..{share['high']:.0%})"

  lines = [
    [
      str(e["candidates"]),
      f"{e['window'][0]}:{e['window'][1]}",
      e["name"],
      f"{e['evaluations']:.1f}",
      f"{e['seconds_ratio']:.2f}",
      *(percent(e[name]) for name in ("reward", "accuracy", "probability")),
    ]
    for e in window_shares(results)
  ]
  header = ["k", "steps", "which", "evaluations", "time", *columns[2:5]]
  parts.append(
    "## Exploring in some steps only: share of the full gain (95 % interval)\n\n"
    + markdown(header, lines)
  )
  lines = [
    [f"k = {k}, {mode}", *cells(row, "head_only")]
    for (k, mode), row in results.cheap.items()
  ]
  parts.append(
    "## Steered by the head-only reward, blocks shared with the generator\n\n"
    + markdown(["", *columns], lines)
  )
  lines = [
    [
      f"k = {e['candidates']}, {e['mode']}",
      f"{e['window'][0]}:{e['window'][1]}",
      *(percent(e[name]) for name in ("head_only", "accuracy", "probability")),
      *(percent(e[f"{name}_of_own"]) for name in ("head_only", "probability")),
      f"{e['cost_ratio_sd35_medium']:.2f}",
      f"{e['cost_ratio']:.2f}",
      f"{e['seconds_ratio']:.2f}",
    ]
    for e in cheap_shares(results, num_steps)
  ]
  header = ["", "steps", *columns[2:5]]
  header += ["reward, of own k", "probability, of own k"]
  header += ["cost on SD3.5-M", "cost here", "time here"]
  most = max(k for k, _ in results.cheap)
  unshared = published_cost(num_steps, most, "full", shared=False)
  parts.append(
    f"## Share of the gain of k = {most} in full mode, and cost (k = 1 is 1)\n\n"
    + markdown(header, lines)
    + "\n\nCost on SD3.5-Medium: by FLOPs, with guidance, a head on the first 12 of 24 "
    f"blocks; k = {most} in full mode with nothing shared {unshared:.2f}."
  )
  lines = [[name, *cells(row)] for name, row in results.variations.items()]
  parts.append("## Variations\n\n" + markdown(["", *columns], lines))
  return "\n\n".join(parts) + "\n"
