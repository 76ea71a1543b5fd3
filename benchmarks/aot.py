"""Compiles the full-size scorer for an accelerator that is not there.

XLA compiles ahead of time for a described device, so that peak memory, the chosen
kernels and the compile time can be checked on any machine (PJRT's compile-only
topologies). Nothing runs: there are no times but the compiler's own.

GPU: needs the CUDA plugin (`pip install "jax-cuda12-plugin[with-cuda]"`, 5 GB) and a
description of the device, XLA's GpuTargetConfigProto as text (in openxla/xla under
xla/backends/gpu/target_config/specs). Autotuning is off, so GEMM kernels are XLA's
defaults:

  python benchmarks/aot.py --device h200 --target-config h200.txtpb

TPU: needs `pip install libtpu`; one chip of the named topology is compiled for:

  python benchmarks/aot.py --device v5e:2x2

Exit code 3: the compiler for that device is not installed.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jaxlib import xla_client

from lrm_jax import build, flops, weights
from lrm_jax.models import features

GIB = 2**30
NOT_INSTALLED = 3


class NotInstalledError(RuntimeError):
  """No compiler for the wanted device on this machine."""


def is_tpu(device: str) -> bool:
  return re.match(r"v\d", device) is not None


def target(device: str, target_config: str | None) -> tuple[Any, dict[str, Any]]:
  """One compile-only device of the wanted kind, and its compiler options.

  Raises:
    NotInstalledError: its plugin is missing.
    ValueError: a GPU without a description.
  """
  # The host's own backend stays the CPU, whatever plugins are installed; listing its
  # devices is what makes jax register the plugins.
  jax.config.update("jax_platforms", "cpu")
  if is_tpu(device):
    if importlib.util.find_spec("libtpu") is None:
      raise NotInstalledError("libtpu is not installed: pip install libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server off a TPU machine
    topology = topologies.get_topology_desc(device, "tpu")
    return topology.devices[0], {}

  jax.devices()
  if not xla_client.pjrt_plugin_loaded("cuda"):
    raise NotInstalledError(
      "jax's CUDA plugin is not installed: "
      f'pip install "jax-cuda12-plugin[with-cuda]=={jax.__version__}"'
    )
  if target_config is None:
    raise ValueError(f"--device {device} needs --target-config FILE")
  if not xla_client.pjrt_plugin_initialized("cuda"):
    xla_client.initialize_pjrt_plugin("cuda")
  topology = topologies.get_topology_desc(
    device,
    platform="cuda",
    target_config=pathlib.Path(target_config).read_text(),
    topology="1x1x1",
  )
  options: dict[str, Any] = {"xla_gpu_autotune_level": 0}  # it would need the GPU
  if (spec := importlib.util.find_spec("nvidia")) is not None:
    for folder in spec.submodule_search_locations or ():
      if (nvcc := pathlib.Path(folder, "cuda_nvcc")).is_dir():
        options["xla_gpu_cuda_data_dir"] = str(nvcc)
  return topology.devices[0], options


def compile_scorer(args: argparse.Namespace, scan: bool) -> dict[str, Any]:
  """One row of the table."""
  device, options = target(args.device, args.target_config)
  config = build.REWARD_PRESETS[args.preset]()
  graphdef, params = weights.abstract(
    lambda: build.make_reward(
      config,
      dtype=jnp.bfloat16,
      param_dtype=jnp.bfloat16,
      trained_dtype=jnp.bfloat16,
      scan_blocks=scan,
      attention_impl="xla" if is_tpu(args.device) else "cudnn",
    )
  )
  mesh = jax.sharding.Mesh([device], ("data",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731

  side, b = args.pixels // 8, args.batch
  backbone = config.backbone
  inputs = (
    jax.tree.map(lambda a: struct(a.shape, a.dtype), params),
    struct((b, side, side, backbone.in_channels), jnp.float32),
    struct((b,), jnp.float32),
    features.Cond(
      struct((b, args.text_tokens, backbone.context_dim), jnp.bfloat16),
      struct((b, backbone.pooled_dim), jnp.bfloat16),
    ),
  )
  score = jax.jit(lambda p, x, s, c: nnx.merge(graphdef, p)(x, s, c))
  start = time.perf_counter()
  lowered = score.lower(*inputs)
  lowered_at = time.perf_counter()
  compiled = lowered.compile(compiler_options=options)
  done = time.perf_counter()

  memory = compiled.memory_analysis()
  sizes = {
    name: getattr(memory, f"{name}_size_in_bytes") / GIB
    for name in ("argument", "output", "temp")
  }
  return {
    "blocks": "scanned" if scan else "unrolled",
    "parameters": weights.count(params) - weights.count(_tables(params)),
    "teraflops": b * flops.reward(config, side, side, args.text_tokens) / 1e12,
    "weights_and_inputs_gib": sizes["argument"],
    "temporary_gib": sizes["temp"],
    "peak_gib": sum(sizes.values()),
    "cudnn_attention_calls": len(
      re.findall(r'custom_call_target="__cudnn\$fmha', compiled.as_text())
    ),
    "lower_s": lowered_at - start,
    "compile_s": done - lowered_at,
  }


def _tables(params: dict) -> dict:
  """The position table, which is not a parameter."""
  return {"pos_embed": params["backbone"]["pos_embed"]}


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  head = (
    "| blocks | parameters | TFLOP | weights + inputs, GiB | temporary, GiB "
    "| peak, GiB | cuDNN attention calls | lowering, s | compiling, s |"
  )
  lines = [head, "|" + "---|" * 9]
  for r in rows:
    lines.append(
      f"| {r['blocks']} | {r['parameters']:,} | {r['teraflops']:.3f} "
      f"| {r['weights_and_inputs_gib']:.2f} | {r['temporary_gib']:.2f} "
      f"| {r['peak_gib']:.2f} | {r['cudnn_attention_calls']} "
      f"| {r['lower_s']:.1f} | {r['compile_s']:.1f} |"
    )
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--device", default="h200", help="a GPU's name, or v5e:2x2, ...")
  parser.add_argument("--target-config", help="GPU description (text proto)")
  parser.add_argument(
    "--preset", default="dina_sd35m_12layers", choices=sorted(build.REWARD_PRESETS)
  )
  parser.add_argument("--pixels", type=int, default=512, help="side of the image")
  parser.add_argument("--text-tokens", type=int, default=333)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--out", help="also write the rows to this JSON file")
  args = parser.parse_args(argv)

  try:
    rows = [compile_scorer(args, scan) for scan in (True, False)]
  except NotInstalledError as e:
    print(f"aot: {e}", file=sys.stderr)
    return NOT_INSTALLED
  print(
    f"{args.preset} forward, bf16, {args.pixels} px, {args.text_tokens} text tokens, "
    f"batch {args.batch}, compiled for {args.device} with jax {jax.__version__}\n"
  )
  print(table(rows))
  if args.out:
    keys = ("device", "preset", "pixels", "text_tokens", "batch")
    result = {k: getattr(args, k) for k in keys} | {"jax": jax.__version__}
    pathlib.Path(args.out).write_text(
      json.dumps({**result, "rows": rows}, indent=2) + "\n"
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
