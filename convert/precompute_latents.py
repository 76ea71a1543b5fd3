"""Turns preferences between image files into the latents that training reads.

  python convert/precompute_latents.py --model models/sd35m --json hpdv3/train.json \\
      --images hpdv3 --out data/train --filter "confidence>=0.95,votes>=3" \\
      --max-per-prompt 4 --prompts data/prompts_t5_128

Reads HPDv3-style JSON (lrm_jax/data/preference_json.py), brings the two images of each
pair to one bucket (or to --size), encodes them on all devices of this host, and writes
parquet parts and their index (lrm_jax/data/parquet.py), or a tfds dataset.

The selected rows are cut into chunks; each becomes one part, whose name and contents
depend on nothing else. So a run that was stopped continues with the chunks that are
missing, and several hosts can share the work: each runs the same command with its own
--host-index, on its own devices. Whichever run finds all chunks done writes the index
and report.json. Images that are missing or damaged are counted there, and listed in
bad_images.csv.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import re
from typing import Any

import command_line
import grain
import jax
import jax.numpy as jnp
import numpy as np
import precompute_prompts
import tqdm

from lrm_jax import build, encoders, sharding, weights
from lrm_jax.data import parquet, preference_json, records
from lrm_jax.data.preference_json import ImagePair, Problem
from lrm_jax.data.source import DataError

say = precompute_prompts.say

FORMAT = "lrm_jax.precompute"
VERSION = 1
SETTINGS, REPORT, BAD_IMAGES = parquet.PRECOMPUTE, "report.json", "bad_images.csv"
CHUNKS = "chunks"  # folder with a note on each finished chunk
POSTERIOR = ("mean", "sample")
# The autoencoder's widest activations take 512 bytes per pixel: 2 GiB per 4 megapixels.
ENCODE_PIXELS = 1 << 22
# Sides have to be whole patches of the transformer: two of the autoencoder's cells.
PATCH = 2


class ImageEncoder:
  """The autoencoder of a model folder on all devices of this host.

  Attributes:
    config: vae.VAEConfig.
    digest: tells its values and config from those of others.
  """

  def __init__(self, model: pathlib.Path, *, batch_size: int, seed: int | None):
    """
    Args:
      batch_size: images per device at a time; large ones are fewer.
      seed: of the draws from the posterior; None takes its mean.
    """
    loaded = build.load_vae(model)
    self.config = loaded.config
    described = json.dumps(build.config_to_dict(loaded.config), sort_keys=True)
    described += weights.digest(loaded.params)
    self.digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    mesh = sharding.make_mesh(devices=jax.local_devices())
    self._num_devices = mesh.size
    self._batch_size = batch_size
    self._sharding = sharding.batch_sharding(mesh)
    self._key = None if seed is None else jax.random.key(seed)
    self._params = build.to_device(loaded.params, sharding.replicated(mesh))

    def encode(params, pixels, key, ids):
      image = pixels.astype(jnp.float32) / 127.5 - 1
      return encoders.encode_image(
        loaded.graphdef, loaded.config, params, image, key, ids
      )

    self._encode = jax.jit(encode)

  def pairs_per_batch(self, size: tuple[int, int]) -> int:
    """How many pairs of images of this size are encoded at a time."""
    return pairs_per_batch(size, self._batch_size, self._num_devices)

  def __call__(self, pixels: np.ndarray, ids: np.ndarray) -> jax.Array:
    """(b h w c) float32 latents of (b H W 3) uint8; dispatched, not waited for.

    Args:
      ids: (b) uint32, what the draw from the posterior of each image depends on.
    """
    pixels, ids = jax.device_put((pixels, ids), self._sharding)
    with jax.default_matmul_precision("highest"):
      return self._encode(self._params, pixels, self._key, ids)


def pairs_per_batch(size: tuple[int, int], batch_size: int, num_devices: int) -> int:
  """How many pairs are encoded at a time.

  Their images go to all devices in equal parts: at most `batch_size` each, large ones
  fewer, but never less than there have to be for whole pairs.
  """
  images = max(1, min(batch_size, ENCODE_PIXELS // (size[0] * size[1])))
  unit = num_devices if num_devices % 2 else num_devices // 2
  return max(unit, images * num_devices // 2 // unit * unit)


# --- one chunk ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Rows that make up one part, and the files that say so.

  Attributes:
    number: from 0.
    part: its parquet file; not there if no pair of the chunk can be used.
    note: JSON with what became of the rows; written after the part.
  """

  number: int
  pairs: Sequence[ImagePair]
  part: pathlib.Path
  note: pathlib.Path

  def done(self, *, retry_bad: bool = False) -> dict[str, Any] | None:
    """The note, if nothing is left to do.

    Args:
      retry_bad: bad images are something to do.
    """
    if not self.note.exists():
      return None
    try:
      note = json.loads(self.note.read_text())
      encoded = note["encoded"]
      bad = any(p["kind"] == preference_json.BAD_IMAGE for p in note["problems"])
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise DataError(
        f"{self.note} is damaged: {e!r}. Delete it, and its part is made again"
      ) from e
    if (retry_bad and bad) or (encoded and not self.part.exists()):
      return None
    return note


def encode_chunk(
  chunk: Chunk,
  sizes: Sequence[tuple[int, int] | Problem],
  encoder: ImageEncoder,
  args: argparse.Namespace,
  bar: tqdm.tqdm,
) -> dict[str, Any]:
  """Writes a chunk's part and its note; returns the note.

  Rows are ordered by size, then as in the file, so row groups are of one size.
  """
  problems = [size for size in sizes if isinstance(size, Problem)]
  order = [i for i, size in enumerate(sizes) if not isinstance(size, Problem)]
  order.sort(key=lambda i: sizes[i])
  bar.update(len(problems))
  pairs = [chunk.pairs[i] for i in order]
  expected = [sizes[i] for i in order]
  counts: Counter[str] = Counter()

  def usable() -> Iterator[preference_json.DecodedPair]:
    images = preference_json.ImagePairs(pairs, args.images, size=args.size)
    options = grain.ReadOptions(
      num_threads=args.num_workers, prefetch_buffer_size=4 * args.num_workers
    )
    for decoded in grain.MapDataset.source(images).to_iter_dataset(options):
      problem, i = decoded["problem"], decoded["index"]
      if problem is None and decoded["size"] != expected[i]:
        problem = Problem(
          pairs[i].row,
          pairs[i].path1,
          preference_json.BAD_IMAGE,
          f"the pair's size is {expected[i]} by the heads of its files, but "
          f"{decoded['size']} when they are decoded",
        )
      if problem is None:
        yield decoded
      else:
        problems.append(problem)
        bar.update(1)

  def dispatched() -> Iterator[tuple[list[int], jax.Array]]:
    for size, of_size in itertools.groupby(usable(), key=lambda d: d["size"]):
      rows = encoder.pairs_per_batch(size)
      while batch := list(itertools.islice(of_size, rows)):
        padded = batch + batch[-1:] * (rows - len(batch))  # one program per size
        pixels = np.stack(
          [decoded[side] for side in ("chosen", "rejected") for decoded in padded]
        )
        row = np.array([pairs[decoded["index"]].row for decoded in padded], np.uint32)
        latents = encoder(pixels, np.concatenate([2 * row, 2 * row + 1]))
        yield [decoded["index"] for decoded in batch], latents

  def encoded() -> Iterator[dict[str, Any]]:
    for indices, latents in precompute_prompts.ahead(dispatched()):
      chosen, rejected = np.split(np.asarray(latents), 2)
      for j, i in enumerate(indices):
        height, width = expected[i]
        counts[f"{height}x{width}"] += 1
        yield record(pairs[i], chosen[j], rejected[j])
        bar.update(1)

  chunk.note.unlink(missing_ok=True)  # of a part that is made again
  made = encoded()
  if (first := next(made, None)) is None:
    chunk.part.unlink(missing_ok=True)
  else:
    parquet.write_part(
      chunk.part,
      itertools.chain([first], made),
      rows_per_group=args.rows_per_group,
      force=True,
    )
  note = {
    "chunk": chunk.number,
    "rows": len(chunk.pairs),
    "encoded": counts.total(),
    "by_size": counts,
    "problems": [dataclasses.asdict(p) for p in sorted(problems, key=lambda p: p.row)],
  }
  write_json(chunk.note, note)
  return note


def record(pair: ImagePair, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
  """A pair as the writers of both formats take it."""
  details = {"confidence": pair.confidence, "choice_dist": pair.votes}
  details = {key: value for key, value in details.items() if value is not None}
  return dict(
    prompt=pair.prompt,
    chosen=chosen,
    rejected=rejected,
    model1=pair.model1,
    model2=pair.model2,
    detailed_results=json.dumps(details) if details else "",
    image1_path=pair.path1,
    image2_path=pair.path2,
  )


def write_json(path: pathlib.Path, value: Any) -> None:
  """All of it under this name, or nothing."""
  with records.replace_file(path) as partial:
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# --- all of it ---------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
  """`512x512` -> (height, width)."""
  match = re.fullmatch(r"(\d+)x(\d+)", text)
  if match is None or 0 in (size := tuple(map(int, match.groups()))):
    raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, e.g. 512x512")
  return size


def parse_filters(text: str) -> tuple[preference_json.Filter, ...]:
  try:
    return preference_json.parse_filters(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(str(e)) from e


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  path = dict(type=pathlib.Path)
  out.add_argument("--model", **path, required=True, help="folder with the autoencoder")
  out.add_argument("--json", **path, required=True, help="the preferences")
  out.add_argument("--images", **path, required=True, help="where its paths start")
  out.add_argument("--out", **path, required=True, help="the folder to write")
  out.add_argument("--format", default="parquet", choices=["parquet", "tfds"])
  out.add_argument("--split", default="train", help="name of the split (tfds only)")

  rows = out.add_argument_group("which rows")
  rows.add_argument(
    "--filter", type=parse_filters, default=(), help=preference_json.GRAMMAR
  )
  rows.add_argument(
    "--keep-unknown",
    action="store_true",
    help="keep rows that do not say what a filter asks about",
  )
  rows.add_argument(
    "--drop-duplicates", action="store_true", help="of prompt and both paths"
  )
  rows.add_argument("--max-per-prompt", type=int, help="the first so many of each")
  rows.add_argument(
    "--skip-bad", action="store_true", help="leave out rows that are bad"
  )

  encoding = out.add_argument_group("encoding")
  encoding.add_argument(
    "--size", type=parse_size, help="HEIGHTxWIDTH for all, cropped; default: buckets"
  )
  encoding.add_argument(
    "--posterior", default="mean", choices=POSTERIOR, help="the latent of an image"
  )
  encoding.add_argument("--seed", type=int, default=0, help="of --posterior sample")
  encoding.add_argument("--batch-size", type=int, default=8, help="images per device")
  encoding.add_argument(
    "--num-workers",
    type=int,
    default=min(16, os.cpu_count() or 1),
    help="threads that read images",
  )
  encoding.add_argument(
    "--retry-bad", action="store_true", help="make parts with bad images again"
  )
  encoding.add_argument("--rows-per-part", type=int, default=1024)
  encoding.add_argument("--rows-per-group", type=int, default=16)
  precompute_prompts.add_sharing_arguments(encoding)

  prompts = out.add_argument_group("prompts")
  prompts.add_argument("--prompts", **path, help="also add them to this cache")
  prompts.add_argument("--t5-length", type=int, default=128)
  prompts.add_argument(
    "--prompts-dtype", default="bfloat16", choices=precompute_prompts.DTYPES
  )
  return out


def main(argv: list[str] | None = None) -> None:
  args = parser().parse_args(argv)
  with command_line.one_line_errors("the parts that are finished stay"):
    run(args)


def run(args: argparse.Namespace) -> None:
  """What the command line describes."""
  precompute_prompts.check_sharing(args)
  for name in ("rows_per_part", "rows_per_group", "num_workers"):
    if (value := getattr(args, name)) < 1:
      raise ValueError(f"--{name.replace('_', '-')} {value} must be 1 or more")
  if not args.images.is_dir():
    raise DataError(f"--images {args.images} is no folder")
  to_tfds = args.format == "tfds"
  # A dataset of tfds is written in one go, at the end.
  folder = args.out.with_name(f"{args.out.name}.parts") if to_tfds else args.out
  if to_tfds and args.out.exists() and not (folder / SETTINGS).exists():
    raise FileExistsError(f"{args.out} exists: choose another --out")

  pairs, bad_rows = preference_json.read(args.json, skip_bad=args.skip_bad)
  selected, removed = preference_json.select(
    pairs,
    args.filter,
    keep_unknown=args.keep_unknown,
    drop_duplicates=args.drop_duplicates,
    max_per_prompt=args.max_per_prompt,
  )
  if not selected:
    raise DataError(f"{args.json}: no row is left of {len(pairs)}: removed {removed}")
  say(f"{args.json}: {len(selected)} of {len(pairs) + len(bad_rows)} rows selected")

  seed = args.seed if args.posterior == "sample" else None
  encoder = ImageEncoder(args.model, batch_size=args.batch_size, seed=seed)
  multiple = PATCH * encoder.config.downsampling
  if args.size is not None and any(side % multiple for side in args.size):
    raise ValueError(f"--size {args.size}: sides must be multiples of {multiple}")
  look_at_some(selected, args)
  chunks = cut(selected, args.rows_per_part, folder)
  wanted = settings(args, encoder.digest, len(selected))
  (folder / CHUNKS).mkdir(parents=True, exist_ok=True)
  with locked(folder):  # other hosts start at the same time
    check_settings(folder, wanted, chunks)

  mine = chunks[args.host_index :: args.host_count]
  todo = [chunk for chunk in mine if chunk.done(retry_bad=args.retry_bad) is None]
  say(f"{folder}: {len(todo)} of {len(chunks)} parts are to be made here")
  if todo:  # then an index is that of other parts
    for name in (parquet.INDEX, REPORT):
      (folder / name).unlink(missing_ok=True)
  encode_chunks(todo, encoder, args)
  if args.prompts is not None:
    precompute_prompts.encode(
      args.model,
      args.prompts,
      [pair.prompt for pair in selected],
      t5_length=args.t5_length,
      dtype=args.prompts_dtype,
      host_index=args.host_index,
      host_count=args.host_count,
    )
  with locked(folder):  # of hosts that end at the same time, one finishes the folder
    left = [chunk.part.name for chunk in chunks if chunk.done() is None]
    if left:
      print(f"{folder}: {len(left)} of {len(chunks)} parts are other hosts' to make")
      return
    report = {
      "read": len(pairs) + len(bad_rows),
      "bad_rows": [dataclasses.asdict(problem) for problem in bad_rows],
      "removed": removed,
      "selected": len(selected),
    }
    finish(folder, chunks, report, encoder.config.downsampling)
    if to_tfds and older(args.out / "dataset_info.json", chunks):
      from lrm_jax.data import tfds_pairs  # seconds to import

      say(f"writing {args.out} from {folder}, which may be deleted afterwards")
      source = parquet.ParquetPairs(folder)
      tfds_pairs.write(args.out, {args.split: source}, force=True)
    print(f"wrote {args.out}")


def look_at_some(pairs: Sequence[ImagePair], args: argparse.Namespace) -> None:
  """Raises DataError if none of a hundred pairs has its images."""
  some = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, 100).astype(int))]
  images = preference_json.ImagePairs(some, args.images, size=args.size)
  for i in range(len(images)):
    size = images.size(i)
    if not isinstance(size, Problem) or size.kind != preference_json.BAD_IMAGE:
      return
  raise DataError(
    f"none of {len(some)} pairs of {args.json} has usable images, e.g. {size.reason}. "
    f"Is --images {args.images} the folder that the paths start from?"
  )


def cut(pairs: Sequence[ImagePair], rows: int, folder: pathlib.Path) -> list[Chunk]:
  """Chunks of so many rows, in the order of the file."""
  return [
    Chunk(
      number=number,
      pairs=pairs[start : start + rows],
      part=folder / f"part-{number:05d}{parquet.SUFFIX}",
      note=folder / CHUNKS / f"{number:05d}.json",
    )
    for number, start in enumerate(range(0, len(pairs), rows))
  ]


def encode_chunks(
  chunks: Sequence[Chunk], encoder: ImageEncoder, args: argparse.Namespace
) -> None:
  """One after another; the files of the next are looked at while one is encoded."""
  total = sum(len(chunk.pairs) for chunk in chunks)
  with (
    futures.ThreadPoolExecutor(args.num_workers) as pool,
    tqdm.tqdm(total=total, unit="pair", desc="images") as bar,
  ):
    try:
      scans = [scan(pool, chunk, args) for chunk in chunks[:1]]
      for i, chunk in enumerate(chunks):
        scans += [scan(pool, following, args) for following in chunks[i + 1 : i + 2]]
        sizes = [size.result() for size in scans.pop(0)]
        encode_chunk(chunk, sizes, encoder, args, bar)
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def scan(
  pool: futures.Executor, chunk: Chunk, args: argparse.Namespace
) -> list[futures.Future]:
  """Sizes of a chunk's pairs, or their problems, from the heads of their files."""
  images = preference_json.ImagePairs(chunk.pairs, args.images, size=args.size)
  return [pool.submit(images.size, i) for i in range(len(images))]


def settings(args: argparse.Namespace, vae: str, count: int) -> dict[str, Any]:
  """All that a part's contents depend on."""
  with open(args.json, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return {
    "format": FORMAT,
    "version": VERSION,
    "json": f"sha256:{digest[:16]}",
    "filter": ",".join(map(str, args.filter)),
    "keep_unknown": args.keep_unknown,
    "drop_duplicates": args.drop_duplicates,
    "max_per_prompt": args.max_per_prompt,
    "skip_bad": args.skip_bad,
    "rows": count,
    "size": None if args.size is None else "{}x{}".format(*args.size),
    "vae": f"sha256:{vae}",
    "posterior": args.posterior,
    "seed": args.seed if args.posterior == "sample" else None,
    "rows_per_part": args.rows_per_part,
    "rows_per_group": args.rows_per_group,
  }


def check_settings(
  folder: pathlib.Path, wanted: Mapping[str, Any], chunks: Sequence[Chunk]
) -> None:
  """Begins a folder, or checks that it was begun with the same settings.

  Raises:
    DataError: it was made with others, or holds parts of something else.
  """
  path = folder / SETTINGS
  if not path.exists():
    if foreign := sorted(p.name for p in folder.glob(f"*{parquet.SUFFIX}")):
      raise DataError(
        f"{folder} holds {foreign[0]}, but no {SETTINGS}: choose another --out"
      )
    write_json(path, wanted)
  try:
    found = json.loads(path.read_text())
    differing = [
      f"{key} {found.get(key)!r}, not {value!r}"
      for key, value in wanted.items()
      if found.get(key) != value
    ]
  except (OSError, ValueError, AttributeError) as e:
    raise DataError(f"{path} is damaged: {e!r}. Choose another --out") from e
  if differing:
    raise DataError(
      f"{folder} was begun with other settings: {'; '.join(differing)}. Use the same "
      "ones, or another --out"
    )
  expected = {chunk.part for chunk in chunks}
  if foreign := sorted(set(folder.glob(f"*{parquet.SUFFIX}")) - expected):
    raise DataError(f"{foreign[0]} is none of this dataset's parts: move it away")


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Waits until no other process is in such a block for this folder."""
  with open(folder / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
      raise DataError(f"{file.name}: this file system has no locks: {e}") from e
    yield  # closing the file, or the end of the process, gives it free


def older(path: pathlib.Path, chunks: Sequence[Chunk]) -> bool:
  """Whether a file is missing, or a part was finished after it was written."""
  if not path.exists():
    return True
  newest = max(chunk.note.stat().st_mtime_ns for chunk in chunks)
  return path.stat().st_mtime_ns < newest


def finish(
  folder: pathlib.Path,
  chunks: Sequence[Chunk],
  report: dict[str, Any],
  pixels_per_cell: int,
) -> None:
  """Writes index, report and list of bad images, and prints the report.

  Args:
    report: what is known so far.

  Raises:
    DataError: not a single pair could be encoded.
  """
  notes = [chunk.done() for chunk in chunks]
  problems = [problem for note in notes for problem in note["problems"]]
  kinds = Counter(problem["kind"] for problem in problems)
  by_size: Counter[str] = Counter()
  for note in notes:
    by_size.update(note["by_size"])
  dropped = {
    kind: kinds[kind]
    for kind in (preference_json.NO_BUCKET, preference_json.ASPECT_RATIOS)
  }
  bad = [p for p in problems if p["kind"] == preference_json.BAD_IMAGE]
  report |= {
    "dropped": dropped,
    "bad_images": len(bad),
    "encoded": by_size.total(),
    "by_size": {size: by_size[size] for size in sorted(by_size, key=parse_size)},
  }
  with open(folder / BAD_IMAGES, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(
      file, ["row", "path", "reason"], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(bad)
  if not by_size:
    raise DataError(
      f"{folder}: none of {report['selected']} pairs can be used, e.g. "
      f"{problems[0]['reason']}. Once that is corrected, pass --retry-bad"
    )
  if any(older(folder / name, chunks) for name in (REPORT, parquet.INDEX)):
    parquet.write_index(folder, pixels_per_cell=pixels_per_cell)
    write_json(folder / REPORT, report)
  print(summary(report))


def summary(report: Mapping[str, Any]) -> str:
  """The report in lines."""
  counts = {"rows read": report["read"], "bad rows": len(report["bad_rows"])}
  counts |= {f"removed: {reason}": n for reason, n in report["removed"].items()}
  counts |= {f"dropped: {reason}": n for reason, n in report["dropped"].items()}
  counts |= {"bad images": report["bad_images"], "encoded pairs": report["encoded"]}
  counts |= {f"  {size}": n for size, n in report["by_size"].items()}
  return "\n".join(f"{name:<32}{n:>10}" for name, n in counts.items())


if __name__ == "__main__":
  main()
