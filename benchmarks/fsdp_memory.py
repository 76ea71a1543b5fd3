"""What each device holds when the training state is split over 1, 2, 4, 8 of them.

Two views of one recipe (configs/drm_sd35m.py: all weights are trained, every rule is
`fsdp`), with an exponential average of the weights besides what the recipe keeps:

  full size  parameters, Adam's moments and the average of SD3.5-Medium, from the
             shapes and the shardings alone; nothing is allocated
  compiled   the trainer's step for a narrower and shallower model with the same layout,
             compiled for so many CPU devices: XLA's own account of arguments, of what
             is written into donated arguments, and of temporaries

The batch is the same for every number of devices and split over them. Nothing runs.
Temporaries are those of XLA's CPU backend: other backends schedule and fuse otherwise
(docs/aot.md compiles for TPUs and GPUs).

  PYTHONPATH=train:configs python benchmarks/fsdp_memory.py \\
      --out benchmarks/results/fsdp_memory.json
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import drm_sd35m
import jax
from ml_collections import ConfigDict
import reward as train_reward

from lrm_jax import aot, build, folder, sharding
from lrm_jax.models import mmdit

PARTS = ("params", "opt_state", "ema")
# Machine code of the least effort: buffers are assigned before it is generated.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


def full_config(ema_decay: float) -> ConfigDict:
  """The recipe, with an average."""
  config = drm_sd35m.get_config()
  config.train.ema_decay = ema_decay
  return config


def narrow_config(
  base: pathlib.Path,
  ema_decay: float,
  *,
  heads: int,
  layers: int,
  batch_size: int,
  pixels: int,
) -> ConfigDict:
  """The recipe for a smaller transformer, which is described (only) in `base`."""
  full = mmdit.MMDiTConfig(
    num_layers=layers + 1,
    num_heads=heads,
    head_dim=64,
    dual_layers=tuple(range(layers // 2)),
    context_dim=8 * heads * 16,
    pooled_dim=8 * heads * 8,
    pos_embed_size=64,
    pos_embed_base=64,
  )
  base.mkdir(parents=True, exist_ok=True)
  entry = {"config": build.config_to_dict(full)}
  folder.write_config(base, {"components": {"transformer": entry}})
  config = full_config(ema_decay)
  config.model.base = str(base)
  config.model.transformer = ""
  config.model.num_layers = layers
  config.train.batch_size = config.eval.batch_size = batch_size
  config.aot.height = config.aot.width = pixels
  config.aot.text_tokens = 128
  return config


def state_bytes(config: ConfigDict, devices: Sequence[jax.Device]) -> dict[str, int]:
  """Bytes per device of each part of the train state, split over all devices."""
  mesh = sharding.make_mesh(-1, devices)
  programs = train_reward.make_programs(config, mesh)
  placed = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    programs.state,
    programs.state_shardings,
  )
  parts = {part: sharding.bytes_per_device(getattr(placed, part)) for part in PARTS}
  return parts | {"total": sharding.bytes_per_device(placed)}


def compiled_memory(config: ConfigDict, devices: Sequence[jax.Device]) -> aot.Memory:
  """Of the training step, per device."""
  mesh = sharding.make_mesh(-1, devices)
  with jax.set_mesh(mesh):  # as a run has it
    step, args = train_reward.abstract_run(config, mesh)
    return aot.memory_of(step.lower(*args).compile(COMPILER_OPTIONS))


def measure(
  full: ConfigDict, narrow: ConfigDict, counts: Sequence[int]
) -> list[dict[str, Any]]:
  """A row of results per number of devices."""
  rows = []
  for count in counts:
    devices = jax.devices()[:count]
    start = time.perf_counter()
    memory = compiled_memory(narrow, devices)
    seconds = time.perf_counter() - start
    rows.append(
      {
        "devices": count,
        "state": state_bytes(full, devices),
        "narrow_state": state_bytes(narrow, devices),
        "compiled": dataclasses.asdict(memory),
        "trace_and_compile_s": seconds,
      }
    )
  return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows as a Markdown table."""
  lines = [
    "| devices | full size: parameters, Adam, average, GiB | state, GiB "
    "| of one device's | compiled: arguments, MiB | of one device's | donated, MiB "
    "| temporaries, MiB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  first = rows[0]
  for row in rows:
    state, memory = row["state"], row["compiled"]
    parts = ", ".join(f"{state[part] / aot.GIB:.2f}" for part in PARTS)
    of_state = state["total"] / first["state"]["total"]
    of_arguments = memory["arguments"] / first["compiled"]["arguments"]
    lines.append(
      f"| {row['devices']} | {parts} | {state['total'] / aot.GIB:.2f} "
      f"| {of_state:.3f} | {memory['arguments'] / 2**20:.1f} | {of_arguments:.3f} "
      f"| {memory['aliased'] / 2**20:.1f} | {memory['temporaries'] / 2**20:.1f} |"
    )
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
  parser.add_argument("--heads", type=int, default=8, help="of 64 (full size: 24)")
  parser.add_argument("--layers", type=int, default=6, help="blocks (full size: 21)")
  parser.add_argument("--batch", type=int, default=8, help="pairs on all devices")
  parser.add_argument("--pixels", type=int, default=256, help="side of an image")
  parser.add_argument("--ema-decay", type=float, default=0.999)
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(args.devices))
  with tempfile.TemporaryDirectory() as base:
    narrow = narrow_config(
      pathlib.Path(base),
      args.ema_decay,
      heads=args.heads,
      layers=args.layers,
      batch_size=args.batch,
      pixels=args.pixels,
    )
    rows = measure(full_config(args.ema_decay), narrow, sorted(args.devices))
  print(
    f"per device; full size: drm_sd35m; compiled: {args.layers} blocks of width "
    f"{64 * args.heads}, {args.batch} pairs of {args.pixels} px in all, jax "
    f"{jax.__version__} on CPU devices\n\n{table(rows)}"
  )
  if args.out:
    report = {**{k: v for k, v in vars(args).items() if k != "out"}}
    report |= {"recipe": "drm_sd35m", "jax": jax.__version__, "rows": rows}
    pathlib.Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
