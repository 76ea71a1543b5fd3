"""Step-GRPO against Flow-GRPO at equal evaluations, ReFL and LPO beside them.

  python train/compare_align.py --config configs/quickstart_align.py

After `make quickstart`. Aligns the digit generator once per method and seed (each as
train/align.py does; finished runs are kept, interrupted ones continue), and asks what
each bought with its passes of the generator: reward, the opinion of an oracle that no
reward saw, diversity, and how far samples went from real digits that no model saw.

Leaves in `compare.workdir`: a run folder per method and seed, comparison.json (all
curves and numbers), comparison.md, comparison.png, before_after.png (the same prompts
and noise, at the start and after each method).
"""

from collections.abc import Callable, Sequence
import json
import pathlib
import runpy
import sys
import time

from absl import app, flags, logging
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np
from PIL import Image

from lrm_jax import alignment_report, checkpoint, compilation, plots, run_log, sheets
from lrm_jax.data import digits, prompts

import align  # isort: skip  (beside this file)

GetConfig = Callable[[str], ConfigDict]
REWARD, ORACLE = "eval/reward/reward", "eval/pixel/oracle"
ENLARGED = 6  # pixels of a digit's pixel in before_after.png


# --- the runs ----------------------------------------------------------------------


def run_configs(get_config: GetConfig, compare: ConfigDict) -> dict[str, list]:
  """Name -> a config per seed: its method's recipe with its settings changed.

  Raises:
    ValueError: a comparison that makes no sense, or a setting that there is not.
  """
  check(compare)
  found = {}
  two = (compare.slow, compare.fast)  # the order of tables and pictures
  for name in (*two, *(name for name in compare.runs if name not in two)):
    run = compare.runs[name]
    found[name] = []
    for seed in run.seeds:
      config = get_config(run.method)
      config.lock()  # a misspelt setting is an error
      try:
        config.update(run.settings)
      except (KeyError, TypeError) as e:
        raise ValueError(f"compare.runs.{name}.settings: {e}") from e
      config.seed = seed
      config.workdir = str(pathlib.Path(compare.workdir) / f"{name}_s{seed}")
      found[name].append(config)
  return found


def check(compare: ConfigDict) -> None:
  """Raises ValueError for a `compare` that makes no sense."""
  for key in ("fast", "slow"):
    if compare[key] not in compare.runs:
      raise ValueError(
        f"compare.{key}={compare[key]!r}: use one of {', '.join(compare.runs)}"
      )
  for name, run in compare.runs.items():
    if not run.seeds or len(set(run.seeds)) < len(run.seeds):
      raise ValueError(f"compare.runs.{name}.seeds={tuple(run.seeds)}: one or more")
  if not set(compare.runs[compare.fast].seeds) & set(compare.runs[compare.slow].seeds):
    raise ValueError(f"{compare.fast} and {compare.slow} have no seed in common")
  if compare.tail < 1 or compare.images < 1 or compare.claim <= 0:
    raise ValueError("compare.tail, images and claim must be positive")
  if not compare.drifts or not all(0 < part <= 1 for part in compare.drifts):
    raise ValueError(f"compare.drifts={tuple(compare.drifts)} must be within 0..1")


def finished(config: ConfigDict) -> bool:
  """Whether a run is complete in its folder.

  Raises:
    ValueError: another run is there.
  """
  workdir, total = pathlib.Path(config.workdir), config.train.num_iterations
  if not (workdir / "run.json").exists():
    return False
  run_log.check_same_run(workdir, config.to_dict(), align.MAY_CHANGE)
  lines = run_log.read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
  last = lines[-1]["step"] if lines else 0
  if last > total:
    raise ValueError(f"{workdir} has {last} iterations, not {total}: delete it")
  return last == total and (workdir / "lora").is_dir()


def check_folders(config: ConfigDict) -> None:
  """Raises ValueError: what is missing, and the command that makes it."""
  rewards = [term.folder for term in config.rewards.values()]
  needed = [config.model.generator, *rewards, config.prompts.cache]
  if missing := [path for path in needed if not pathlib.Path(path).is_dir()]:
    raise ValueError(f"{', '.join(missing)}: no such folder; run `make quickstart`")


# --- what they left ----------------------------------------------------------------


class Judge:
  """Distances of samples to real digits that nothing was trained on."""

  def __init__(self, split_seed: int):
    splits = digits.load_splits(split_seed)
    self._held_out, self._train = splits.held_out.images, splits.train
    self._oracle = digits.Oracle(splits.oracle)

  def frechet(self, images: np.ndarray) -> float:
    """Of pictures (p g 8 8 3) uint8."""
    flat = digits.from_pixels(images.reshape(-1, *images.shape[2:]))
    return digits.frechet_distance(flat, self._held_out)

  def real(self, prompts_read: Sequence[str], num: int) -> dict[str, float]:
    """As many real digits of the same prompts: what a perfect generator would get."""
    at = [digits.PROMPTS.index(prompt) for prompt in prompts_read]
    labels = np.repeat([digits.PROMPT_DIGITS[i] for i in at], num)
    pool = {d: np.flatnonzero(self._train.labels == d) for d in set(labels.tolist())}
    taken = dict.fromkeys(pool, 0)
    pick = []
    for d in labels.tolist():
      pick.append(pool[d][taken[d] % len(pool[d])])
      taken[d] += 1
    images = self._train.images[pick]
    groups = images.reshape(len(at), num, -1)
    # As `eval/diversity`: root mean square difference of two samples of a prompt.
    variance = groups.var(axis=1, ddof=1).mean(axis=-1)
    return {
      "oracle": float(self._oracle.prob(images, labels).mean()),
      "frechet": digits.frechet_distance(images, self._held_out),
      "diversity": float(np.sqrt(2 * variance).mean()),
    }


def load_images(workdir: pathlib.Path, step: int) -> np.ndarray:
  """(p g 8 8 3) uint8, of one evaluation."""
  with np.load(workdir / "sheets" / f"step_{step:06d}.npz") as file:
    return file["images"]


def load_curve(config: ConfigDict, judge: Judge) -> alignment_report.Curve:
  """The evaluations of a finished run."""
  workdir = pathlib.Path(config.workdir)
  lines = run_log.read_metrics(workdir)
  frechet = {
    line["step"]: judge.frechet(load_images(workdir, line["step"]))
    for line in lines
    if REWARD in line
  }
  return alignment_report.make_curve(
    config.seed, lines, frechet, reward=REWARD, oracle=ORACLE
  )


def draw_before_after(
  path: pathlib.Path,
  columns: dict[str, np.ndarray],
  prompts_read: Sequence[str],
  num: int,
) -> None:
  """A row per digit, each of its templates in turn; `num` samples per column."""
  of_digit = [digits.PROMPT_DIGITS[digits.PROMPTS.index(p)] for p in prompts_read]
  rows = []
  for digit in sorted(set(of_digit)):
    mine = [i for i, d in enumerate(of_digit) if d == digit]
    i = mine[digit % len(mine)]
    cells = []
    for images in columns.values():
      side_by_side = np.concatenate(list(images[i, :num]), axis=1)
      large = side_by_side.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
      cells.append((Image.fromarray(large), ""))
    rows.append((prompts_read[i], cells))
  sheets.draw(rows, list(columns)).save(path)


# --- the comparison ----------------------------------------------------------------


def report(
  configs: dict[str, list[ConfigDict]], compare: ConfigDict, seconds: float
) -> str:
  """Writes everything into `compare.workdir`; returns the tables."""
  workdir, judge = pathlib.Path(compare.workdir), Judge(compare.split_seed)
  some = configs[compare.fast][0]
  texts = prompts.read(some.prompts.eval)
  curves = {
    name: [load_curve(config, judge) for config in mine]
    for name, mine in configs.items()
  }
  comparison = alignment_report.Comparison(
    runs=curves,
    labels={name: run.label for name, run in compare.runs.items()},
    fast=compare.fast,
    slow=compare.slow,
    claim=compare.claim,
    tail=compare.tail,
    parts=tuple(compare.drifts),
    real=judge.real(texts, some.eval.num),
  )
  last = f"mean of the last {compare.tail} evaluations" if compare.tail > 1 else "last"
  intro = (
    f"Samples at evaluations: {len(texts)} prompts x {some.eval.num}, the same noise "
    "for all. ± is the standard deviation over seeds. Evaluations are passes of the "
    "generator in all samples of a run, scoring and updates (backward: two) included; "
    "seconds are iterations times their median time, without compiling and evaluating. "
    f"Final values: {last}."
  )
  text = alignment_report.tables(comparison, intro)
  (workdir / "comparison.md").write_text(text)
  values = {
    "settings": compare.to_dict(),
    "seconds": seconds,
    "verdict": alignment_report.verdict(comparison),
    **comparison.to_dict(),
  }
  (workdir / "comparison.json").write_text(json.dumps(values, indent=2) + "\n")
  plots.seeds(
    workdir / "comparison.png",
    alignment_report.panels(comparison),
    title="Aligning a digit generator",
  )
  columns = {"start": load_images(pathlib.Path(some.workdir), 0)}
  for name, mine in configs.items():
    last = mine[0].train.num_iterations
    columns[compare.runs[name].label] = load_images(pathlib.Path(mine[0].workdir), last)
  draw_before_after(workdir / "before_after.png", columns, texts, compare.images)
  return text


def run(get_config: GetConfig, compare: ConfigDict) -> bool:
  """All runs that are not finished, and the report.

  Returns: False if a signal ended it early; the same command continues.
  """
  start = time.monotonic()
  configs = run_configs(get_config, compare)
  # The two that the question is about first, seed by seed.
  rest = [c for mine in configs.values() for c in mine]
  first = [c for name in (compare.fast, compare.slow) for c in configs[name]]
  rest = [c for c in rest if c not in first]
  todo = [*sorted(first, key=lambda c: c.seed), *rest]
  todo = [c for c in todo if not finished(c)]
  for mine in configs.values():
    check_folders(mine[0])
  for i, config in enumerate(todo, 1):
    print(
      f"{time.monotonic() - start:4.0f} s  run {i} of {len(todo)}: {config.workdir}",
      file=sys.stderr,
      flush=True,
    )
    if not align.train(config):
      return False
    jax.clear_caches()  # programs of a run are of no use to the next one
  print(report(configs, compare, time.monotonic() - start))
  print(f"wrote {compare.workdir}/comparison.json, .md, .png, before_after.png")
  return True


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
  checkpoint.report_failures_once()
  flag = flags.FLAGS["config"]
  try:
    given = config_flags.get_override_values(flag)
    if others := [key for key in given if not key.startswith("compare.")]:
      raise ValueError(
        f"--config.{others[0]} would change one method only: set it in the settings of "
        "compare.runs"
      )
    file = config_flags.get_config_filename(flag)
    compilation.configure()  # once for all seeds
    run(runpy.run_path(file)["get_config"], flags.FLAGS.config.compare)
  except (ValueError, OSError, FloatingPointError) as e:
    raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
  # Here, because tests import the other trainers, with this flag, as well.
  config_flags.DEFINE_config_file("config", None, "a file of configs/")
  flags.mark_flag_as_required("config")
  app.run(main)
