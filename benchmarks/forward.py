"""Time of one scoring forward pass, relative to PyTorch in the same run.

Both sides hold the same random weights and see the same inputs. They must agree
before anything is timed. Then groups of calls alternate (ours, torch, ours, torch, ...)
so that a machine that slows down slows both; reported are the medians over groups, and
the median of each pair's ratio ours / torch. PyTorch's side is diffusers' transformer
and the heads of convert/torch_reference.py, in eager mode; there are no adapters on
either side (as after merging them).

A narrow model on a CPU, and full size on a GPU:

  PYTHONPATH=convert python benchmarks/forward.py --heads 8 --layers 4 --pixels 256
  PYTHONPATH=convert python benchmarks/forward.py --dtype bfloat16 --unroll --batch 8
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

from flax import nnx
import jax
import numpy as np
import side_by_side

from lrm_jax import build, flops, weights
from lrm_jax.models import conv_head, features, mmdit, reward

# Largest relative difference of the scores that counts as agreement.
AGREE = {"float32": 1e-3, "bfloat16": 0.1}


def narrowed(
  config: reward.RewardConfig, heads: int | None, num_layers: int | None
) -> reward.RewardConfig:
  """A preset of another width or depth, without adapters."""
  backbone = config.backbone
  if heads is not None:
    backbone = dataclasses.replace(backbone, num_heads=heads)
  if num_layers is not None:
    spread = lambda taps: tuple(  # noqa: E731
      sorted({max(1, round(t * num_layers / backbone.num_layers)) for t in taps})
    )
    backbone = backbone.truncate(
      num_layers,
      has_output=backbone.has_output,
      image_taps=spread(backbone.image_taps),
      text_taps=spread(backbone.text_taps),
    )
  head = config.head
  if not isinstance(head, conv_head.ConvHeadConfig):
    head = dataclasses.replace(
      head,
      token_dim=backbone.width,
      width=backbone.width,
      num_image_taps=len(backbone.image_taps),
      num_text_taps=len(backbone.text_taps),
    )
  return dataclasses.replace(config, backbone=backbone, head=head, lora=None)


def random_inputs(config: mmdit.MMDiTConfig, args: argparse.Namespace, seed: int = 1):
  """x (b H W C), sigma (b,), context, pooled, all float32."""
  rng = np.random.default_rng(seed)
  side = args.pixels // 8
  return (
    rng.standard_normal((args.batch, side, side, config.in_channels), np.float32),
    np.linspace(0.1, 0.9, args.batch, dtype=np.float32),
    rng.standard_normal((args.batch, args.text_tokens, config.context_dim), np.float32),
    rng.standard_normal((args.batch, config.pooled_dim), np.float32),
  )


def our_scorer(config, params, inputs, args) -> Callable[[], np.ndarray]:
  """A call that scores the inputs and waits for the result."""
  dtype = build.dtype(args.dtype)
  graphdef, like = weights.abstract(
    lambda: build.make_reward(
      config,
      dtype=dtype,
      param_dtype=dtype,
      trained_dtype=dtype,
      scan_blocks=not args.unroll,
    )
  )
  if args.unroll:
    params = {**params, "backbone": mmdit.unstack_params(params["backbone"])}
  params = jax.device_put(build.fit(params, like, name="random weights"))
  x, sigma, context, pooled = inputs
  device_inputs = jax.device_put((x, sigma, features.Cond(context, pooled)))
  score = jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a))
  return lambda: np.asarray(score(params, *device_inputs))


def torch_scorer(config, params, inputs, args) -> Callable[[], np.ndarray]:
  """The same on PyTorch.

  Raises:
    ModuleNotFoundError: torch, diffusers or peft (the `convert` extra) are missing, or
      PYTHONPATH lacks `convert`.
  """
  import torch

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  dtype = getattr(torch, args.dtype)
  model = side_by_side.torch_reward(config, params).to(device, dtype).eval()
  x, sigma, context, pooled = inputs
  x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
  tensors = [
    torch.from_numpy(a).to(device, dtype) for a in (x, 1000 * sigma, context, pooled)
  ]
  tensors[1] = tensors[1].float()  # bfloat16 would quantise t

  @torch.inference_mode()
  def score():
    return model(*tensors)[:, 0].float().cpu().numpy()  # .cpu() waits

  return score


def measure(ours, theirs, groups: int, calls: int) -> dict[str, Any]:
  """Alternating groups of calls; seconds per call."""
  times: dict[str, list[float]] = {"jax": [], "torch": []}
  for _ in range(groups):
    for name, call in (("jax", ours), ("torch", theirs)):
      start = time.perf_counter()
      for _ in range(calls):
        call()
      times[name].append((time.perf_counter() - start) / calls)
  ratios = [a / b for a, b in zip(times["jax"], times["torch"], strict=True)]
  return {
    "jax_s": statistics.median(times["jax"]),
    "torch_s": statistics.median(times["torch"]),
    "ratio": statistics.median(ratios),
    "ratio_min": min(ratios),
    "ratio_max": max(ratios),
    "groups": times,
  }


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--preset", default="dina_sd35m_12layers", choices=sorted(build.REWARD_PRESETS)
  )
  parser.add_argument("--heads", type=int, help="attention heads of 64 (default: all)")
  parser.add_argument("--layers", type=int, help="blocks to keep (default: all)")
  parser.add_argument("--pixels", type=int, default=512, help="side of the image")
  parser.add_argument("--text-tokens", type=int, default=333)
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--dtype", default="float32", choices=sorted(AGREE))
  parser.add_argument("--unroll", action="store_true", help="no scan (GPU)")
  parser.add_argument("--groups", type=int, default=7)
  parser.add_argument("--calls", type=int, default=3, help="per group")
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)

  # Both frameworks share one GPU: jax must not take three quarters of it at once.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  config = narrowed(build.REWARD_PRESETS[args.preset](), args.heads, args.layers)
  _, like = weights.abstract(lambda: build.make_reward(config))
  params = side_by_side.random_weights(like)
  inputs = random_inputs(config.backbone, args)
  ours = our_scorer(config, params, inputs, args)
  theirs = torch_scorer(config, params, inputs, args)

  want, got = theirs(), ours()
  error = side_by_side.relative_error(got, want)
  if not error <= AGREE[args.dtype]:
    print(f"forward: scores differ by {error:.2e}: {got} and {want}", file=sys.stderr)
    return 1
  ours(), theirs()  # both compiled and warm
  result = measure(ours, theirs, args.groups, args.calls)

  side = args.pixels // 8
  work = args.batch * flops.reward(config, side, side, args.text_tokens)
  skip = ("out", "groups")
  report = {
    **{k: v for k, v in vars(args).items() if k not in skip},
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else None,
    "machine": platform.machine(),
    "jax": jax.__version__,
    "torch": sys.modules["torch"].__version__,
    "relative_error": error,
    "teraflops": work / 1e12,
    "jax_teraflops_per_s": work / 1e12 / result["jax_s"],
    **result,
  }
  print(json.dumps(report, indent=2))
  print(
    "\n| | s per call | TFLOP/s |\n|---|---|---|\n"
    f"| lrm_jax | {result['jax_s']:.4f} | {work / 1e12 / result['jax_s']:.3f} |\n"
    f"| torch | {result['torch_s']:.4f} | {work / 1e12 / result['torch_s']:.3f} |\n\n"
    f"ratio {result['ratio']:.3f} ({result['ratio_min']:.3f} to "
    f"{result['ratio_max']:.3f} over {args.groups} groups)"
  )
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
