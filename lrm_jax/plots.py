"""The few figures of the reports."""

from collections.abc import Mapping
import os

import numpy as np
from numpy.typing import ArrayLike

# Distinct in greyscale and for colour-blind readers (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def accuracy_vs_sigma(
  path: str | os.PathLike,
  curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
  *,
  title: str = "Held-out pair accuracy against noise level",
) -> None:
  """Saves a PNG of accuracy over noise level, one line with error bars per curve.

  `curves[name] = (sigmas, acc, lo, hi)` with accuracies and interval bounds in
  [0, 1], as from `metrics.accuracy_table`.
  """
  figure, axes = _new_figure()
  # A small sideways step keeps the bars of neighbouring curves apart.
  middle = (len(curves) - 1) / 2
  for i, (name, columns) in enumerate(curves.items()):
    sigmas, acc, lo, hi = (np.asarray(column, float) for column in columns)
    if not len(sigmas) == len(acc) == len(lo) == len(hi) > 0:
      raise ValueError(f"curve {name!r}: sigmas, acc, lo and hi differ in length")
    axes.errorbar(
      sigmas + 0.004 * (i - middle),
      100 * acc,
      # Bounds may miss the estimate by a rounding error; a bar is never negative.
      yerr=100 * np.maximum([acc - lo, hi - acc], 0),
      label=name,
      color=_COLOURS[i % len(_COLOURS)],
      marker=_MARKERS[i % len(_MARKERS)],
      markersize=5,
      linewidth=1.6,
      elinewidth=1,
      capsize=2.5,
    )
  axes.axhline(50, color="0.45", linestyle="--", linewidth=1)
  axes.annotate(
    "chance",
    (0.995, 50),
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


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Mean of the last `window` values, of fewer at the start."""
  totals = np.concatenate([[0.0], np.cumsum(values)])
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - window, 0)
  return (totals[ends] - totals[starts]) / (ends - starts)


def _new_figure():
  # Imported here: it takes a second, and most programs draw nothing.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Without pyplot: no global state, and no display is ever looked for.
  figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(True, color="0.9", linewidth=0.8)
  axes.set_axisbelow(True)
  return figure, axes
