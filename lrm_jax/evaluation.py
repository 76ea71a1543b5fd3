"""From the scores of benchmarks to tables, figures and a summary.

docs/evaluation.md lists the files and defines their columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import csv
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from lrm_jax import metrics, plots
from lrm_jax.data import score_files
from lrm_jax.data.source import DataError

FORMAT, VERSION = "lrm_jax.evaluation", 1
SUMMARY = "evaluation.json"
# What the summary must say of a benchmark so that its scores can be judged again.
NEEDED = ("format", "scores", "tie_credit", "num_bad_images", "lost_pairs")


@dataclasses.dataclass(frozen=True)
class Analysis:
  """How scores are judged.

  Attributes:
    interval, num_resamples, seed: as in `metrics.agreement`.
    tie_threshold: as in `metrics.tie_accuracy`, in raw scores.
    folds: of the calibration; None for none.
  """

  interval: str
  num_resamples: int
  seed: int
  tie_threshold: float | None
  folds: int | None


def analyse(
  name: str, table: score_files.ScoreTable, info: Mapping[str, Any], how: Analysis
) -> tuple[list[dict[str, Any]], dict[str, Any], metrics.RankedLists]:
  """Rows of the table, calibration per level, and the lists, of one benchmark.

  Args:
    info: the benchmark's entry in the summary.
  """
  of_prompt = score_files.numbered(table.prompts)
  lists = metrics.ranked_lists(
    score_files.numbered(table.ids),
    table.ranks,
    clusters=of_prompt,
    items=score_files.numbered(zip(table.prompts, table.images, strict=True)),
  )
  rows, calibration = [], {}
  for level, raw in zip(table.levels, table.raw.astype(np.float64), strict=True):
    row = dict(benchmark=name, format=info["format"])
    row |= dict(level=level.label, u=level.u, sigma=level.sigma)
    row |= metrics.agreement(
      lists,
      raw,
      interval=how.interval,
      num_resamples=how.num_resamples,
      seed=how.seed,
    )
    row |= dict.fromkeys(("tie_acc", "tie_threshold", "tie_fitted", "tie_credit"))
    if info["tie_credit"] is not None and len(lists.tied):
      acc, threshold = metrics.tie_accuracy(
        lists, raw, threshold=how.tie_threshold, credit=info["tie_credit"]
      )
      row |= dict(tie_acc=acc, tie_threshold=threshold)
      row |= dict(tie_fitted=how.tie_threshold is None, tie_credit=info["tie_credit"])
    row |= dict(bad_images=info["num_bad_images"], lost_pairs=info["lost_pairs"])
    rows.append(row)
    if how.folds is not None:
      gaps, groups = raw[lists.better] - raw[lists.worse], of_prompt[lists.better]
      if len(np.unique(groups)) < 2:
        note = "fewer than two prompts with ranked pairs: there is nothing to check on"
        calibration[level.label] = dict(note=note, num_pairs=len(gaps))
        continue
      calibration[level.label] = metrics.calibrate(
        gaps, groups, num_folds=how.folds, seed=how.seed
      )
  return rows, calibration, lists


# --- files --------------------------------------------------------------------------


class Folder:
  """The output folder; every file appears complete or not at all.

  Attributes:
    files: names of what was written.
  """

  def __init__(self, path: pathlib.Path):
    """Raises OSError now rather than after hours, if it cannot be written to."""
    self.path = path
    self.files: list[str] = []
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass

  def write(self, name: str, write: Callable[[pathlib.Path], Any]) -> None:
    """Calls `write` with a temporary path of the same suffix."""
    partial = self.path / f".partial-{os.getpid()}-{name}"
    try:
      write(partial)
      partial.replace(self.path / name)
    finally:
      partial.unlink(missing_ok=True)
    if name not in self.files:
      self.files.append(name)

  def json(self, name: str, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

  def csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    def write(path):
      with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    self.write(name, write)

  def remove(self, names: Iterable[str]) -> None:
    for name in names:
      (self.path / name).unlink(missing_ok=True)


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """`evaluation.json` of an output folder.

  Raises:
    DataError: it is not there, or no such file.
  """
  path = folder / SUMMARY
  try:
    summary = json.loads(path.read_text())
    found = summary["format"], summary["version"]
    if found != (FORMAT, VERSION):
      raise ValueError(f"it has (format, version) = {found}, not {FORMAT, VERSION}")
    for name, info in summary["benchmarks"].items():
      if missing := [key for key in NEEDED if key not in info]:
        raise ValueError(f"benchmark {name!r} lacks {missing}")
    if not isinstance(summary["files"], list):
      raise ValueError("its files are no list")
    return summary
  except OSError as e:
    raise DataError(
      f"{folder} holds no evaluation ({e}): evaluate a model first"
    ) from e
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise DataError(f"{path} does not describe an evaluation: {e!r}") from e


def report(
  folder: Folder,
  tables: Mapping[str, score_files.ScoreTable],
  summary: dict,
  how: Analysis,
) -> str:
  """Writes tables, figures and the summary; returns the tables for people."""
  rows: list[dict[str, Any]] = []
  calibrations: dict[str, dict] = {}
  for name, table in tables.items():
    mine, calibration, lists = analyse(name, table, summary["benchmarks"][name], how)
    rows += mine
    if len(lists.better):
      panels = {
        level.label: (scores[lists.better], scores[lists.worse])
        for level, scores in zip(table.levels, table.reported, strict=True)
      }
      title = f"Reported scores: {name}"
      draw = functools.partial(plots.score_histograms, panels=panels, title=title)
      folder.write(f"histogram_{name}.png", draw)
    if how.folds is not None:
      calibrations[name] = calibration
      curves = {
        level: {when: found[when]["bins"] for when in ("before", "after")}
        for level, found in calibration.items()
        if "after" in found
      }
      if curves:
        title = f"Confidence against accuracy: {name}"
        draw = functools.partial(plots.reliability, panels=curves, title=title)
        folder.write(f"calibration_{name}.png", draw)
  folder.csv("table.csv", rows)
  folder.json("table.json", rows)
  curves, ensembles = _accuracy_curves(rows)
  if curves or ensembles:
    draw = functools.partial(
      plots.accuracy_vs_sigma,
      curves=curves,
      ensembles=ensembles,
      title="Pair accuracy against noise level",
    )
    folder.write("accuracy_vs_noise.png", draw)
  text = format_table(rows)
  if how.folds is not None:
    folder.json("calibration.json", calibrations)
    text += "\n\n" + format_calibration(calibrations)
  settings = dataclasses.asdict(how)
  files = sorted({*folder.files, SUMMARY})
  folder.json(SUMMARY, summary | dict(analysis=settings, complete=True, files=files))
  return text


def _accuracy_curves(rows: Sequence[Mapping[str, Any]]) -> tuple[dict, dict]:
  """Arguments of `plots.accuracy_vs_sigma`; the first ensemble of each benchmark."""
  curves: dict[str, tuple[list, ...]] = {}
  ensembles: dict[str, tuple[float, float, float]] = {}
  nan = float("nan")
  for row in sorted(rows, key=lambda row: row["sigma"] or 0.0):  # lines go rightwards
    if row["acc"] is None:
      continue
    bounds = [nan if row[c] is None else row[c] for c in ("lo", "hi")]
    if row["sigma"] is None:
      ensembles.setdefault(row["benchmark"], (row["acc"], *bounds))
      continue
    curve = curves.setdefault(row["benchmark"], ([], [], [], []))
    for column, value in zip(curve, (row["sigma"], row["acc"], *bounds), strict=True):
      column.append(value)
  return curves, ensembles


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows for people, in percent where they are shares; empty columns are left out."""
  percent = lambda value: "" if value is None else f"{100 * value:.2f}"  # noqa: E731
  two = lambda value: "" if value is None else f"{value:.3f}"  # noqa: E731
  columns: dict[str, Callable[[Mapping], str]] = {
    "benchmark": lambda row: row["benchmark"],
    "level": lambda row: row["level"],
    "lists": lambda row: str(row["num_lists"]),
    "pairs": lambda row: str(row["num_pairs"]),
    "ties": lambda row: str(row["num_ties"] or ""),
    "bad": lambda row: str(row["bad_images"] or ""),
    "acc %": lambda row: percent(row["acc"]),
    "95 %": lambda row: _span(row, "lo", "hi"),
    "by": lambda row: row["interval"],
    "by list %": lambda row: percent(row["acc_by_list"]),
    "tau-b": lambda row: two(row["tau_b"]),
    "top-1 %": lambda row: percent(row["top1"]),
    "rank corr": lambda row: two(row["rank_corr"]),
    "with ties %": lambda row: percent(row["tie_acc"]) + "*" * bool(row["tie_fitted"]),
  }
  lines = [[show(row) for show in columns.values()] for row in rows]
  text = _aligned([list(columns), *lines])
  if any(row["tie_fitted"] for row in rows):
    text += "\n* with the tie threshold that is best for these very pairs"
  return text


def format_calibration(calibrations: Mapping[str, Mapping[str, dict]]) -> str:
  """Scales, and what they did to probabilities on pairs they were not fitted on."""
  figures = ("log_loss", "brier", "ece")
  lines = [["calibration", "level", "scale", *(f"{f} before/after" for f in figures)]]
  notes = []
  for name, levels in calibrations.items():
    for level, found in levels.items():
      line = [name, level, "", "", "", ""]
      if "after" in found:
        pairs = [(found["before"][f], found["after"][f]) for f in figures]
        line[2:] = [f"{found['scale']:.4g}", *(f"{a:.4f} / {b:.4f}" for a, b in pairs)]
      if found["note"] is not None:
        notes.append(f"{name}, {level}: {found['note']}")
      lines.append(line)
  return "\n".join([_aligned(lines), *notes])


def _span(row: Mapping[str, Any], low: str, high: str) -> str:
  if row[low] is None:
    return ""
  return f"{100 * row[low]:.2f}-{100 * row[high]:.2f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
  """Two columns of text, then numbers to the right; without empty columns."""
  kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
  lines = [[line[i] for i in kept] for line in lines]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )
