"""Scores images with a latent reward model.

  python -m lrm_jax.score --model models/dina --prompt "a photo of a cat" \\
      --image a.png b.png

docs/scoring.md explains noise levels, what a score means, ensembles, image sizes, and
the JSON output; `lrm_jax.scorer` is the same in Python.
"""

import argparse
from collections.abc import Sequence
import functools
import json
import sys
from typing import Any

import jax
import numpy as np

from lrm_jax import compilation
from lrm_jax import scorer as scorer_lib
from lrm_jax.data import images as images_lib


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m lrm_jax.score",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", required=True, help="model folder")
  parser.add_argument(
    "--prompt", required=True, nargs="+", help="one for all images, or one per image"
  )
  parser.add_argument("--image", required=True, nargs="+", help="image files")
  parser.add_argument(
    "--all-pairs", action="store_true", help="every prompt with every image"
  )
  parser.add_argument(
    "--u", type=float, nargs="+", help="noise levels (default: the model's for images)"
  )
  parser.add_argument(
    "--ensemble",
    nargs="?",
    const="tokens",
    choices=scorer_lib.ENSEMBLE_MODES,
    help="also one score of all noise levels together (default: tokens)",
  )
  parser.add_argument(
    "--no-resize", action="store_true", help="crop images only, ignoring the buckets"
  )
  parser.add_argument("--dtype", default="float32", choices=scorer_lib.DTYPES)
  parser.add_argument("--batch-size", type=int, default=scorer_lib.BATCH_SIZE)
  parser.add_argument("--seed", type=int, default=0, help="of the noise")
  parser.add_argument("--t5-length", type=int, default=256, help="tokens, at most 512")
  parser.add_argument("--json", action="store_true", help="one JSON object per line")
  return parser


def ranks(scores: scorer_lib.Scores) -> list[int | None]:
  """Place of each pair among those of its prompt, 1 is best; None where it is alone.

  By the ensemble's score if there is one, else at the first noise level. Equal scores
  share the better place.
  """
  by = scores.raw[0] if scores.ensemble_raw is None else scores.ensemble_raw
  out: list[int | None] = []
  for prompt, value in zip(scores.prompt, by, strict=True):
    rivals = by[scores.prompt == prompt]
    out.append(1 + int(np.sum(rivals > value)) if len(rivals) > 1 else None)
  return out


def records(
  scores: scorer_lib.Scores,
  images: Sequence[str],
  prompts: Sequence[str],
  mode: str | None,
) -> list[dict[str, Any]]:
  """One JSON-ready object per scored pair; docs/scoring.md describes the fields."""
  out = []
  for n, rank in enumerate(ranks(scores)):
    levels = [
      {
        "u": round(float(scores.u[k]), 7),
        "sigma": float(scores.sigma[k]),
        "raw": float(scores.raw[k, n]),
        "reported": float(scores.reported[k, n]),
      }
      for k in range(len(scores.u))
    ]
    ensemble = None
    if mode is not None:
      ensemble = {
        "mode": mode,
        "raw": float(scores.ensemble_raw[n]),
        "reported": float(scores.ensemble_reported[n]),
      }
    out.append(
      {
        "image": images[scores.image[n]],
        "prompt": prompts[scores.prompt[n]],
        "height": int(scores.size[n, 0]),
        "width": int(scores.size[n, 1]),
        "scores": levels,
        "ensemble": ensemble,
        "rank": rank,
      }
    )
  return out


def table(rows: Sequence[dict[str, Any]]) -> str:
  """`records` for people: a line per pair, a raw and a reported column per level."""
  shorten = lambda s: s if len(s) <= 40 else f"{s[:37]}..."  # noqa: E731
  header = ["image", "prompt"]
  for level in rows[0]["scores"]:
    header += [f"raw u={level['u']:g}", f"score u={level['u']:g}"]
  if rows[0]["ensemble"] is not None:
    header += ["raw ensemble", "score ensemble"]
  with_rank = any(row["rank"] is not None for row in rows)
  header += ["rank"] * with_rank
  lines = [header]
  for row in rows:
    line = [row["image"], shorten(row["prompt"])]
    for level in [*row["scores"], row["ensemble"]]:
      if level is not None:
        line += [f"{level['raw']:.4f}", f"{level['reported']:.4f}"]
    if with_rank:
      line.append("" if row["rank"] is None else str(row["rank"]))
    lines.append(line)
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def run(args: argparse.Namespace) -> str:
  """What the command line prints on stdout."""
  say = functools.partial(print, file=sys.stderr, flush=True)
  # Cheap checks first: loading a model takes minutes.
  scorer_lib.pair_up(len(args.image), len(args.prompt), args.all_pairs)
  if args.batch_size < 1:
    raise ValueError(f"--batch-size {args.batch_size} must be >= 1")
  for image in args.image:
    images_lib.open_image(image)
  scorer = scorer_lib.Scorer.load(
    args.model, dtype=args.dtype, t5_length=args.t5_length
  )
  say(f"loaded {args.model} on {jax.devices()[0].device_kind}")
  scores = scorer.score_images(
    args.image,
    args.prompt,
    us=args.u,
    ensemble=args.ensemble,
    all_pairs=args.all_pairs,
    resize=not args.no_resize,
    key=jax.random.key(args.seed),
    batch_size=args.batch_size,
    progress=say,
  )
  rows = records(scores, args.image, args.prompt, args.ensemble)
  if args.json:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
  return table(rows)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for input that cannot be used."""
  args = _parser().parse_args(argv)
  compilation.configure()
  try:
    print(run(args))
  except (ValueError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
