"""Compiles the full-size scorer for an accelerator that is not there.

XLA compiles ahead of time for a described device, so that peak memory, the chosen
kernels and the compile time can be checked on any machine (lrm_jax/aot.py). Nothing
runs: there are no times but the compiler's own.

GPU: needs the CUDA plugin (`pip install "jax-cuda12-plugin[with-cuda]"`, 5 GB) and a
description of the device, XLA's GpuTargetConfigProto as text (in openxla/xla under
xla/backends/gpu/target_config/specs). Autotuning is off, so GEMM kernels are XLA's
defaults:

  python benchmarks/aot.py --device h200 --target-config h200.txtpb

TPU: needs `pip install libtpu`; one chip of the named topology is compiled for:

  python benchmarks/aot.py --device v5e:2x2

The training step is compiled by the trainer (docs/aot.md); a table of its reports:

  python train/reward.py --config configs/sd35m.py --aot v5e:4x4 --aot_out a.json
  python benchmarks/aot.py --table a.json b.json

(train/align.py does the same for its programs; a table takes both.) With --scaling
instead, how the same work per chip does on more and more chips.

Exit code 3: the compiler for that device is not installed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from lrm_jax import aot, build, flops, weights
from lrm_jax.models import attention, features

NOT_INSTALLED = 3


def compile_scorer(
  target: aot.Target, args: argparse.Namespace, scan: bool
) -> dict[str, Any]:
  """One row of the table."""
  config = build.REWARD_PRESETS[args.preset]()
  graphdef, params = weights.abstract(
    lambda: build.make_reward(
      config,
      dtype=jnp.bfloat16,
      param_dtype=jnp.bfloat16,
      trained_dtype=jnp.bfloat16,
      scan_blocks=scan,
      attention_impl=attention.resolve("auto", jnp.bfloat16, target.kind),
    )
  )
  mesh = jax.sharding.Mesh(target.devices, ("data",))
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
  count = b * flops.reward(config, side, side, args.text_tokens)
  report = aot.report(score, inputs, target, flops_per_step=float(count))
  memory, program = report.memory, report.program
  return {
    "blocks": "scanned" if scan else "unrolled",
    "parameters": weights.count(params) - weights.count(_tables(params)),
    "teraflops": count / 1e12,
    "weights_and_inputs_gib": memory.arguments / aot.GIB,
    "temporary_gib": memory.temporaries / aot.GIB,
    "peak_gib": memory.total / aot.GIB,
    "attention_kernels": sum(
      calls
      for name, calls in (program.custom_calls if program else {}).items()
      if name.startswith(("__cudnn$fmha", "splash"))
    ),
    "lower_s": report.lower_seconds,
    "compile_s": report.compile_seconds,
  }


def _tables(params: dict) -> dict:
  """The position table, which is not a parameter."""
  return {"pos_embed": params["backbone"]["pos_embed"]}


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  head = (
    "| blocks | parameters | TFLOP | weights + inputs, GiB | temporary, GiB "
    "| peak, GiB | attention kernels run | lowering, s | compiling, s |"
  )
  lines = [head, "|" + "---|" * 9]
  for r in rows:
    lines.append(
      f"| {r['blocks']} | {r['parameters']:,} | {r['teraflops']:.3f} "
      f"| {r['weights_and_inputs_gib']:.2f} | {r['temporary_gib']:.2f} "
      f"| {r['peak_gib']:.2f} | {r['attention_kernels']} "
      f"| {r['lower_s']:.1f} | {r['compile_s']:.1f} |"
    )
  return "\n".join(lines)


def training_table(reports: Sequence[Mapping[str, Any]]) -> str:
  """Reports of training steps (`aot.Report.to_dict`) as a Markdown table."""

  def what(settings, num_chips):
    pairs = settings["train.batch_size"]
    at_once = pairs / (num_chips * settings["train.accumulate"])
    return settings["recipe"], f"{pairs} ({at_once:g})"

  return _report_table("recipe", "pairs per step (per chip at once)", reports, what)


def alignment_table(reports: Sequence[Mapping[str, Any]]) -> str:
  """The same of reports on the programs of alignment."""

  def what(settings, num_chips):
    samples = settings["train.prompts"] * settings["group.group_size"]
    parts = settings["train.rollout_parts"]
    if settings["program"] == "update":
      samples //= settings["train.minibatches"]
      parts = settings["train.micro_batches"]
    name = f"{settings['recipe']}, {settings['program']}"
    return name, f"{samples} ({samples / (num_chips * parts):g})"

  return _report_table("program", "samples (per chip at once)", reports, what)


def _report_table(
  first: str,
  sizes: str,
  reports: Sequence[Mapping[str, Any]],
  what: Callable[[Mapping[str, Any], int], tuple[str, str]],
) -> str:
  """Rows of reports; `what` gives the cells whose columns are `first` and `sizes`."""
  columns = (
    f"{first} | target | mesh data x fsdp | {sizes} | remat "
    "| memory: state + inputs, temporaries, total, GiB | fits "
    "| model TFLOP | collectives, GB | estimate + kernels, s | at least, s "
    "| compiling, s"
  )
  lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
  for r in reports:
    s, m, program = r["settings"], r["memory"], r["program"]
    fsdp = r["num_chips"] if s["mesh.fsdp"] == -1 else s["mesh.fsdp"]
    name, size = what(s, r["num_chips"])
    fits = f"{r['spare'] / aot.GIB:+.1f} GiB"
    collectives, estimate = "-", "-"
    if program is not None:
      collectives = ", ".join(
        f"{kind} {size / 1e9:.1f}"
        for kind, size in program["collective_bytes"].items()
        if size > 5e7
      )
    if r["compiler_seconds"] is not None:
      estimate = f"{r['compiler_seconds']:.3f} + {r['kernel_seconds']:.3f}"
    bounds = {name: r[f"{name}_bound"] for name in ("compute", "memory", "link")}
    cells = (
      name,
      r["target"],
      f"{r['num_chips'] // fsdp} x {fsdp}",
      size,
      s["model.remat"] + ("" if s["model.scan_blocks"] else ", unrolled"),
      f"{m['arguments'] / aot.GIB:.2f}, {m['temporaries'] / aot.GIB:.2f}, "
      f"{m['total'] / aot.GIB:.2f}",
      ("yes, " if r["fits"] else "**no**, ") + fits,
      f"{r['model_flops'] / 1e12:.1f}",
      collectives or "-",
      estimate,
      f"{r['lower_bound']:.3f} ({max(bounds, key=bounds.get)})",
      f"{r['compile_seconds']:.0f}",
    )
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def scaling_table(reports: Sequence[Mapping[str, Any]]) -> str:
  """Weak scaling: reports of the same programs on more and more chips, as Markdown.

  The last column is what would be kept of one chip's speed if the links were as fast as
  their data sheet and nothing were hidden behind the compute: the compiler's estimate
  over itself and the time that the bytes need to leave the chip.
  """
  lines = [
    "| program | target | chips | memory, GiB | model TFLOP | leaves a chip, GB "
    "| on the links at least, ms | estimate + kernels, s | kept, nothing hidden |",
    "|" + "---|" * 9,
  ]
  order = lambda r: (_program(r), r["target"].split(":")[0], r["num_chips"])  # noqa: E731
  for r in sorted(reports, key=order):
    seconds = r["compiler_seconds"] + r["kernel_seconds"]
    link = r["link_bound"]
    cells = (
      ", ".join(_program(r)),
      r["target"],
      str(r["num_chips"]),
      f"{r['memory']['total'] / aot.GIB:.1f}",
      f"{r['model_flops'] / 1e12:.1f}",
      f"{r['program']['wire_bytes'] / 1e9:.2f}",
      f"{1000 * link:.2f}",
      f"{seconds:.3f}",
      f"{seconds / (seconds + link):.1%}",
    )
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _program(report: Mapping[str, Any]) -> tuple[str, ...]:
  """The recipe, and of alignment the program."""
  settings = report["settings"]
  return tuple(settings[k] for k in ("recipe", "program") if k in settings)


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
  parser.add_argument("--table", nargs="+", help="only print a table of these reports")
  parser.add_argument("--scaling", nargs="+", help="the same as a weak scaling table")
  args = parser.parse_args(argv)

  if args.table or args.scaling:
    found = []
    for path in args.table or args.scaling:
      reports = json.loads(pathlib.Path(path).read_text())
      found += reports if isinstance(reports, list) else [reports]
    programs = [r for r in found if "program" in r["settings"]]
    steps = [r for r in found if "program" not in r["settings"]]
    if args.scaling:
      print(scaling_table([*steps, *programs]))
      return 0
    if steps:
      print(training_table(steps))
    if programs:
      print(alignment_table(programs))
    return 0
  try:
    target = aot.target(args.device, args.target_config)
  except aot.NotInstalledError as e:
    print(f"aot: {e}", file=sys.stderr)
    return NOT_INSTALLED
  except aot.TargetError as e:
    parser.error(str(e))
  target = dataclasses.replace(target, devices=target.devices[:1])
  rows = [compile_scorer(target, args, scan) for scan in (True, False)]
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
