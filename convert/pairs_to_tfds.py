"""Writes parquet pairs as an ArrayRecord dataset, which can be read in any order.

  python convert/pairs_to_tfds.py --pairs train=data/train --pairs held_out=data/test \\
      --out data/pairs_tfds

Released parquet parts mix pairs of all sizes in their row groups, so that batches of
one size read many row groups for a few pairs each. In ArrayRecord every pair is read by
itself (docs/data.md). The order of the pairs is kept.
"""

import argparse
from collections.abc import Iterator, Sequence
import pathlib
from typing import Any

import command_line
import tqdm

from lrm_jax.data import parquet, tfds_pairs


def split_of(text: str) -> tuple[str, pathlib.Path]:
  """`SPLIT=FOLDER`, parsed."""
  name, separator, folder = text.partition("=")
  if not (name and separator and folder):
    raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=FOLDER")
  return name, pathlib.Path(folder)


def records(source: parquet.ParquetPairs, name: str) -> Iterator[dict[str, Any]]:
  """A source's records, with progress on stderr."""
  yield from tqdm.tqdm(source.records(), name, total=len(source), unit="pair")


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--pairs",
    action="append",
    required=True,
    type=split_of,
    metavar="SPLIT=FOLDER",
    help="a folder of parquet pairs and the split it becomes; repeatable",
  )
  parser.add_argument("--out", required=True, type=pathlib.Path, help="new dataset")
  parser.add_argument("--force", action="store_true", help="replace an existing one")
  args = parser.parse_args(argv)
  names = [name for name, _ in args.pairs]
  if len(set(names)) < len(names):
    parser.error(f"--pairs: a split is given twice: {', '.join(names)}")
  with command_line.one_line_errors():
    sources = {
      name: parquet.ParquetPairs(folder, cache_blocks=1) for name, folder in args.pairs
    }
    counts = tfds_pairs.write(
      args.out,
      {name: records(source, name) for name, source in sources.items()},
      force=args.force,
    )
  for name, count in counts.items():
    print(f"{args.out}:{name}  {count:,} pairs")


if __name__ == "__main__":
  main()
