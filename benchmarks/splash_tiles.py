"""How many cycles splash attention takes on a TPU, by tile size, without a TPU.

A TPU core runs the schedule that the compiler made: one bundle of instructions per
cycle. libtpu writes a kernel's final bundles to a file when it is told to, and a tile's
cycles are their number. Cycles of one head are those of its tiles; what only a head's
first or last tile does, and what the kernel does once, is counted for every tile.
Waiting for memory is not in a schedule.

  forward   softmax(q k^T / sqrt(64)) v, without what a backward pass needs
  gradient  that with it, and the two backward kernels (of q; of k and v)

Lengths are those of SD3.5 at 512 px (the image alone, and with 205, 333 and 589 text
tokens) and at 1024 px with 333. "Of the peak" counts 4 n^2 64 FLOP forward and 2.5
times that backward (which computes the logits once more), padding not included, on all
cores of a chip.

  pip install "libtpu==0.0.42.*"
  python benchmarks/splash_tiles.py --device v5e:2x2 v5p:2x2x1 v6e:2x2

Exit code 3: libtpu is not installed.
"""

import argparse
from collections.abc import Sequence
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
import jax.numpy as jnp

from lrm_jax import aot
from lrm_jax.models import attention

NOT_INSTALLED = 3
HEAD_DIM = 64
# Of the compiled program, so large that its arrays lie in HBM, as they do in a model.
# The schedule is that of one head of one sample.
BATCH, HEADS = 8, 24
# Heads are independent: a chip of two cores takes two at a time.
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}

# tokens -> tiles: what splash_tile would choose if larger or smaller ones were allowed.
TILES = {
  1024: (512, 1024),
  1229: (640, 1280),
  1357: (768, 1408),
  1613: (896, 1664),
  4429: (896, 1152, 1536),
}


class TooLargeError(RuntimeError):
  """The kernels of such a tile do not fit the chip's fast memory."""


def compile_kernels(
  device: str, tokens: int, tile: int, layout: str, grad: bool
) -> None:
  """Compiles attention alone, for libtpu to write what it makes of it."""
  devices = aot.target(device).devices[:1]
  place = jax.sharding.SingleDeviceSharding(devices[0])
  shape = (BATCH, tokens, HEADS, HEAD_DIM)
  q = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

  def attend(q, k, v):
    order = splash_attention_kernel.QKVLayout[layout]
    return attention.local_splash(q, k, v, tile=tile, layout=order)

  def total(*qkv):
    return jnp.sum(attend(*qkv).astype(jnp.float32))

  jax.jit(jax.grad(total, (0, 1, 2)) if grad else attend).lower(q, q, q).compile()


def count_bundles(text: str) -> int:
  """Of a listing by libtpu: lines of `address [marks] : { instructions }`."""
  return len(re.findall(r"(?m)^\s*(?:0x[0-9a-f]+|0)\s[^{]*:", text))


def bundles(
  device: str, tokens: int, tile: int, layout: str, grad: bool
) -> dict[str, int]:
  """Kernel (`fwd`, `dq`, `dkv`) -> bundles of one tile, from a process of its own.

  Raises:
    TooLargeError: it does not fit; the compiler's words.
    RuntimeError: it does not compile for another reason.
  """
  with tempfile.TemporaryDirectory() as folder:
    # Read once, when libtpu is loaded.
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    case = json.dumps([device, tokens, tile, layout, grad])
    run = subprocess.run(
      [sys.executable, __file__, "--compile", case],
      env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )
    if run.returncode:
      lines = [line for line in run.stderr.splitlines() if "Error" in line]
      reason = lines[-1] if lines else run.stderr[-300:]
      kind = TooLargeError if "RESOURCE_EXHAUSTED" in reason else RuntimeError
      raise kind(reason)
    found = {}
    for path in pathlib.Path(folder).glob("*splash_mha_*final_bundles.txt"):
      if "schedule-analysis" not in path.name:
        kernel = re.search(r"splash_mha_([a-z]+)_", path.name)[1]
        found[kernel] = count_bundles(path.read_text())
  if found.keys() != ({"fwd", "dq", "dkv"} if grad else {"fwd"}):
    raise RuntimeError(f"libtpu wrote the schedules of {sorted(found)} only")
  return found


def measure(device: str, tokens: int, tile: int, layout: str) -> dict[str, Any]:
  """One row of the table."""
  generation = device.partition(":")[0]
  chip = aot.TPUS[generation]
  tiles = -(-tokens // tile)
  row = {"device": device, "tokens": tokens, "tile": tile, "layout": layout}
  row |= {"padded": tiles * tile, "chosen": tile == attention.splash_tile(tokens)}
  try:
    forward = bundles(device, tokens, tile, layout, grad=False)
    gradient = bundles(device, tokens, tile, layout, grad=True)
  except TooLargeError as e:
    return row | {"error": str(e)}
  row["forward"] = forward["fwd"] * tiles**2
  row |= {kernel: count * tiles**2 for kernel, count in gradient.items()}
  row["gradient"] = sum(gradient.values()) * tiles**2
  flops = 4.0 * tokens**2 * HEAD_DIM
  for name, count in (("forward", flops), ("gradient", 3.5 * flops)):
    rate = CORES[generation] * count / (row[name] / chip.clock)
    row[f"{name}_share"] = rate / chip.peak_flops
  return row


def table(rows: Sequence[dict[str, Any]]) -> str:
  lines = [
    "| target | tokens | tile | padded to | operands | forward, cycles per head "
    "| gradient (forward + q + k, v) | of the peak: forward, gradient |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in rows:
    mark = " (chosen)" if r["chosen"] else ""
    line = f"| {r['device'].partition(':')[0]} | {r['tokens']} | {r['tile']}{mark} "
    line += f"| {r['padded']} | {r['layout'].lower()} "
    if "error" in r:
      line += "| does not fit | | |"
    else:
      line += (
        f"| {r['forward']:,} | {r['gradient']:,} ({r['fwd']:,} + {r['dq']:,} + "
        f"{r['dkv']:,}) | {r['forward_share']:.0%}, {r['gradient_share']:.0%} |"
      )
    lines.append(line)
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--device", nargs="+", default=["v5e:2x2"])
  parser.add_argument("--tokens", nargs="+", type=int, choices=TILES, default=[*TILES])
  parser.add_argument(
    "--layout",
    nargs="+",
    choices=["SEQ_MINOR", "HEAD_DIM_MINOR"],
    default=[attention.SPLASH_LAYOUT.name],
    help="which axis of q, k, v lies along the lanes",
  )
  parser.add_argument("--out", help="JSON file for the results")
  parser.add_argument("--compile", help=argparse.SUPPRESS)  # a case, in a process
  args = parser.parse_args()
  if args.compile is not None:
    compile_kernels(*json.loads(args.compile))
    return
  if importlib.util.find_spec("libtpu") is None:
    print('libtpu is not installed: pip install "libtpu==0.0.42.*"', file=sys.stderr)
    raise SystemExit(NOT_INSTALLED)
  for device in args.device:
    if device.partition(":")[0] not in CORES:
      parser.error(f"--device {device}: one of {', '.join(CORES)}, as in v5e:2x2")
  rows = []
  for device in args.device:
    for tokens in args.tokens:
      for tile in TILES[tokens]:
        for layout in args.layout:
          try:
            rows.append(measure(device, tokens, tile, layout))
          except RuntimeError as e:
            raise SystemExit(f"error: {device}, tile {tile}: {e}") from e
          print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
  print(table(rows))
  if args.out is not None:
    found = {"jax": jax.__version__, "rows": rows}
    pathlib.Path(args.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()
