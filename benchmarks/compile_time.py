"""Compiling, cold and from the persistent cache, each in a process of its own.

A scorer, a training step, and an iteration of Step-GRPO, as the other tables have them.
The first process finds an empty cache folder, the second what the first left there.
Tracing, which no cache saves, is counted apart.

  python benchmarks/compile_time.py --out benchmarks/results/compile_time_cpu.json
  python benchmarks/compile_time.py --full --out compile_time_gpu.json
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import grpo
import jax
import scoring
import training

TABLES = {"scoring": scoring, "training": training, "grpo": grpo}


def compile_once(name: str, full: bool) -> dict[str, Any]:
  """Seconds of the table's last case, in this process."""
  table = TABLES[name].TABLE
  sizes = table.full if full else table.narrow
  case = table.cases(sizes)[-1]
  made = table.ours(sizes).make(case)
  start = time.perf_counter()
  lowered = made.function.lower(*made.args)
  middle = time.perf_counter()
  lowered.compile()
  end = time.perf_counter()
  return {
    "case": f"{name}: {case.name}",
    "device": jax.devices()[0].device_kind,
    "trace_s": middle - start,
    "compile_s": end - middle,
  }


def in_a_process(name: str, full: bool, cache: str) -> dict[str, Any]:
  """The same in a fresh one.

  Raises:
    RuntimeError: it failed; the message has its output.
  """
  command = [sys.executable, __file__, "--only", name, *(["--full"] if full else [])]
  done = subprocess.run(
    command,
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, full: bool) -> dict[str, Any]:
  """A row: cold, warm, and what the cache holds."""
  with tempfile.TemporaryDirectory() as cache:
    cold, warm = (in_a_process(name, full, cache) for _ in range(2))
    size = sum(p.stat().st_size for p in pathlib.Path(cache).rglob("*") if p.is_file())
  keys = ("case", "device")
  return {key: cold[key] for key in keys} | {
    "cold": {k: v for k, v in cold.items() if k not in keys},
    "warm": {k: v for k, v in warm.items() if k not in keys},
    "cache_bytes": size,
  }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  lines = [
    "| program | warm to cold | cold, s | warm, s | tracing, s | cache, MB |",
    "|" + "---|" * 6,
  ]
  for r in rows:
    cold, warm = r["cold"]["compile_s"], r["warm"]["compile_s"]
    lines.append(
      f"| {r['case']} | {warm / cold:.2f} | {cold:.1f} | {warm:.1f} "
      f"| {r['warm']['trace_s']:.1f} | {r['cache_bytes'] / 1e6:.1f} |"
    )
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--full", action="store_true", help="full size, for a GPU")
  parser.add_argument("--programs", nargs="+", choices=list(TABLES), default=TABLES)
  parser.add_argument(
    "--only", choices=list(TABLES), help="compile it here, print JSON"
  )
  parser.add_argument("--out", help="also write the rows to this JSON file")
  args = parser.parse_args(argv)
  if args.only:
    print(json.dumps(compile_once(args.only, args.full)))
    return 0
  rows = []
  for name in args.programs:
    rows.append(measure(name, args.full))
    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if args.out:
      text = json.dumps({"jax": jax.__version__, "rows": rows}, indent=2)
      pathlib.Path(args.out).write_text(text + "\n")
  print(table(rows))
  return 0


if __name__ == "__main__":
  sys.exit(main())
