"""What alignment runs bought, and at which price: curves in, numbers and tables out.

Who reaches whose final reward with how many evaluations, what each has at equal
evaluations, and at an equal distance from real data. train/compare_align.py makes the
runs.

Axes: n evaluations of a run.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from lrm_jax import steering

# What a run has spent: updates, passes of the generator, seconds.
AXES = ("iterations", "passes", "seconds")
# What it has: mean reward, the held-out oracle's mean probability, the Frechet
# distance to real data, the distance of two samples of one prompt.
MERITS = ("reward", "oracle", "frechet", "diversity")
_DIGITS = {"reward": 2, "oracle": 3, "frechet": 2, "diversity": 3}
_TITLES = {
  "reward": "reward",
  "oracle": "oracle probability",
  "frechet": "Frechet distance",
  "diversity": "diversity",
}


@dataclasses.dataclass(frozen=True)
class Curve:
  """The evaluations of one run.

  Attributes:
    seed: of the run; runs of the same seed are compared with each other.
    values: each of AXES and MERITS -> (n,).
  """

  seed: int
  values: dict[str, np.ndarray]

  def __post_init__(self):
    lengths = {name: len(self.values[name]) for name in (*AXES, *MERITS)}
    if len(set(lengths.values())) != 1 or lengths["passes"] < 2:
      raise ValueError(f"a curve needs two evaluations or more of each: {lengths}")

  def __getitem__(self, name: str) -> np.ndarray:
    return self.values[name]

  def final(self, merit: str, tail: int) -> float:
    """Mean of the last `tail` evaluations."""
    return float(self.values[merit][-tail:].mean())

  def at(self, axis: str, value: float) -> dict[str, float]:
    """The MERITS, interpolated to where one of AXES has this value.

    Raises:
      ValueError: outside of the run.
    """
    x = self.values[axis]
    if not x[0] <= value <= x[-1]:
      raise ValueError(f"{value:g} {axis} are not within {x[0]:g}..{x[-1]:g}")
    return {m: float(np.interp(value, x, self.values[m])) for m in MERITS}

  def up_to(self, passes: float) -> "Curve":
    """The run as if it had ended there."""
    x = self.values["passes"]
    keep = x < passes
    return Curve(
      self.seed,
      {
        name: np.append(y[keep], np.interp(passes, x, y))
        for name, y in self.values.items()
      },
    )


def make_curve(
  seed: int,
  lines: Sequence[Mapping[str, float | int]],
  frechet: Mapping[int, float],
  *,
  reward: str,
  oracle: str,
) -> Curve:
  """Of a run's metrics.jsonl.

  A run's first iteration is not timed, since it compiles, and an iteration's time does
  not change: `seconds` are the iterations so far times the median of the others.

  Args:
    lines: as `run_log.read_metrics` gives them.
    frechet: iteration -> distance, of every evaluation.
    reward, oracle: names of their metrics.

  Raises:
    ValueError: an evaluation without its distance, or fewer than three lines.
  """
  evaluated = [line for line in lines if reward in line]
  if missing := [e["step"] for e in evaluated if e["step"] not in frechet]:
    raise ValueError(f"seed {seed}: no Frechet distance of the iterations {missing}")
  timed = [(e["step"], e["cost/seconds"]) for e in lines if e["step"] > 0]
  if len(timed) < 2:
    raise ValueError(f"seed {seed}: {len(timed)} lines cannot be timed")
  steps, seconds = np.array(timed, float).T
  each = float(np.median(np.diff(seconds) / np.diff(steps)))
  iterations = np.array([e["step"] for e in evaluated], float)
  columns = {"reward": reward, "oracle": oracle, "diversity": "eval/diversity"}
  columns["passes"] = "cost/passes"
  values = {n: np.array([e[c] for e in evaluated]) for n, c in columns.items()}
  values["frechet"] = np.array([frechet[e["step"]] for e in evaluated])
  return Curve(seed, {**values, "iterations": iterations, "seconds": each * iterations})


def first_at(x: np.ndarray, y: np.ndarray, value: float) -> float | None:
  """Where the line through (x, y) first is at `value` or above; None: nowhere."""
  above = np.flatnonzero(y >= value)
  if not len(above):
    return None
  i = above[0]
  if i == 0:
    return float(x[0])
  part = (value - y[i - 1]) / (y[i] - y[i - 1])
  return float(x[i - 1] + part * (x[i] - x[i - 1]))


def race(fast: Curve, slow: Curve, merit: str, tail: int) -> dict[str, Any]:
  """How much less `fast` spends to have what `slow` has in the end.

  Returns: the target, and for each of AXES: what `fast` spent (None: never reached),
    what `slow` spent in total and until it first had it, and the ratios of the two to
    the first.
  """
  target = slow.final(merit, tail)
  found: dict[str, Any] = {"seed": fast.seed, "target": target}
  for axis in AXES:
    spent = first_at(fast[axis], fast[merit], target)
    total, first = float(slow[axis][-1]), first_at(slow[axis], slow[merit], target)
    ratio = lambda slow_spent, spent=spent: slow_spent / spent if spent else None  # noqa: E731
    found[axis] = {
      "fast": spent,
      "slow_total": total,
      "slow_first": first,
      "ratio_total": ratio(total),
      "ratio_first": ratio(first),
    }
  return found


def at_drift(curve: Curve, distance: float) -> dict[str, float] | None:
  """What a run has when it first is this far from real data; None: it never is.

  The other MERITS, and `passes`.
  """
  x = np.arange(len(curve["frechet"]), dtype=float)
  at = first_at(x, curve["frechet"], distance)
  if at is None:
    return None
  names = (*(m for m in MERITS if m != "frechet"), "passes")
  return {name: float(np.interp(at, x, curve[name])) for name in names}


def at_best(curve: Curve, merit: str) -> dict[str, float]:
  """The MERITS and `passes` of the evaluation where one merit is highest."""
  i = int(np.argmax(curve[merit]))
  return {name: float(curve[name][i]) for name in (*MERITS, "passes")}


def drifts(pairs: Sequence[tuple[Curve, Curve]], parts: Sequence[float]) -> list[float]:
  """Distances from real data that every run of the pairs passes through.

  `parts` of the way from where the runs started to the farthest that all of them got;
  none if one of them never got farther than it started.
  """
  curves = [curve for pair in pairs for curve in pair]
  start = max(float(curve["frechet"][0]) for curve in curves)
  end = min(float(curve["frechet"].max()) for curve in curves)
  if end <= start:
    return []
  return [start + part * (end - start) for part in parts]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
  """Mean and standard deviation (ddof 1; 0 of a single value)."""
  values = np.asarray(values, float)
  return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
  """All runs, and the question about two of them.

  Attributes:
    runs: name -> its curves, one per seed.
    labels: name -> for people.
    fast, slow: does `fast` reach `slow`'s final reward with at most 1 / `claim` of its
      evaluations?
    tail: evaluations whose mean is a run's final value.
    parts: of the way to the common drift, for `drifts`.
    real: MERITS that real data have, except for the reward.
  """

  runs: dict[str, list[Curve]]
  labels: dict[str, str]
  fast: str
  slow: str
  claim: float
  tail: int
  parts: tuple[float, ...]
  real: dict[str, float]

  def pairs(self) -> list[tuple[Curve, Curve]]:
    """(fast, slow) of each seed, both up to the same number of passes.

    Raises:
      ValueError: the two have no seed in common.
    """
    slow = {curve.seed: curve for curve in self.runs[self.slow]}
    found = []
    for curve in self.runs[self.fast]:
      if curve.seed in slow:
        both = curve, slow[curve.seed]
        passes = min(float(c["passes"][-1]) for c in both)
        found.append(tuple(c.up_to(passes) for c in both))
    if not found:
      raise ValueError(f"{self.fast} and {self.slow} have no seed in common")
    return found

  def races(self) -> dict[str, list[dict[str, Any]]]:
    """`race` of each seed, by merit."""
    return {
      merit: [race(*pair, merit, self.tail) for pair in self.pairs()]
      for merit in ("reward", "oracle")
    }

  def equal(self, axis: str) -> dict[str, Any]:
    """What each run has where the two compared ones have spent as much.

    Returns: `value`, how much that is; `runs`: name -> seeds' merits, without the runs
      that spent less.
    """
    value = min(float(c[axis][-1]) for pair in self.pairs() for c in pair)
    within = {
      name: [curve.at(axis, value) for curve in curves if curve[axis][-1] >= value]
      for name, curves in self.runs.items()
    }
    return {"value": value, "runs": {n: found for n, found in within.items() if found}}

  def equal_drift(self) -> list[dict[str, Any]]:
    """What each run has at common distances: `at_drift`, where a run gets there."""
    found = []
    for distance in drifts(self.pairs(), self.parts):
      runs = {
        name: [at_drift(curve, distance) for curve in curves]
        for name, curves in self.runs.items()
      }
      found.append({"frechet": distance, "runs": runs})
    return found

  def best(self) -> dict[str, list[dict[str, float]]]:
    """Each run at its highest oracle probability: what stopping there would keep."""
    return {
      name: [at_best(curve, "oracle") for curve in curves]
      for name, curves in self.runs.items()
    }

  def to_dict(self) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
      "fast": self.fast,
      "slow": self.slow,
      "claim": self.claim,
      "real": self.real,
      "races": self.races(),
      "equal_passes": self.equal("passes"),
      "equal_iterations": self.equal("iterations"),
      "equal_drift": self.equal_drift(),
      "best_oracle": self.best(),
      "curves": {
        name: [
          {"seed": c.seed, **{n: np.asarray(y).tolist() for n, y in c.values.items()}}
          for c in curves
        ]
        for name, curves in self.runs.items()
      },
    }


def verdict(comparison: Comparison) -> str:
  """The answer in a few sentences."""
  fast, slow = (comparison.labels[n] for n in (comparison.fast, comparison.slow))

  def ratios(merit: str, axis: str) -> str:
    listed, holds = [], 0
    for entry in (found := comparison.races()[merit]):
      ratio = entry[axis]["ratio_total"]
      if ratio is None:
        listed.append("never" if entry[axis]["fast"] is None else "from the start")
      else:
        listed.append(f"{ratio:.2f}")
        holds += ratio >= comparison.claim
    return (
      f"{', '.join(listed)} (seeds {', '.join(str(e['seed']) for e in found)}); at "
      f"least {comparison.claim:g} in {holds} of {len(found)}"
    )

  sentences = [
    f"Evaluations of {slow} over those in which {fast} reaches {slow}'s final reward: "
    f"{ratios('reward', 'passes')}. In iterations, which do not cost the same: "
    f"{ratios('reward', 'iterations')}. Evaluations until its final oracle "
    f"probability: {ratios('oracle', 'passes')}."
  ]
  drift = comparison.equal_drift()
  if not drift:
    sentences.append("A run got no farther from real data than it had started.")
    return " ".join(sentences)
  at = [
    "reward {:.2f} and oracle probability {:.3f}".format(
      *(
        np.mean([e[merit] for e in drift[-1]["runs"][name] if e is not None])
        for merit in ("reward", "oracle")
      )
    )
    for name in (comparison.fast, comparison.slow)
  ]
  sentences.append(
    f"At the same Frechet distance to real data ({drift[-1]['frechet']:.2f}), {fast} "
    f"has {at[0]}, {slow} {at[1]}."
  )
  return " ".join(sentences)


def tables(comparison: Comparison, intro: str) -> str:
  """All tables as Markdown, `intro` before them."""

  def pm(values: Sequence[float], digits: int) -> str:
    mean, spread = mean_and_spread(values)
    text = f"{mean:.{digits}f}"
    return f"{text} ± {spread:.{digits}f}" if len(values) > 1 else text

  def cells(found: Sequence[Mapping[str, float]], names: Sequence[str]) -> list[str]:
    return [pm([e[name] for e in found], _DIGITS[name]) for name in names]

  titles = [_TITLES[m] for m in MERITS]
  parts = [intro, verdict(comparison), "## In the end\n\n" + _ends(comparison, cells)]
  for axis in ("passes", "iterations"):
    equal = comparison.equal(axis)
    lines = [
      [comparison.labels[name], str(len(found)), *cells(found, MERITS)]
      for name, found in equal["runs"].items()
    ]
    name = "evaluations" if axis == "passes" else axis
    parts.append(
      f"## At equal {name}: {equal['value']:,.0f}\n\n"
      + steering.markdown(["", "seeds", *titles], lines)
    )
  rest = [m for m in MERITS if m != "frechet"]
  lines = []
  for entry in comparison.equal_drift():
    for name, seeds in entry["runs"].items():
      found = [e for e in seeds if e is not None]
      if found:
        lines.append(
          [
            f"{entry['frechet']:.2f}",
            comparison.labels[name],
            f"{len(found)} of {len(seeds)}",
            *cells(found, rest),
            f"{np.mean([e['passes'] for e in found]):,.0f}",
          ]
        )
  header = ["Frechet", "", "seeds", *(_TITLES[m] for m in rest), "evaluations"]
  parts.append("## At equal drift\n\n" + steering.markdown(header, lines))
  lines = [
    [
      comparison.labels[name],
      str(len(found)),
      *cells(found, MERITS),
      f"{np.mean([e['passes'] for e in found]):,.0f}",
    ]
    for name, found in comparison.best().items()
  ]
  parts.append(
    "## Where the oracle liked it best\n\n"
    + steering.markdown(["", "seeds", *titles, "evaluations"], lines)
  )
  parts += [
    f"## Who reaches the final {_TITLES[merit]} of "
    f"{comparison.labels[comparison.slow]}\n\n" + _races(comparison, races)
    for merit, races in comparison.races().items()
  ]
  return "\n\n".join(parts) + "\n"


def _ends(comparison: Comparison, cells: Callable[..., list[str]]) -> str:
  """Start, end of each run, real data."""
  first = [c for curves in comparison.runs.values() for c in curves]
  start = [{m: float(c[m][0]) for m in MERITS} for c in first]
  lines = [["start", "", "", "", "", *cells(start[:1], MERITS)]]
  for name, curves in comparison.runs.items():
    found = [{m: c.final(m, comparison.tail) for m in MERITS} for c in curves]
    last = curves[0]
    seconds = np.mean([c["seconds"][-1] / c["iterations"][-1] for c in curves])
    lines.append(
      [
        comparison.labels[name],
        str(len(curves)),
        f"{last['iterations'][-1]:.0f}",
        f"{last['passes'][-1]:,.0f}",
        f"{seconds:.2f}",
        *cells(found, MERITS),
      ]
    )
  real = [f"{comparison.real[m]:.{_DIGITS[m]}f}" for m in MERITS[1:]]
  lines.append(["real data", "", "", "", "", "", *real])
  header = ["", "seeds", "iterations", "evaluations", "s per iteration"]
  return steering.markdown([*header, *(_TITLES[m] for m in MERITS)], lines)


def _races(comparison: Comparison, races: Sequence[Mapping[str, Any]]) -> str:
  fast, slow = (comparison.labels[n] for n in (comparison.fast, comparison.slow))
  show = lambda value, digits: "-" if value is None else f"{value:,.{digits}f}"  # noqa: E731
  lines = []
  for entry in races:
    for axis in AXES:
      e = entry[axis]
      lines.append(
        [
          str(entry["seed"]),
          f"{entry['target']:.3f}",
          "evaluations" if axis == "passes" else axis,
          *(show(e[key], 1 if axis != "passes" else 0) for key in list(e)[:3]),
          *(show(e[key], 2) for key in list(e)[3:]),
        ]
      )
  header = ["seed", "final", "counted in", fast, f"{slow}, all", f"{slow}, until there"]
  return steering.markdown([*header, "ratio to all", "ratio to until there"], lines)


def panels(comparison: Comparison) -> dict[str, Any]:
  """For `plots.seeds`: title -> (name of x, label -> (x (s n), y (s n)), level)."""

  def curves(x: str, y: str):
    return {
      comparison.labels[name]: tuple(
        np.stack([curve[axis] for curve in mine]) for axis in (x, y)
      )
      for name, mine in comparison.runs.items()
    }

  passes, real = "passes of the generator", comparison.real
  return {
    "reward": (passes, curves("passes", "reward"), None),
    "oracle: probability of the digit": (
      passes,
      curves("passes", "oracle"),
      real["oracle"],
    ),
    "reward, by the clock": ("seconds", curves("seconds", "reward"), None),
    "Frechet distance to real digits": (
      passes,
      curves("passes", "frechet"),
      real["frechet"],
    ),
    "diversity": (passes, curves("passes", "diversity"), real["diversity"]),
    "reward against drift": (
      "Frechet distance to real digits",
      curves("frechet", "reward"),
      None,
    ),
  }
