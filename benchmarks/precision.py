"""What bfloat16 changes about scores: against their spread, and their order.

The same weights and noisy latents in float32 (exact products) and in bfloat16:

  error      root mean square and largest difference of the scores, in units of their
             standard deviation over the samples of one noise level; once as they are,
             once without the mean difference, which changes no comparison
  agreement  of random pairs, how many are in the same order; of the nearest tenth of
             them, too

A narrow model with random weights, and a trained one on its held-out pairs:

  python benchmarks/precision.py --out benchmarks/results/precision_cpu.json
  python benchmarks/precision.py --model runs/quickstart/reward/model \\
    --pairs runs/quickstart/pairs/held_out --prompts runs/quickstart/pairs/prompts
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import model_sizes
import numpy as np
import scoring

from lrm_jax import build, weights
from lrm_jax.data import parquet, prompt_cache
from lrm_jax.models import features

SIGMAS = (0.1, 0.4, 0.7)
TARGET = 0.01  # root mean square error, in units of the spread
PAIRS = 20_000
# (x (n h w c), sigma (n,), context, pooled) -> scores (n,) float32.
Score = Callable[..., np.ndarray]


def compare(exact: np.ndarray, rough: np.ndarray, seed: int = 0) -> dict[str, float]:
  """Of the scores of the same samples."""
  spread = exact.std()
  error = (rough - exact) / spread
  centred = error - error.mean()
  rng = np.random.default_rng(seed)
  i, j = rng.integers(len(exact), size=(2, PAIRS))
  i, j = i[i != j], j[i != j]
  gap = exact[i] - exact[j]
  same = np.sign(gap) == np.sign(rough[i] - rough[j])
  near = np.abs(gap) <= np.quantile(np.abs(gap), 0.1)
  return {
    "rms_error": float(np.sqrt(np.mean(error**2))),
    "max_error": float(np.abs(error).max()),
    "rms_error_centred": float(np.sqrt(np.mean(centred**2))),
    "same_order": float(same.mean()),
    "same_order_of_nearest_tenth": float(same[near].mean()),
  }


def batched(score: Callable, batch: int) -> Score:
  """All rows, a batch at a time; the last one is padded."""

  def run(*arrays):
    found = []
    for start in range(0, len(arrays[0]), batch):
      parts = [a[start : start + batch] for a in arrays]
      missing = batch - len(parts[0])
      parts = [np.concatenate([p, np.repeat(p[-1:], missing, axis=0)]) for p in parts]
      found.append(np.asarray(score(*parts), np.float32)[: batch - missing])
    return np.concatenate(found)

  return run


def scorer_of(graphdef: nnx.GraphDef, params: Any, dtype: Any) -> Callable:
  """Jitted; parameters are an argument."""

  @jax.jit
  def run(params, x, sigma, context, pooled):
    cond = features.Cond(context.astype(dtype), pooled.astype(dtype))
    return nnx.merge(graphdef, params)(x, sigma, cond)

  return lambda *arrays: run(params, *arrays)


def random_scorer(name: str, dtype: str) -> tuple[Callable, model_sizes.Sizes]:
  """A narrow model with random weights, as narrow as the other benchmarks'."""
  sizes = model_sizes.Sizes()
  config = sizes.rewards[name]
  jax_dtype = build.dtype(dtype)
  graphdef, like = weights.abstract(
    lambda: build.make_reward(config, dtype=jax_dtype, param_dtype=jax_dtype)
  )
  params = build.fit(scoring.random_reward(config), like, name="random weights")
  return scorer_of(graphdef, build.to_device(params), jax_dtype), sizes


def random_samples(sizes: model_sizes.Sizes, num: int) -> tuple[np.ndarray, ...]:
  x, _, context, pooled = scoring.random_inputs(sizes, sizes.latent, num)
  return x, context, pooled


def held_out(pairs: str, prompts: str, num: int) -> tuple[np.ndarray, ...]:
  """Clean latents of both sides of pairs, and their prompts' embeddings."""
  source, cache = parquet.ParquetPairs(pairs), prompt_cache.PromptCache(prompts)
  rows = [source[i] for i in range(min(num // 2, len(source)))]
  x = np.concatenate([[row[side] for row in rows] for side in ("chosen", "rejected")])
  texts = [row["prompt"] for row in rows] * 2
  found = [cache[text] for text in texts]
  return x.astype(np.float32), *(
    np.stack([np.asarray(one[i], np.float32) for one in found]) for i in (0, 1)
  )


def rows_of(
  name: str, scores: Mapping[str, Score], samples: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
  """One per noise level; both dtypes see the same noise."""
  x0, context, pooled = samples
  eps = np.random.default_rng(7).standard_normal(x0.shape, np.float32)
  rows = []
  for sigma in SIGMAS:
    x = ((1 - sigma) * x0 + sigma * eps).astype(np.float32)
    levels = np.full(len(x), sigma, np.float32)
    exact, rough = (
      scores[dtype](x, levels, context, pooled) for dtype in ("float32", "bfloat16")
    )
    rows.append({"model": name, "sigma": sigma, "n": len(x), **compare(exact, rough)})
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  lines = [
    "| model | sigma | samples | error, rms (largest) | without the mean | same order "
    "| of the nearest tenth |",
    "|" + "---|" * 7,
  ]
  lines += [
    f"| {r['model']} | {r['sigma']:g} | {r['n']} | {r['rms_error']:.4f} "
    f"({r['max_error']:.4f}) | {r['rms_error_centred']:.4f} | {r['same_order']:.2%} "
    f"| {r['same_order_of_nearest_tenth']:.1%} |"
    for r in rows
  ]
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--random", nargs="*", default=["dina", "drm"], help="narrow ones"
  )
  parser.add_argument("--model", help="a model folder with a reward")
  parser.add_argument("--pairs", help="its held-out pairs, parquet")
  parser.add_argument("--prompts", help="their prompt cache")
  parser.add_argument("--samples", type=int, default=512)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--out", help="also write the rows to this JSON file")
  args = parser.parse_args(argv)
  if args.model and not (args.pairs and args.prompts):
    parser.error("--model needs --pairs and --prompts")

  rows = []
  with jax.default_matmul_precision("highest"):
    for name in args.random:
      made = {d: random_scorer(name, d) for d in ("float32", "bfloat16")}
      scores = {d: batched(score, args.batch) for d, (score, _) in made.items()}
      samples = random_samples(made["float32"][1], args.samples)
      rows += rows_of(f"random {name}", scores, samples)
    if args.model:
      scores = {}
      for dtype in ("float32", "bfloat16"):
        model, _ = build.load_reward(args.model, dtype=build.dtype(dtype))
        params = build.to_device(model.params)
        score = scorer_of(model.graphdef, params, build.dtype(dtype))
        scores[dtype] = batched(score, args.batch)
      samples = held_out(args.pairs, args.prompts, args.samples)
      rows += rows_of("trained", scores, samples)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n{table(rows)}")
  over = [r for r in rows if r["rms_error"] > TARGET]
  print(f"\n{len(rows) - len(over)} of {len(rows)} within {TARGET:g} of the spread")
  if args.out:
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    text = json.dumps({**device, "target": TARGET, "rows": rows}, indent=2)
    pathlib.Path(args.out).write_text(text + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
