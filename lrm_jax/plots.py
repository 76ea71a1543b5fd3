"""The few figures of the reports."""

from collections.abc import Mapping, Sequence
import os

import numpy as np
from numpy.typing import ArrayLike

# Distinct in greyscale and for colour-blind readers (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_ACROSS = 3  # panels in a row, at most


def accuracy_vs_sigma(
  path: str | os.PathLike,
  curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
  *,
  ensembles: Mapping[str, tuple[float, float, float]] | None = None,
  title: str = "Held-out pair accuracy against noise level",
) -> None:
  """Saves a PNG of accuracy over noise level, one line with error bars per curve.

  Args:
    curves: name -> (sigmas, acc, lo, hi) with accuracies and interval bounds in
      [0, 1], as from `metrics.accuracy_table`; a bound that is NaN draws no bar. No
      sigmas at all draw no line.
    ensembles: name -> (acc, lo, hi) of noise levels taken together; drawn to the right
      of all noise levels, in the colour of the curve of that name.

  Raises:
    ValueError: columns that differ in length, nothing to draw.
  """
  ensembles = ensembles or {}
  names = list(dict.fromkeys([*curves, *ensembles]))
  columns = {
    name: tuple(np.asarray(column, float) for column in curve)
    for name, curve in curves.items()
  }
  for name, (sigmas, acc, lo, hi) in columns.items():
    if not len(sigmas) == len(acc) == len(lo) == len(hi):
      raise ValueError(f"curve {name!r}: sigmas, acc, lo and hi differ in length")
  everywhere = np.concatenate([np.zeros(0), *(c[0] for c in columns.values())])
  if not len(everywhere) and not ensembles:
    raise ValueError("no accuracies to draw")
  figure, axes = _new_figure()
  right = (everywhere.max() + 0.08) if len(everywhere) else 0.0
  # A small sideways step keeps the bars of neighbouring curves apart.
  middle = (len(names) - 1) / 2
  for i, name in enumerate(names):
    style = dict(color=_COLOURS[i % len(_COLOURS)], elinewidth=1, capsize=2.5)
    label = name
    if name in columns and len(columns[name][0]):
      sigmas, acc, lo, hi = columns[name]
      axes.errorbar(
        sigmas + 0.004 * (i - middle),
        100 * acc,
        yerr=_bars(acc, lo, hi),
        label=label,
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=5,
        linewidth=1.6,
        **style,
      )
      label = None  # once per name
    if name in ensembles:
      acc, lo, hi = (np.array([value], float) for value in ensembles[name])
      axes.errorbar(
        [right + 0.008 * (i - middle)],
        100 * acc,
        yerr=_bars(acc, lo, hi),
        label=label,
        marker="*",
        markersize=9,
        linestyle="none",
        **style,
      )
  if ensembles:
    ticks = [t for t in axes.get_xticks() if 0 <= t < right - 0.05]
    axes.set_xticks([*ticks, right], [*(f"{t:g}" for t in ticks), "ensemble"])
  axes.axhline(50, color="0.45", linestyle="--", linewidth=1)
  axes.annotate(
    "chance",
    (0.6 if ensembles else 0.995, 50),
    xycoords=("axes fraction", "data"),
    xytext=(0, 3),
    textcoords="offset points",
    ha="right",
    color="0.35",
    fontsize=9,
  )
  axes.set_ylim(top=100)
  axes.set_xlabel("noise level sigma")
  axes.set_ylabel("pairs ranked as preferred (%)")
  axes.set_title(title, loc="left", fontsize=11)
  # Accuracy falls with noise, so this corner stays free.
  axes.legend(frameon=False, fontsize=9, loc="lower left")
  figure.savefig(path, format="png")


def loss_curve(
  path: str | os.PathLike,
  curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
  *,
  ylabel: str = "loss",
  title: str = "",
  window: int = 1,
) -> None:
  """Saves a PNG of values over steps: `curves[name] = (steps, values)`.

  With `window` > 1 the running mean over the last `window` values is drawn on top of
  the faint raw values.
  """
  if window < 1:
    raise ValueError(f"window must be 1 or more, got {window}")
  figure, axes = _new_figure()
  for i, (name, (steps, values)) in enumerate(curves.items()):
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if not len(steps) == len(values) > 0:
      raise ValueError(f"curve {name!r}: {len(steps)} steps, {len(values)} values")
    colour = _COLOURS[i % len(_COLOURS)]
    if window > 1:
      axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    mean = _running_mean(values, window)
    axes.plot(steps, mean, color=colour, linewidth=1.6, label=name)
  axes.set_xlabel("training step")
  axes.set_ylabel(ylabel)
  axes.set_title(title, loc="left", fontsize=11)
  axes.legend(frameon=False, fontsize=9)
  figure.savefig(path, format="png")


def score_histograms(
  path: str | os.PathLike,
  panels: Mapping[str, tuple[ArrayLike, ArrayLike]],
  *,
  title: str = "",
  num_bins: int = 40,
) -> None:
  """Saves a PNG with the scores of preferred and of other images, a panel per level.

  `panels[level] = (chosen (n), rejected (n))`; both are drawn as shares of n.

  Raises:
    ValueError: no panels, a panel without scores, scores that are not finite.
  """
  figure, grid = _new_grid(len(panels))
  for axes, (name, sides) in zip(grid, panels.items(), strict=True):
    chosen, rejected = (np.asarray(side, float) for side in sides)
    both = np.concatenate([chosen, rejected])
    if not len(chosen) == len(rejected) > 0 or not np.isfinite(both).all():
      raise ValueError(
        f"panel {name!r}: {len(chosen)} and {len(rejected)} scores, which must be as "
        "many, not none, and finite"
      )
    edges = np.histogram_bin_edges(both, num_bins)
    for side, label, colour in (
      (chosen, "preferred", _COLOURS[0]),
      (rejected, "other", _COLOURS[1]),
    ):
      share = np.full(len(side), 100 / len(side))
      axes.hist(side, edges, weights=share, color=colour, alpha=0.35)
      axes.hist(side, edges, weights=share, color=colour, histtype="step", label=label)
    axes.set_title(name, loc="left", fontsize=9)
    axes.set_xlabel("score")
    axes.set_ylabel("images (%)")
  grid[0].legend(frameon=False, fontsize=8)
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  figure.savefig(path, format="png")


def reliability(
  path: str | os.PathLike,
  panels: Mapping[str, Mapping[str, Sequence[Mapping[str, float | int]]]],
  *,
  title: str = "",
) -> None:
  """Saves a PNG of accuracy against confidence, a panel per level.

  `panels[level][name]` are the bins `{n, confidence, acc}` of
  `metrics.probability_scores`, `name` e.g. "before" and "after"; the area of a point
  goes with its share of the pairs. On the diagonal, confidence is what it claims.

  Raises:
    ValueError: no panels, a curve without bins.
  """
  figure, grid = _new_grid(len(panels))
  for axes, (level, curves) in zip(grid, panels.items(), strict=True):
    axes.plot([50, 100], [50, 100], color="0.45", linestyle="--", linewidth=1)
    for i, (name, bins) in enumerate(curves.items()):
      if not bins:
        raise ValueError(f"panel {level!r}, curve {name!r}: no bins")
      n, confidence, acc = (
        np.array([b[key] for b in bins], float) for key in ("n", "confidence", "acc")
      )
      axes.plot(100 * confidence, 100 * acc, color=_COLOURS[i], linewidth=1.2)
      axes.scatter(
        100 * confidence,
        100 * acc,
        s=10 + 120 * n / n.sum(),
        color=_COLOURS[i],
        marker=_MARKERS[i],
        label=name,
        alpha=0.8,
      )
    axes.set_title(level, loc="left", fontsize=9)
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("pairs ranked as preferred (%)")
  grid[0].legend(frameon=False, fontsize=8, loc="upper left")
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  figure.savefig(path, format="png")


def gain_and_cost(
  path: str | os.PathLike,
  curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]]],
  bars: Mapping[str, tuple[Sequence[str], Mapping[str, ArrayLike]]],
  *,
  title: str = "",
) -> None:
  """Saves a PNG of what samplers reach against what they cost, and of shares.

  Args:
    curves: a panel per figure of merit: `curves[merit][method]` is
      (evaluations, mean, spread), each (n).
    bars: a panel per setting: `(names, shares)`, where `shares[merit]` has a share of
      the full gain, 1 for all of it, for each of the names.

  Raises:
    ValueError: no panels, columns that differ in length.
  """
  # Each kind in a layout of its own: the names and the legend of the bars would push
  # the curves apart.
  kinds = [len(kind) for kind in (curves, bars) if kind]
  down = [-(-num // _ACROSS) for num in kinds]
  figure = _new_canvas(max(kinds, default=0), sum(down))
  rows = figure.subfigures(len(kinds), 1, squeeze=False, height_ratios=down).flat
  above = _add_grid(next(rows), len(curves)) if curves else []
  below = _add_grid(next(rows), len(bars)) if bars else []
  for axes, (merit, methods) in zip(above, curves.items(), strict=True):
    for i, (name, columns) in enumerate(methods.items()):
      cost, mean, spread = (np.asarray(column, float) for column in columns)
      if not len(cost) == len(mean) == len(spread) > 0:
        raise ValueError(f"panel {merit!r}, {name!r}: columns differ in length")
      axes.errorbar(
        cost,
        mean,
        yerr=spread,
        label=name,
        color=_COLOURS[i],
        marker=_MARKERS[i],
        markersize=4.5,
        linewidth=1.4,
        elinewidth=1,
        capsize=2,
      )
    axes.set_title(merit, loc="left", fontsize=9)
    axes.set_xlabel("network evaluations per sample")
  if curves:
    above[0].legend(frameon=False, fontsize=8)
  for axes, (setting, (names, shares)) in zip(below, bars.items(), strict=True):
    at = np.arange(len(names))
    width = 0.8 / max(len(shares), 1)
    for i, (merit, values) in enumerate(shares.items()):
      values = np.asarray(values, float)
      if len(values) != len(names):
        raise ValueError(f"panel {setting!r}, {merit!r}: a share for each name")
      axes.barh(
        at + width * (i - (len(shares) - 1) / 2),
        100 * values,
        height=width,
        color=_COLOURS[i],
        label=merit,
      )
    axes.axvline(100, color="0.45", linestyle="--", linewidth=1)
    axes.set_yticks(at, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(setting, loc="left", fontsize=9)
    axes.set_xlabel("share of the gain (%)")
    # Beside the axes: bars leave no corner free.
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  figure.savefig(path, format="png")


def panels(
  path: str | os.PathLike,
  curves: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
  *,
  xlabel: str,
  title: str = "",
) -> None:
  """Saves a PNG of curves, a panel per title: `curves[title][name] = (x, y)`.

  Raises:
    ValueError: no panels.
  """
  figure, grid = _new_grid(len(curves))
  for axes, (panel, mine) in zip(grid, curves.items(), strict=True):
    for i, (name, (x, y)) in enumerate(mine.items()):
      colour = _COLOURS[i % len(_COLOURS)]
      axes.plot(x, y, color=colour, linewidth=1.4, label=name)
    axes.set_title(panel, loc="left", fontsize=9)
    axes.set_xlabel(xlabel)
    axes.legend(frameon=False, fontsize=7)
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  figure.savefig(path, format="png")


def seeds(
  path: str | os.PathLike,
  panels: Mapping[
    str, tuple[str, Mapping[str, tuple[np.ndarray, np.ndarray]], float | None]
  ],
  *,
  title: str = "",
) -> None:
  """Saves a PNG of runs with several seeds, a panel per title.

  A thick line through the seeds' means, a thin one for each seed.

  Args:
    panels: title -> (name of x, name of a run -> (x (s n), y (s n)), the y of a dotted
      line or None).

  Raises:
    ValueError: no panels, or x and y of different shapes.
  """
  figure, grid = _new_grid(len(panels))
  for axes, (panel, (xlabel, mine, level)) in zip(grid, panels.items(), strict=True):
    for i, (name, (x, y)) in enumerate(mine.items()):
      if np.shape(x) != np.shape(y) or np.ndim(x) != 2:
        raise ValueError(
          f"panel {panel!r}, {name!r}: x {np.shape(x)} and y {np.shape(y)} must be "
          "(seeds, points) both"
        )
      colour = _COLOURS[i % len(_COLOURS)]
      if len(x) > 1:
        for each_x, each_y in zip(x, y, strict=True):
          axes.plot(each_x, each_y, color=colour, linewidth=0.6, alpha=0.5)
      means = np.mean(x, axis=0), np.mean(y, axis=0)
      axes.plot(*means, color=colour, linewidth=1.8, label=name)
    if level is not None:
      axes.axhline(level, color="0.4", linewidth=1, linestyle=":", label="real data")
    axes.set_title(panel, loc="left", fontsize=9)
    axes.set_xlabel(xlabel)
    axes.legend(frameon=False, fontsize=7)
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  figure.savefig(path, format="png")


def _bars(acc: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
  """(2 n) lengths of error bars in percent, 0 where a bound is NaN."""
  # Bounds may miss the estimate by a rounding error; a bar is never negative.
  return 100 * np.nan_to_num(np.maximum([acc - lo, hi - acc], 0))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Mean of the last `window` values, of fewer at the start."""
  totals = np.concatenate([[0.0], np.cumsum(values)])
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - window, 0)
  return (totals[ends] - totals[starts]) / (ends - starts)


def _new_figure():
  """A figure and its axes."""
  figure, (axes,) = _new_grid(1, size=(6.4, 4.0))
  return figure, axes


def _new_grid(num: int, size: tuple[float, float] | None = None):
  """A figure with `num` axes, three in a row at most."""
  figure = _new_canvas(num, -(-num // _ACROSS), size)
  return figure, _add_grid(figure, num)


def _new_canvas(num: int, down: int, size: tuple[float, float] | None = None):
  """An empty figure for `num` axes or more, `down` below each other."""
  # Imported here: it takes a second, and most programs draw nothing.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if num < 1:
    raise ValueError("a figure without panels")
  size = size or (3.4 * min(num, _ACROSS), 0.4 + 2.8 * down)
  # Without pyplot: no global state, and no display is ever looked for.
  figure = Figure(figsize=size, dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _add_grid(figure, num: int) -> list:
  """`num` axes in a figure or in a part of one."""
  across = min(num, _ACROSS)
  down = -(-num // across)
  grid = [figure.add_subplot(down, across, i + 1) for i in range(num)]
  for axes in grid:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
  return grid
