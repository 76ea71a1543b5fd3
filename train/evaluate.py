"""Evaluates a reward model on benchmarks of human preference, in one table.

  python train/evaluate.py --model models/dina --out runs/eval \\
      --data hpdv3=hpdv3:HPDv3/test.json --data hpdv2=hpdv2:HPDv2/test.json \\
      --images hpdv2=HPDv2/test --u 0,0.1,0.4 --ensemble 0.1,0.3,0.5 --calibrate
  python train/evaluate.py --from-scores runs/eval

docs/evaluation.md explains formats, figures and files. The second form makes tables and
figures anew from the scores of the first, without a model.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
import re
import shutil
import sys
import time
from typing import Any

import jax

import lrm_jax
from lrm_jax import benchmark_scores, build, compilation, evaluation, metrics, scorer
from lrm_jax import folder as folder_lib
from lrm_jax.data import benchmarks, prompt_cache, score_files
from lrm_jax.models import qformer_head


class Progress:
  """`hpdv3  120/300 lists [####......]  31.2 images/s  20 s left  2 bad`, on stderr."""

  def __init__(self, name: str, total: int):
    self._name, self._total = name, total
    self._in_place = sys.stderr.isatty()
    self._interval = 0.5 if self._in_place else 30.0
    self._start = time.monotonic()
    self._shown_at = self._start
    self._width = 0

  def __call__(self, lists: int, images: int, bad: int) -> None:
    now = time.monotonic()
    if now - self._shown_at < self._interval:
      return
    self._shown_at = now
    self._show(lists, images, bad, now)

  def close(self, lists: int, images: int, bad: int) -> None:
    self._show(lists, images, bad, time.monotonic())
    if self._in_place:
      print(file=sys.stderr)

  def _show(self, lists: int, images: int, bad: int, now: float) -> None:
    seconds = max(now - self._start, 1e-9)
    bar = "#" * (20 * lists // self._total)
    text = f"{self._name}  {lists}/{self._total} lists [{bar:.<20}]"
    text += f"  {images / seconds:.3g} images/s"
    if 0 < lists < self._total:
      text += f"  {seconds * (self._total - lists) / lists:.0f} s left"
    if bad:
      text += f"  {bad} bad"
    start, end = ("\r", "") if self._in_place else ("", "\n")
    print(start + text.ljust(self._width), end=end, file=sys.stderr, flush=True)
    self._width = len(text)


# --- the command line ---------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", help="model folder")
  parser.add_argument(
    "--data",
    action="append",
    default=[],
    metavar="NAME=FORMAT:PATH",
    help=f"a benchmark, may be repeated; formats: {', '.join(benchmarks.FORMATS)}",
  )
  parser.add_argument(
    "--images",
    action="append",
    default=[],
    metavar="[NAME=]ROOT",
    help="folder that image paths start from, of one benchmark or of all others "
    "(default: the data file's)",
  )
  parser.add_argument("--out", type=pathlib.Path, help="output folder")
  parser.add_argument(
    "--force", action="store_true", help="replace an evaluation there"
  )
  levels = parser.add_mutually_exclusive_group()
  levels.add_argument(
    "--u", help="noise levels as the model was published with them, e.g. 0,0.1,0.4"
  )
  levels.add_argument("--sigmas", help="exact noise levels instead, nothing looked up")
  parser.add_argument(
    "--ensemble",
    action="append",
    default=[],
    metavar="LEVELS",
    help="levels to be scored together, e.g. 0.1,0.3,0.5; may be repeated",
  )
  parser.add_argument(
    "--ensemble-mode",
    choices=scorer.ENSEMBLE_MODES,
    help="default: tokens for Q-Former heads, else mean",
  )
  parser.add_argument(
    "--noise",
    choices=benchmark_scores.NOISE,
    default="shared",
    help="one noise for all images of a prompt, or one each",
  )
  parser.add_argument(
    "--seed", type=int, default=0, help="of noise, bootstrap and folds"
  )
  parser.add_argument(
    "--limit", type=int, help="only the first lists of each benchmark"
  )
  parser.add_argument("--batch-size", type=int, default=scorer.BATCH_SIZE)
  parser.add_argument("--dtype", default="float32", choices=scorer.DTYPES)
  parser.add_argument("--t5-length", type=int, default=256, help="tokens, at most 512")
  parser.add_argument("--prompt-cache", help="folder of prompt embeddings to use")
  parser.add_argument(
    "--no-resize", action="store_true", help="crop images only, ignoring the buckets"
  )
  parser.add_argument("--scores", choices=("csv", "parquet"), default="csv")
  parser.add_argument("--interval", choices=metrics.INTERVALS, default="auto")
  parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
  parser.add_argument(
    "--tie-threshold",
    type=float,
    help="raw scores that differ by no more are a tie (default: the best threshold)",
  )
  parser.add_argument(
    "--calibrate",
    type=int,
    nargs="?",
    const=5,
    metavar="FOLDS",
    help="fit scores as log-odds, checked in so many folds (default: 5)",
  )
  parser.add_argument(
    "--from-scores",
    type=pathlib.Path,
    metavar="DIR",
    help="an output folder whose tables and figures to make anew (in --out, if given)",
  )
  return parser


# Options that need the model; --from-scores cannot change them any more.
_OF_SCORING = (
  "model data images u sigmas ensemble ensemble_mode noise limit batch_size dtype "
  "t5_length prompt_cache no_resize scores"
).split()


def parse_levels(option: str, text: str) -> tuple[float, ...]:
  """`0,0.1,0.4` as numbers in [0, 1], each once."""
  try:
    levels = tuple(float(part) for part in text.split(","))
  except ValueError:
    levels = ()
  if not levels or not all(0 <= level <= 1 for level in levels):
    raise ValueError(f"{option} {text!r}: give noise levels in [0, 1], e.g. 0,0.1,0.4")
  if len(set(levels)) < len(levels):
    raise ValueError(f"{option} {text!r}: a level is there twice")
  return levels


def parse_data(data: Sequence[str], images: Sequence[str]) -> dict[str, tuple]:
  """name -> (format, path, image folder or None)."""
  specs: dict[str, tuple] = {}
  for text in data:
    found = re.fullmatch(r"([\w.-]+)=(\w+):(.+)", text)
    if not found:
      raise ValueError(
        f"--data {text!r}: give NAME=FORMAT:PATH, e.g. hpdv3=hpdv3:HPDv3/test.json"
      )
    name, format, path = found.groups()
    if format not in benchmarks.FORMATS:
      raise ValueError(
        f"--data {text!r}: format {format!r} is none of {', '.join(benchmarks.FORMATS)}"
      )
    if name in specs:
      raise ValueError(f"--data: two benchmarks are called {name!r}")
    specs[name] = (format, path, None)
  roots: dict[str | None, str] = {}
  for text in images:
    name, separator, root = text.partition("=")
    if not separator or name not in specs:
      name, root = None, text
    if name in roots:
      raise ValueError(f"--images: two folders for {name or 'all benchmarks'}")
    roots[name] = root
  holds_latents = ("latents", "tfds")
  for name, (format, path, _) in specs.items():
    default = None if format in holds_latents else roots.get(None)
    specs[name] = (format, path, roots.get(name, default))
  return specs


def _check_numbers(args: argparse.Namespace) -> None:
  """Bounds that argparse does not know."""
  for name, low in (("batch_size", 1), ("limit", 1), ("resamples", 100), ("seed", 0)):
    value = getattr(args, name)
    if value is not None and value < low:
      raise ValueError(f"--{name.replace('_', '-')} {value} must be {low} or more")
  if args.calibrate is not None and args.calibrate < 2:
    raise ValueError(f"--calibrate {args.calibrate}: two folds or more")
  if args.tie_threshold is not None and not args.tie_threshold >= 0:
    raise ValueError(f"--tie-threshold {args.tie_threshold} must be 0 or more")


def _open_folder(path: pathlib.Path, force: bool) -> tuple[evaluation.Folder, list]:
  """The output folder, and the files of an earlier evaluation to be removed from it."""
  old: list[str] = []
  if (path / evaluation.SUMMARY).exists():
    if not force:
      raise FileExistsError(
        f"{path} holds an evaluation: choose another or pass --force"
      )
    files = evaluation.read_summary(path)["files"]
    old = [pathlib.Path(name).name for name in files]
  return evaluation.Folder(path), old


def evaluate(args: argparse.Namespace, how: evaluation.Analysis) -> str:
  """Scores all benchmarks and writes everything; returns the tables."""
  for option in ("model", "data", "out"):
    if not getattr(args, option):
      raise ValueError(f"--{option} is needed (or --from-scores)")
  # Cheap checks first: loading a model takes minutes.
  specs = parse_data(args.data, args.images)
  text = args.u if args.sigmas is None else args.sigmas
  us = None if text is None else parse_levels("--u or --sigmas", text)
  ensembles = tuple(parse_levels("--ensemble", text) for text in args.ensemble)
  folder_lib.find(args.model, "reward")
  folder, old = _open_folder(args.out, args.force)
  opened = {name: benchmarks.read(*spec) for name, spec in specs.items()}
  cache = None
  if args.prompt_cache is not None:
    cache = prompt_cache.PromptCache(args.prompt_cache)
    for benchmark in opened.values():
      if not benchmark.is_latent:  # whose prompts are read along with the latents
        order = benchmark.order(args.limit)
        cache.require(benchmark[int(i)].prompt for i in order)

  model = scorer.Scorer.load(
    args.model,
    dtype=args.dtype,
    t5_length=args.t5_length,
    exact_levels=args.sigmas is not None,
  )
  mode = args.ensemble_mode
  if mode is None:
    is_qformer = isinstance(model.config.head, qformer_head.QFormerHeadConfig)
    mode = "tokens" if is_qformer else "mean"
  plan = benchmark_scores.Plan(
    us=(model.scoring.u_image,) if us is None else us,
    ensembles=ensembles,
    mode=mode,
    word="u" if args.sigmas is None else "sigma",
    noise=args.noise,
    seed=args.seed,
    batch_size=args.batch_size,
    resize=not args.no_resize,
  )
  prompts = benchmark_scores.Prompts(model, cache, build.dtype(args.dtype))
  print(f"loaded {args.model} on {jax.devices()[0].device_kind}", file=sys.stderr)

  options = vars(args).items()
  settings = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in options}
  summary: dict[str, Any] = dict(
    format=evaluation.FORMAT,
    version=evaluation.VERSION,
    model=str(args.model),
    plan=dataclasses.asdict(plan),
    settings=settings,
    prompt_encoder=None if cache is None else cache.encoder,
    versions=_versions(),
    device=jax.devices()[0].device_kind,
    benchmarks={},
    complete=False,
  )
  folder.remove(old)
  tables: dict[str, score_files.ScoreTable] = {}
  for name, benchmark in opened.items():
    for note in benchmark.notes:
      print(f"{name}: {note}", file=sys.stderr)
    total = min(len(benchmark), args.limit or len(benchmark))
    progress = Progress(name, total)
    scored = benchmark_scores.score(
      benchmark, model, plan, prompts, limit=args.limit, progress=progress
    )
    num_images = len(set(zip(scored.table.prompts, scored.table.images, strict=True)))
    progress.close(total, num_images, len(scored.bad_images))
    tables[name] = scored.table
    file = f"scores_{name}.{args.scores}"
    folder.write(file, functools.partial(score_files.write, table=scored.table))
    if scored.bad_images:
      folder.csv(f"bad_images_{name}.csv", scored.bad_images)
    format, path, root = specs[name]
    summary["benchmarks"][name] = dict(
      format=format,
      path=path,
      images=root,
      scores=file,
      num_lists=total,
      tie_credit=benchmark.tie_credit,
      excluded=benchmark.excluded,
      notes=benchmark.notes,
      num_bad_images=len(scored.bad_images),
      lost_pairs=scored.lost_pairs,
    )
    # Hours of scores should survive whatever happens to the next benchmark.
    folder.json(
      evaluation.SUMMARY,
      summary | dict(files=sorted({*folder.files, evaluation.SUMMARY})),
    )
  return evaluation.report(folder, tables, summary, how)


def evaluate_again(args: argparse.Namespace, how: evaluation.Analysis) -> str:
  """Tables and figures from the score files of an earlier evaluation."""
  defaults = _parser().parse_args([])
  changed = [
    f"--{name.replace('_', '-')}"
    for name in _OF_SCORING
    if getattr(args, name) != getattr(defaults, name)
  ]
  if changed:
    raise ValueError(
      f"{', '.join(changed)}: --from-scores takes the scores as they are"
    )
  source = args.from_scores
  summary = evaluation.read_summary(source)
  tables = {
    name: score_files.read(source / info["scores"])
    for name, info in summary["benchmarks"].items()
  }
  in_place = args.out is None or args.out.resolve() == source.resolve()
  if in_place:
    folder = evaluation.Folder(source)
    folder.files = [name for name in summary["files"] if (source / name).is_file()]
  else:
    folder, old = _open_folder(args.out, args.force)
    folder.remove(old)
    summary["scores_from"] = str(source)
    for name, info in summary["benchmarks"].items():
      for file in (info["scores"], f"bad_images_{name}.csv"):
        if (source / file).is_file():
          folder.write(file, functools.partial(shutil.copyfile, source / file))
  return evaluation.report(folder, tables, summary, how)


def _versions() -> dict[str, str]:
  packages = ("jax", "jaxlib", "flax", "numpy", "pillow", "pyarrow")
  found = {name: importlib.metadata.version(name) for name in packages}
  return dict(python=platform.python_version(), lrm_jax=lrm_jax.__version__, **found)


def main(argv: Sequence[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  compilation.configure()
  try:
    _check_numbers(args)
    how = evaluation.Analysis(
      interval=args.interval,
      num_resamples=args.resamples,
      seed=args.seed,
      tie_threshold=args.tie_threshold,
      folds=args.calibrate,
    )
    text = (
      evaluate(args, how) if args.from_scores is None else evaluate_again(args, how)
    )
  except (ValueError, OSError, FloatingPointError) as e:
    raise SystemExit(f"error: {e}") from e
  print(text)
  print(f"wrote {args.out or args.from_scores}")


if __name__ == "__main__":
  main()
