"""Adds prompt embeddings to a cache that training reads (lrm_jax/data/prompt_cache.py).

  python convert/precompute_prompts.py --model models/sd35m --json train.json \\
      --parquet data/train --out data/prompts_t5_128 --t5-length 128

The empty prompt is always among them: prompt dropout needs it. Prompts that the cache
holds are not encoded again, so a run that was stopped continues where it was. Several
hosts can share the work: each runs the same command, with its own --host-index.
"""

import argparse
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
import pathlib
import sys
import warnings

import command_line
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tqdm

from lrm_jax import build, encoders, sharding
from lrm_jax import folder as folder_lib
from lrm_jax.data import parquet, preference_json, prompt_cache
from lrm_jax.data.source import DataError

DTYPES = tuple(prompt_cache.DTYPES)


def say(line: str) -> None:
  """Progress and warnings, which are not results."""
  print(line, file=sys.stderr, flush=True)


def context_dim(model: pathlib.Path) -> int:
  """Width of the context that the folder's transformer takes.

  Raises:
    FolderError: the folder holds nothing that tells.
  """
  widths: dict[str, Callable] = {
    "t5": lambda config: config.dim,
    "transformer": lambda config: config.context_dim,
    "reward": lambda config: config.backbone.context_dim,
  }
  for name, width in widths.items():
    if folder_lib.has(model, name):
      entry = folder_lib.find(model, name)[1]
      return width(build.config_from_dict(entry["config"]))
  raise folder_lib.FolderError(
    f"{model} holds none of {', '.join(widths)}, so the width of prompt embeddings is "
    "not known: convert one of them too"
  )


def encode(
  model: pathlib.Path,
  out: pathlib.Path,
  prompts: Iterable[str],
  *,
  t5_length: int,
  dtype: str,
  batch_size: int = 8,
  host_index: int = 0,
  host_count: int = 1,
) -> int:
  """Adds this host's share of the prompts, and of the empty one, to the cache `out`.

  Args:
    prompts: all of them, in the same order on every host.
    dtype: of the encoders, and of what is stored.
    batch_size: prompts per device at a time.

  Returns: how many were added.

  Raises:
    FolderError: the model folder has no text encoders.
    DataError: `out` is a cache of other encoders or settings.
  """
  mine = list(dict.fromkeys(["", *prompts]))[host_index::host_count]
  mesh = sharding.make_mesh(devices=jax.local_devices())
  encoder = encoders.TextEncoder(
    model,
    t5_length=t5_length,
    context_dim=context_dim(model),
    dtype=dtype,
    sharding=sharding.replicated(mesh),
  )
  writer = prompt_cache.PromptCacheWriter(
    out,
    t5_length=t5_length,
    dtype=dtype,
    encoder=encoder.fingerprint(),
    host=host_index,
  )
  rows = batch_size * mesh.size

  cut: set[str] = set()  # encoders that have cut a prompt

  def dispatch(batch: Sequence[str]) -> tuple[Sequence[str], jax.Array, jax.Array]:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      ids = encoder.tokenize([*batch, *[""] * (rows - len(batch))])  # of one shape
    for warning in caught:
      # One for each encoder: there may be a hundred thousand.
      name = str(warning.message).split()[0]
      if name not in cut:
        say(f"warning: {warning.message} (not said again of other prompts)")
      cut.add(name)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
      cond = encoder(jax.device_put(ids, sharding.batch_sharding(mesh)))
    return batch, cond.context, cond.pooled

  with writer:
    todo = writer.missing(mine)
    say(f"prompts: {len(todo)} of {len(mine)} are to be encoded into {out}")
    batches = (todo[i : i + rows] for i in range(0, len(todo), rows))
    with tqdm.tqdm(total=len(todo), unit="prompt", desc="prompts") as bar:
      for batch, context, pooled in ahead(map(dispatch, batches)):
        n = len(batch)
        writer.append(batch, np.asarray(context)[:n], np.asarray(pooled)[:n])
        bar.update(n)
  return len(todo)


def ahead(dispatched: Iterator, depth: int = 2) -> Iterator:
  """The same items, `depth` of them dispatched before the first is waited for."""
  waiting: deque = deque()
  for item in dispatched:
    waiting.append(item)
    if len(waiting) > depth:
      yield waiting.popleft()
  yield from waiting


def of_parquet(folder: pathlib.Path) -> Iterator[str]:
  """The prompts of a folder of parquet parts; DataError where it is none."""
  for file in parquet.read_index(folder).files:
    try:
      with pq.ParquetFile(file) as part:
        for batch in part.iter_batches(columns=["prompt"]):
          yield from batch["prompt"].to_pylist()
    except (OSError, pa.ArrowException, KeyError) as e:
      raise DataError(f"{file}: its prompts cannot be read: {e}") from e


def of_text(path: pathlib.Path) -> list[str]:
  """The lines of a text file, empty ones left out."""
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"{path} cannot be read as text: {e}") from e
  return [line for line in text.splitlines() if line.strip()]


def add_sharing_arguments(parser: argparse.ArgumentParser) -> None:
  """How several hosts share the work."""
  parser.add_argument("--host-index", type=int, default=0, help="of this host, from 0")
  parser.add_argument("--host-count", type=int, default=1, help="hosts that take part")


def check_sharing(args: argparse.Namespace) -> None:
  if not 0 <= args.host_index < args.host_count:
    raise ValueError(
      f"--host-index {args.host_index} must lie in 0..{args.host_count - 1} "
      f"(--host-count {args.host_count})"
    )
  if args.batch_size < 1:
    raise ValueError(f"--batch-size {args.batch_size} must be 1 or more")


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  path = dict(type=pathlib.Path)
  parser.add_argument("--model", **path, required=True, help="folder with the encoders")
  parser.add_argument("--out", **path, required=True, help="the cache, new or not")
  sources = parser.add_argument_group("prompts (any of these, also several times)")
  many = dict(action="append", default=[], **path)
  sources.add_argument("--json", **many, help="HPDv3-style JSON or JSONL")
  sources.add_argument("--parquet", **many, help="folder of pairs")
  sources.add_argument("--text", **many, help="one prompt per line")
  parser.add_argument("--t5-length", type=int, default=128, help="tokens, at most 512")
  parser.add_argument(
    "--dtype", default="bfloat16", choices=DTYPES, help="of encoders and cache"
  )
  parser.add_argument("--batch-size", type=int, default=8, help="prompts per device")
  parser.add_argument(
    "--skip-bad", action="store_true", help="leave out rows of --json that are bad"
  )
  add_sharing_arguments(parser)
  args = parser.parse_args(argv)
  with command_line.one_line_errors("the cache holds what was finished"):
    check_sharing(args)
    prompts: dict[str, None] = {}
    for file in args.json:
      pairs, _ = preference_json.read(file, skip_bad=args.skip_bad)
      prompts.update(dict.fromkeys(pair.prompt for pair in pairs))
    for folder in args.parquet:
      prompts.update(dict.fromkeys(of_parquet(folder)))
    for file in args.text:
      prompts.update(dict.fromkeys(of_text(file)))
    added = encode(
      args.model,
      args.out,
      prompts,
      t5_length=args.t5_length,
      dtype=args.dtype,
      batch_size=args.batch_size,
      host_index=args.host_index,
      host_count=args.host_count,
    )
    held = len(prompt_cache.PromptCache(args.out))
    print(f"added {added} prompts to {args.out}, which holds {held}")


if __name__ == "__main__":
  main()
