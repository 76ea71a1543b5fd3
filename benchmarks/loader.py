"""How fast training pairs are read and decoded, relative to PyTorch in the same run.

Synthetic pairs of real sizes (random latents of 512 px images, prompt embeddings of 205
tokens) are written to a folder and read back as numpy batches; nothing touches a
device. Ours is the trainer's loader: batch plan, Grain, prompt cache. It reads

  parquet, window    samples shuffled within windows of row groups, as the recipes do
  parquet, shuffled  over whole buckets: why there is a window. (Here the cache holds 4
                     of the 10 row groups; of thousands, each pair would decode one.)
  tfds, shuffled     ArrayRecord, where any order costs the same

PyTorch's side is a DataLoader with as many workers, over the same parquet files. What
DiNa-LRM's public training code does for a sample is: open its parquet file, read its
row group, and keep one row; a worker makes whole batches of one bucket. So here, in
__getitem__, with np.load and torch.stack:

  torch              as described
  torch, keeps       each worker keeps the row group that it read last
  torch, window      that, and the order is ours, with windows of one row group

It reads no prompt embeddings (1.7 MB per pair that only our side reads; `latents only`
is ours without them), checks nothing, and leaves latents channels first.

All of them take turns, round after round, so that a machine that slows down slows all;
reported are medians over rounds. Files are in the page cache: this measures decoding,
not storage. CPU time is that of all threads and workers; it depends less on what else
the machine does.

  python benchmarks/loader.py --out benchmarks/results/loader_cpu.json
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrm_jax.data import loader as loader_lib
from lrm_jax.data import parquet, prompt_cache, tfds_pairs
from lrm_jax.data import plan as plan_lib
from lrm_jax.data import source as source_lib

# What one H200 takes: a step of 16 pairs of 512 px (LoRA, 12 blocks) at the speed the
# project aims for. A slower step needs less.
STEP_PAIRS, STEP_SECONDS = 16, 0.240
SPLIT = "train"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the synthetic data.

  Attributes:
    latents: (h, w, c) of each bucket: 512 x 512 and 576 x 448 pixels.
    pairs, prompts: how many.
    rows_per_group: pairs in a row group.
    context, pooled: of a prompt's embeddings.
  """

  latents: tuple[tuple[int, int, int], ...] = ((64, 64, 16), (72, 56, 16))
  pairs: int = 1000
  prompts: int = 128
  rows_per_group: int = 100
  context: tuple[int, int] = (205, 4096)
  pooled: int = 2048


@dataclasses.dataclass(frozen=True)
class Run:
  """Some batches by one way of reading.

  Attributes:
    samples: pairs that came.
    seconds: by the clock, from making the iterator to the last batch.
    cpu_seconds: of all threads and workers.
    row_groups: read and decoded; None where there are none.
  """

  samples: int
  seconds: float
  cpu_seconds: float
  row_groups: int | None


# --- data --------------------------------------------------------------------------


def write_data(folder: pathlib.Path, sizes: Sizes) -> None:
  """`pairs` (parquet), `tfds` and `prompts`, pairs of one bucket after the other's."""
  rng = np.random.default_rng(0)
  each = math.ceil(sizes.pairs / len(sizes.latents))

  def records(bucket: int) -> Iterator[dict[str, Any]]:
    shape = sizes.latents[bucket]
    for i in range(min(each, sizes.pairs - bucket * each)):
      chosen, rejected = rng.standard_normal((2, *shape), np.float32)
      prompt = f"prompt {i % sizes.prompts}"
      yield dict(prompt=prompt, chosen=chosen, rejected=rejected)

  for bucket in range(len(sizes.latents)):
    parquet.write_part(
      folder / "pairs" / f"part-{bucket}.parquet",
      records(bucket),
      rows_per_group=sizes.rows_per_group,
    )
  parquet.write_index(folder / "pairs")
  tfds_pairs.write(folder / "tfds", {SPLIT: parquet.ParquetPairs(folder / "pairs")})
  dtype = ml_dtypes.bfloat16
  context = rng.standard_normal(sizes.context, np.float32).astype(dtype)
  pooled = rng.standard_normal(sizes.pooled, np.float32).astype(dtype)
  with prompt_cache.PromptCacheWriter(
    folder / "prompts",
    t5_length=sizes.context[0] - min(sizes.context[0], 77),
    dtype="bfloat16",
    encoder="random",
  ) as out:
    for i in range(sizes.prompts):
      name = f"prompt {i}"
      out.append([name], np.roll(context, i, 0)[None], np.roll(pooled, i)[None])


# --- this project's loader ---------------------------------------------------------


class FirstBatches(plan_lib.BatchPlan):
  """A plan cut off after `limit` batches."""

  limit: int

  @property
  def num_batches(self) -> int:
    return self.limit


def first_batches(
  source: source_lib.PairSource,
  batch_size: int,
  limit: int,
  *,
  seed: int,
  window: int | None = None,
) -> FirstBatches:
  """The first batches of a shuffled plan, as the trainer makes it."""
  plan = FirstBatches(
    source.bucket, source.block, batch_size=batch_size, seed=seed, window=window
  )
  plan.limit = limit
  return plan


@contextlib.contextmanager
def counting_row_groups() -> Iterator[list[int]]:
  """Yields a list that gets an entry for each row group this process reads."""
  reads, read = [], pq.ParquetFile.read_row_group

  def counted(self, i: int, *args: Any, **kwargs: Any) -> pa.Table:
    reads.append(i)
    return read(self, i, *args, **kwargs)

  with mock.patch.object(pq.ParquetFile, "read_row_group", counted):
    yield reads


def run_ours(
  source: source_lib.PairSource,
  text_fn: loader_lib.TextFn,
  plan: plan_lib.BatchPlan,
  threads: int,
) -> Run:
  """All batches of a plan that ends."""
  samples = 0
  loader = loader_lib.make_loader(
    source,
    plan,
    range(plan.batch_size),
    text_fn=text_fn,
    num_threads=threads,
  )
  with counting_row_groups() as reads:
    start, cpu = time.perf_counter(), time.process_time()
    for batch in loader:
      samples += len(batch["chosen"])
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  in_row_groups = isinstance(source, parquet.ParquetPairs)
  return Run(samples, seconds, cpu, len(reads) if in_row_groups else None)


# --- PyTorch's ---------------------------------------------------------------------


class RowGroupDataset:
  """A map-style dataset over rows of parquet files; index: (keep, pair).

  `keep` is whether a row group that was read last may be used again: one set of
  workers serves all variants.
  """

  def __init__(self, places: Sequence[tuple[str, int, int]]):
    self._places = tuple(places)  # file, row group, row
    self._last: tuple[tuple[str, int], pa.Table] | None = None

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: tuple[bool, int]) -> dict[str, Any]:
    import torch

    keep, i = index
    file, row_group, row = self._places[i]
    read = not (keep and self._last and self._last[0] == (file, row_group))
    if read:
      columns = ["prompt", "latent1", "latent2"]
      table = pq.ParquetFile(file).read_row_group(row_group, columns=columns)
      self._last = ((file, row_group), table) if keep else None
    else:
      table = self._last[1]
    item = {
      name: torch.from_numpy(np.load(io.BytesIO(table[column][row].as_py())))
      for name, column in (("chosen", "latent1"), ("rejected", "latent2"))
    }
    return {**item, "prompt": table["prompt"][row].as_py(), "read": int(read)}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
  """A batch, and what it took: row groups, and CPU seconds of the worker so far."""
  import torch

  return {
    "chosen": torch.stack([item["chosen"] for item in items]),
    "rejected": torch.stack([item["rejected"] for item in items]),
    "prompt": [item["prompt"] for item in items],
    "read": sum(item["read"] for item in items),
    "cpu": (os.getpid(), time.process_time()),
  }


class Torch:
  """A DataLoader whose batches can be changed; its workers stay."""

  def __init__(self, folder: pathlib.Path, workers: int):
    """
    Raises:
      ModuleNotFoundError: torch (the `convert` extra) is missing.
    """
    import torch.utils.data

    index = parquet.read_index(folder)
    places = zip(
      [index.files[i] for i in index.file],
      index.row_group.tolist(),
      index.row.tolist(),
      strict=True,
    )
    self._batches: list[list[tuple[bool, int]]] = []
    self._cpu: dict[int, float] = {}  # worker -> CPU seconds so far
    self._loader = torch.utils.data.DataLoader(
      RowGroupDataset(list(places)),
      batch_sampler=self._batches,
      num_workers=workers,
      collate_fn=collate,
      persistent_workers=workers > 0,
      # Threads of Arrow and Grain are running: forked workers could hang.
      multiprocessing_context="spawn" if workers else None,
    )
    self._workers = workers

  def run(self, plan: plan_lib.BatchPlan, *, keep: bool) -> Run:
    """All batches of a plan that ends."""
    self._batches[:] = [
      [(keep, int(i)) for i in plan.batch(step)] for step in range(plan.num_batches)
    ]
    samples, row_groups, before = 0, 0, sum(self._cpu.values())
    start, cpu = time.perf_counter(), time.process_time()
    for batch in self._loader:
      samples += len(batch["chosen"])
      row_groups += batch["read"]
      pid, used = batch["cpu"]
      self._cpu[pid] = used
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if self._workers:
      cpu += sum(self._cpu.values()) - before
    return Run(samples, seconds, cpu, row_groups)


# --- side by side ------------------------------------------------------------------


def variants(
  folder: pathlib.Path,
  sizes: Sizes,
  *,
  batch_size: int,
  window: int,
  threads: int,
  slow_batches: int,
  with_torch: bool = True,
) -> dict[str, Callable[[int], Run]]:
  """Name -> a function of the round's seed."""
  # As the recipes: window x buckets.
  cache_blocks = window * len(sizes.latents)
  rows = parquet.ParquetPairs(folder / "pairs", cache_blocks=cache_blocks)
  records = tfds_pairs.TfdsPairs(folder / "tfds", SPLIT)
  text = loader_lib.cached_text(prompt_cache.PromptCache(folder / "prompts"))
  epoch = sizes.pairs // batch_size

  def ours(source, text_fn, batches, shuffle_window, seed):
    plan = first_batches(source, batch_size, batches, seed=seed, window=shuffle_window)
    return run_ours(source, text_fn, plan, threads)

  out = {
    "parquet, window": functools.partial(ours, rows, text, epoch, window),
    "parquet, window, latents only": functools.partial(
      ours, rows, lambda prompts: {}, epoch, window
    ),
    "parquet, shuffled": functools.partial(ours, rows, text, slow_batches, None),
    "tfds, shuffled": functools.partial(ours, records, text, epoch, None),
  }
  if not with_torch:
    return out
  torch_loader = Torch(folder / "pairs", threads)
  start = first_batches(rows, batch_size, max(1, threads), seed=0)
  torch_loader.run(start, keep=False)  # starts the workers

  def theirs(keep, batches, shuffle_window, seed):
    plan = first_batches(rows, batch_size, batches, seed=seed, window=shuffle_window)
    return torch_loader.run(plan, keep=keep)

  return out | {
    "torch": functools.partial(theirs, False, slow_batches, None),
    "torch, keeps": functools.partial(theirs, True, slow_batches, None),
    "torch, window": functools.partial(theirs, True, epoch, 1),
  }


def measure(ways: dict[str, Callable[[int], Run]], rounds: int) -> list[dict[str, Any]]:
  """A row of results per way: medians over rounds, and their range."""
  runs: dict[str, list[Run]] = {name: [] for name in ways}
  for i in range(rounds):
    for name, way in ways.items():
      runs[name].append(way(i))
  rows = []
  for name, mine in runs.items():
    rates = [run.samples / run.seconds for run in mine]
    groups = [
      run.row_groups / run.samples for run in mine if run.row_groups is not None
    ]
    rows.append(
      {
        "name": name,
        "samples_per_s": statistics.median(rates),
        "samples_per_s_min": min(rates),
        "samples_per_s_max": max(rates),
        "cpu_ms_per_sample": statistics.median(
          1e3 * run.cpu_seconds / run.samples for run in mine
        ),
        "row_groups_per_sample": statistics.median(groups) if groups else None,
        "rounds": [dataclasses.asdict(run) for run in mine],
      }
    )
  return rows


def ratios(rows: Sequence[dict[str, Any]], to: str) -> list[float | None]:
  """Speed of each row in units of the row `to`: medians over rounds; None: no such."""
  base = next((row for row in rows if row["name"] == to), None)
  if base is None:
    return [None] * len(rows)
  rate = lambda run: run["samples"] / run["seconds"]  # noqa: E731
  return [
    statistics.median(
      rate(mine) / rate(other)
      for mine, other in zip(row["rounds"], base["rounds"], strict=True)
    )
    for row in rows
  ]


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  needed = STEP_PAIRS / STEP_SECONDS
  lines = [
    "| | pairs/s (range) | of an H200's need | to torch | CPU ms per pair "
    "| row groups decoded per pair |",
    "|---|---|---|---|---|---|",
  ]
  for row, ratio in zip(rows, ratios(rows, "torch"), strict=True):
    groups = row["row_groups_per_sample"]
    lines.append(
      f"| {row['name']} | {row['samples_per_s']:.1f} ({row['samples_per_s_min']:.1f} "
      f"to {row['samples_per_s_max']:.1f}) | {row['samples_per_s'] / needed:.2f} | "
      + ("-" if ratio is None else f"{ratio:.1f}")
      + f" | {row['cpu_ms_per_sample']:.1f} | "
      + ("-" if groups is None else f"{groups:.3f}")
      + " |"
    )
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  defaults = Sizes()
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--pairs", type=int, default=defaults.pairs)
  parser.add_argument("--rows-per-group", type=int, default=defaults.rows_per_group)
  parser.add_argument("--batch", type=int, default=16, help="pairs per batch")
  parser.add_argument("--window", type=int, default=2, help="row groups")
  parser.add_argument("--threads", type=int, default=2, help="and workers of PyTorch")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument(
    "--slow-batches", type=int, default=4, help="where an epoch would take too long"
  )
  parser.add_argument("--no-torch", action="store_true", help="only our side")
  parser.add_argument("--work", help="folder for the data (default: a temporary one)")
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)

  sizes = dataclasses.replace(
    defaults, pairs=args.pairs, rows_per_group=args.rows_per_group
  )
  with tempfile.TemporaryDirectory(dir=args.work) as work:
    folder = pathlib.Path(work)
    write_data(folder, sizes)
    ways = variants(
      folder,
      sizes,
      batch_size=args.batch,
      window=args.window,
      threads=args.threads,
      slow_batches=args.slow_batches,
      with_torch=not args.no_torch,
    )
    rows = measure(ways, args.rounds)
  skip = ("out", "work")
  report = {
    **{k: v for k, v in vars(args).items() if k not in skip},
    "sizes": dataclasses.asdict(sizes),
    "cores": len(os.sched_getaffinity(0)),
    "machine": platform.machine(),
    "load_average": os.getloadavg()[0],
    "pyarrow": pa.__version__,
    "torch": None if args.no_torch else sys.modules["torch"].__version__,
    "needed_samples_per_s": STEP_PAIRS / STEP_SECONDS,
    "ratio_to_torch": dict(
      zip([r["name"] for r in rows], ratios(rows, "torch"), strict=True)
    ),
    "rows": rows,
  }
  print(
    f"{args.threads} threads or workers on {report['cores']} cores; one H200 takes up "
    f"to {report['needed_samples_per_s']:.0f} pairs/s ({STEP_PAIRS} per "
    f"{1e3 * STEP_SECONDS:.0f} ms)\n\n{table(rows)}"
  )
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
