"""Where the time of a case goes on a GPU: by kind of kernel, from a profile.

A profiler's timeline of one side of another table's case, after warming up. Time in
which no kernel ran is the difference to the wall clock (measured without a profiler).

  python benchmarks/kernel_times.py scoring dina-512px-16 --sides jax torch-eager
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import importlib
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax
import protocol

TABLES = ("scoring", "training", "grpo", "attention_kernels", "text_and_pixels")
KINDS = {  # the first one that fits a kernel's name
  "attention": r"fmha|flash|sdpa|attention|mha_",
  "products": r"gemm|nvjet|xmma|cutlass|cublas|wgrad|dgrad|gemv|splitk|_dot",
  "convolutions": r"conv",
  "copies": r"memcpy|memset|copy|transpose|concatenate|pad",
}
OTHER = "the rest (element-wise, norms, sums)"
CALLS = 5


def kind_of(kernel: str) -> str:
  for kind, pattern in KINDS.items():
    if re.search(pattern, kernel, re.IGNORECASE):
      return kind
  return OTHER


def summarise(
  events: Iterable[tuple[str, float]], calls: int, wall: float
) -> dict[str, Any]:
  """Milliseconds per call by kind, and the kernels that take longest.

  Args:
    events: (kernel, seconds) of all calls.
    wall: seconds of one call.
  """
  names: Counter[str] = Counter()
  for name, seconds in events:
    names[name] += 1000 * seconds / calls
  kinds: Counter[str] = Counter()
  for name, ms in names.items():
    kinds[kind_of(name)] += ms
  kinds["nothing runs"] = max(0.0, 1000 * wall - names.total())
  return {
    "wall_ms": 1000 * wall,
    "kinds_ms": dict(kinds.most_common()),
    "kernels_ms": dict(names.most_common(25)),
  }


def events_of(data: jax.profiler.ProfileData) -> list[tuple[str, float]]:
  """(kernel, seconds) from jax's profile of one GPU."""
  return [
    (event.name, event.duration_ns / 1e9)
    for plane in data.planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]


def of_jax(side: protocol.JaxSide, case: Any) -> dict[str, Any]:
  side.compile([case])
  side.prepare(case)
  side.run(case, CALLS)
  wall = side.run(case, CALLS)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      side.run(case, CALLS)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    events = events_of(jax.profiler.ProfileData.from_file(str(path)))
  return summarise(events, CALLS, wall)


def of_torch(side: protocol.TorchSide, case: Any) -> dict[str, Any]:
  from torch import profiler

  side.prepare(case)
  side.run(case, CALLS)
  wall = side.run(case, CALLS)
  with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
    side.run(case, CALLS - 1)  # which calls once more on a GPU
  events = [(e.key, e.self_device_time_total / 1e6) for e in profile.key_averages()]
  return summarise(events, CALLS, wall)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
  """Kinds in rows, sides in columns, ms per call."""
  kinds = list(dict.fromkeys(k for one in found.values() for k in one["kinds_ms"]))
  lines = [f"| ms | {' | '.join(found)} |", "|" + "---|" * (1 + len(found))]
  for kind in kinds:
    cells = [f"{one['kinds_ms'].get(kind, 0.0):.2f}" for one in found.values()]
    lines.append(f"| {kind} | {' | '.join(cells)} |")
  cells = [f"{one['wall_ms']:.2f}" for one in found.values()]
  return "\n".join([*lines, f"| one call | {' | '.join(cells)} |"])


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("table", choices=TABLES)
  parser.add_argument("cases", nargs="+", help="of its full sizes")
  sides = ("jax", *(f"torch-{how}" for how in protocol.HOWS))
  parser.add_argument("--sides", nargs="+", choices=sides, default=["jax"])
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)
  protocol.prepare_processes()
  if jax.default_backend() != "gpu":
    parser.error("needs a GPU: a CPU's profile has no kernels")
  of = importlib.import_module(args.table).TABLE
  every = {case.name: case for case in of.cases(of.full)}
  if unknown := sorted(set(args.cases) - set(every)):
    parser.error(f"{' '.join(unknown)}: use some of {' '.join(every)}")
  report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "cases": {}}
  made: dict[str, Any] = {}
  for name in args.cases:
    found = {}
    for side in args.sides:
      if side not in made:
        how = side.removeprefix("torch-")
        made[side] = of.ours(of.full) if side == "jax" else of.theirs(of.full, how)
      run = of_jax if side == "jax" else of_torch
      found[side] = run(made[side], every[name])
      made[side].forget(every[name])
    report["cases"][name] = found
    print(f"{args.table}, {name}\n\n{table(found)}\n", flush=True)
    if args.out:
      pathlib.Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
