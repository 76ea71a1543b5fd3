"""How a benchmark compares our program with PyTorch's: fairly, and in one run.

Each side lives in a process of its own and holds the same random weights. Before
anything is timed both compute the same case and must agree (float32; in bfloat16 the
difference is reported). Then they take turns, case by case and round by round, so that
a machine that slows down slows both; a ratio is formed within a round. A matrix product
of fixed size opens every round: it shows a drifting machine, and is the peak that
rates are fractions of.

A table is a module with cases, a JaxSide and a TorchSide:

  class Ours(protocol.JaxSide):
    def make(self, case): return protocol.Program(jitted, args)

  class Theirs(protocol.TorchSide):
    def make(self, case): return call  # () -> outputs

  protocol.main(table, argv)
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side

from lrm_jax import aot, flops

AGREE = 1e-3  # relative difference of float32 outputs that counts as agreement
DRIFT = 1.02  # of the product: more, and a round on a GPU is measured again
ATTEMPTS = 3  # at a round that does not drift


# --- processes ---------------------------------------------------------------------


class Remote:
  """An object in a process of its own; its methods are called from here.

  Args:
    platform: of jax in that process; None: jax's choice.
  """

  def __init__(self, make: Callable[..., Any], *args, platform: str | None = None):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    process = context.Process(
      target=_serve, args=(theirs, make, args, platform), daemon=True
    )
    process.start()
    theirs.close()

  def __getattr__(self, name: str) -> Callable[..., Any]:
    def call(*args, **kw):
      self._pipe.send((name, args, kw))
      try:
        error, value = self._pipe.recv()
      except EOFError:
        raise RuntimeError(f"a benchmark process died during {name!r}") from None
      if error is not None:
        raise RuntimeError(f"{name!r} failed in a benchmark process:\n{error}")
      return value

    return call


def _serve(pipe, make, args, platform) -> None:
  """A process' main loop: answers (error, value)."""
  if platform is not None:
    jax.config.update("jax_platforms", platform)
  served = None
  while True:
    try:
      name, args_, kw = pipe.recv()
    except EOFError:
      return
    try:
      served = make(*args) if served is None else served
      pipe.send((None, getattr(served, name)(*args_, **kw)))
    except Exception:
      pipe.send((traceback.format_exc(), None))


def prepare_processes() -> None:
  """For the processes that are started: one GPU for both, and convert/ to import."""
  # jax must not take three quarters of the GPU at once.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  convert = pathlib.Path(__file__).resolve().parent.parent / "convert"
  sys.path.append(str(convert))


def peak_rss() -> int:
  """Bytes that this process had resident at most."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- the two sides -----------------------------------------------------------------


@dataclasses.dataclass
class Program:
  """What is timed on our side.

  Attributes:
    function: jitted.
    args: on the devices.
    carries: it returns (its next first argument, outputs), and donates the first.
  """

  function: Any
  args: tuple
  carries: bool = False


class Product:
  """A matrix product of fixed size, in jax."""

  def __init__(self):
    gpu = jax.default_backend() == "gpu"
    self.size, dtype = (8192, jnp.bfloat16) if gpu else (1024, jnp.float32)
    # Random: constant data draws less power, and a GPU clocks higher.
    a = jax.random.normal(jax.random.key(0), (self.size, self.size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    self._call = lambda: product(a, a)
    jax.block_until_ready(self._call())

  def __call__(self) -> float:
    """Seconds of one."""
    start = time.perf_counter()
    jax.block_until_ready([self._call() for _ in range(10)])
    return (time.perf_counter() - start) / 10


class JaxSide:
  """Our programs, compiled and timed. Subclasses `make` a case's Program."""

  def __init__(self, sizes: Any):
    # Calls of a group must not overlap on a CPU.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    self.sizes = sizes
    self._programs: dict[Any, Program] = {}
    self._product: Product | None = None

  def make(self, case: Any) -> Program:
    raise TypeError(f"{type(self).__name__} has no make()")

  def outputs(self, case: Any, result: Any) -> dict[str, Any]:
    """What is compared of a result."""
    del case
    return {"output": result}

  def about(self) -> dict[str, Any]:
    return {
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "flax": importlib.metadata.version("flax"),
    }

  def prepare(self, case: Any) -> dict[str, Any]:
    """Compiles; outputs of the first call, seconds, and bytes."""
    made = self.make(case)
    start = time.perf_counter()
    compiled = made.function.lower(*made.args).compile()
    seconds = time.perf_counter() - start
    memory = aot.memory_of(compiled)
    self._programs[case] = made
    outputs = self.outputs(case, self._call(case))
    stats = jax.devices()[0].memory_stats()
    return {
      "outputs": {name: np.asarray(a, np.float32) for name, a in outputs.items()},
      "compile_s": seconds,
      "temporary_bytes": memory.temporaries,
      "argument_bytes": memory.arguments,
      "program_bytes": memory.total,
      # The allocator's own peak only ever rises, over all cases.
      "peak_bytes_so_far": stats["peak_bytes_in_use"] if stats else None,
    }

  def _call(self, case: Any) -> Any:
    made = self._programs[case]
    result = made.function(*made.args)
    if made.carries:
      carry, result = result
      made.args = (carry, *made.args[1:])
    return result

  def run(self, case: Any, calls: int) -> float:
    """Seconds per call, of a group of calls."""
    start = time.perf_counter()
    for _ in range(calls):
      result = self._call(case)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls

  def product(self) -> tuple[float, float]:
    """(seconds, FLOPs) of the product of fixed size."""
    if self._product is None:
      self._product = Product()
    return self._product(), 2.0 * self._product.size**3

  def forget(self, case: Any) -> None:
    """Frees a case's arrays."""
    del self._programs[case]

  def peak_rss(self) -> int:
    return peak_rss()


class TorchSide:
  """PyTorch's, eager or compiled. Subclasses `make` a case's call."""

  def __init__(self, sizes: Any, compiled: bool):
    import torch

    self.torch, self.sizes, self.compiled = torch, sizes, compiled
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = self.device == "cuda"
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    if not on_gpu:
      torch.set_num_threads(len(os.sched_getaffinity(0)))
    self._calls: dict[Any, Callable[[], Any]] = {}

  def make(self, case: Any) -> Callable[[], dict[str, Any]]:
    """() -> named outputs, tensors."""
    raise TypeError(f"{type(self).__name__} has no make()")

  def fast(self, module: Any) -> Any:
    """A module as this side runs it."""
    return self.torch.compile(module, dynamic=False) if self.compiled else module

  def tensor(self, a: np.ndarray, dtype: str | None = None) -> Any:
    """A numpy array on the device."""
    # A copy, because jax's arrays are read-only.
    made = self.torch.from_numpy(np.array(a, order="C")).to(self.device)
    return made if dtype is None else made.to(getattr(self.torch, dtype))

  def about(self) -> dict[str, Any]:
    names = ("torch", "diffusers", "transformers", "peft")
    return {name: importlib.metadata.version(name) for name in names}

  def prepare(self, case: Any) -> dict[str, Any]:
    """Outputs of the first call, which compiles, its seconds, and the peak bytes."""
    torch = self.torch
    self._calls[case] = self.make(case)
    if self.device == "cuda":
      torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    outputs = self._calls[case]()
    self._wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
    return {
      "outputs": {
        name: a.detach().float().cpu().numpy() for name, a in outputs.items()
      },
      "first_call_s": seconds,
      "peak_bytes": peak,
    }

  def run(self, case: Any, calls: int) -> float:
    self._wait()
    start = time.perf_counter()
    for _ in range(calls):
      self._calls[case]()
    self._wait()
    return (time.perf_counter() - start) / calls

  def _wait(self) -> None:
    if self.device == "cuda":
      self.torch.cuda.synchronize()

  def forget(self, case: Any) -> None:
    del self._calls[case]
    if self.device == "cuda":
      self.torch.cuda.empty_cache()

  def peak_rss(self) -> int:
    return peak_rss()


# --- a run -------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
  return {
    "median": statistics.median(values),
    "min": min(values),
    "max": max(values),
  }


def differences(
  ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Relative difference of each output.

  Raises:
    ValueError: outputs of other names, or that are not numbers.
  """
  if set(ours) != set(theirs):
    raise ValueError(f"outputs {sorted(ours)} and {sorted(theirs)}")
  for name in ours:
    for side, a in (("jax", ours[name]), ("torch", theirs[name])):
      if not np.isfinite(a).all() or not np.any(a):
        raise ValueError(f"{side}'s {name} is not finite, or zero")
  return {n: side_by_side.relative_error(ours[n], theirs[n]) for n in ours}


def measure(
  cases: Sequence[Any],
  ours: Any,
  theirs: Mapping[str, Any],
  count: Callable[[Any], float],
  *,
  rounds: int,
  calls: int,
  progress: Callable[[str], None] = lambda text: None,
  done: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
  """Compiles, compares and times each case on both sides.

  Args:
    cases: hashable, with a `name`.
    ours, theirs: a JaxSide, and TorchSides by name, or Remotes of them.
    count: model FLOPs of a case.
    done: is given the report after every case, which may be the last one there is
      time for.

  Returns: `rows`, and what concerns all.
  """
  report: dict[str, Any] = {"rows": [], **ours.about()}
  for side in theirs.values():
    report |= side.about()
  for case in cases:
    mine = ours.prepare(case)
    outputs = mine.pop("outputs")
    row = {"case": case.name, "teraflops": count(case) / 1e12, "jax": mine}
    for name, side in theirs.items():
      row[name] = side.prepare(case)
      row[name]["difference"] = differences(outputs, row[name].pop("outputs"))
    progress(f"{case.name}: compiled and compared")
    sides = {"jax": ours, **theirs}
    for side in sides.values():
      side.run(case, calls)  # warm
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    products = []
    for _ in range(rounds):
      drift, found = _round(case, ours, sides, calls, report["device"])
      products.append(drift)
      for name, value in found.items():
        seconds[name].append(value)
    product = statistics.median(p["seconds"] for p in products)
    peak = products[0]["flops"] / product
    row["product"] = {
      "teraflops_per_s": peak / 1e12,
      "slowest_to_fastest": max(p["drift"] for p in products),
    }
    for name, values in seconds.items():
      rate = count(case) / statistics.median(values)
      row[name] |= {"seconds": values, **spread(values), "of_product": rate / peak}
      if name != "jax":
        ratios = [a / b for a, b in zip(seconds["jax"], values, strict=True)]
        row[name]["jax_to_it"] = spread(ratios)
    report["rows"].append(row)
    report["peak_rss_bytes"] = {n: side.peak_rss() for n, side in sides.items()}
    done(report)
    progress(f"{case.name}: timed")
    for side in sides.values():
      side.forget(case)
  return report


def _round(case, ours, sides, calls, device) -> tuple[dict, dict[str, float]]:
  """One turn of each side, between two products; again if a GPU's clock drifted."""
  on_gpu = any(kind in device for kind in ("NVIDIA", "H100", "H200", "A100"))
  for _ in range(ATTEMPTS):
    before, operations = ours.product()
    found = {name: side.run(case, calls) for name, side in sides.items()}
    after, _ = ours.product()
    drift = max(before, after) / min(before, after)
    if drift <= DRIFT or not on_gpu:
      break
  middle = (before + after) / 2
  return {"seconds": middle, "flops": operations, "drift": drift}, found


def problems(report: Mapping[str, Any], names: Sequence[str], dtype: str) -> list[str]:
  """What makes a run invalid, one line each."""
  return [
    f"{row['case']}: {output} of {name} differs by {error:.1e}"
    for row in report["rows"]
    for name in names
    for output, error in row[name]["difference"].items()
    if dtype == "float32" and not error <= AGREE
  ]


def table(report: Mapping[str, Any], names: Sequence[str]) -> str:
  """The rows as a Markdown table; absolute times only of a GPU."""
  on_gpu = report["rows"][0]["jax"]["peak_bytes_so_far"] is not None
  head = ["case", "TFLOP", *(f"jax to {name}" for name in names)]
  head += [f"{name}, of the product's rate" for name in ("jax", *names)]
  if on_gpu:
    head += [f"{name}, ms" for name in ("jax", *names)]
    head += ["jax, program GiB", *(f"{name}, peak GiB" for name in names)]
  head += ["temporaries, MiB", "compiling, s", *(f"difference to {n}" for n in names)]
  lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
  for row in report["rows"]:
    both = [row[name] for name in ("jax", *names)]
    ratios = [row[name]["jax_to_it"] for name in names]
    cells = [row["case"], f"{row['teraflops']:.3g}"]
    cells += [f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for r in ratios]
    cells += [f"{side['of_product']:.0%}" for side in both]
    if on_gpu:
      cells += [f"{1000 * side['median']:.2f}" for side in both]
      cells += [f"{row['jax']['program_bytes'] / aot.GIB:.2f}"]
      cells += [f"{row[name]['peak_bytes'] / aot.GIB:.2f}" for name in names]
    cells += [f"{row['jax']['temporary_bytes'] / 2**20:.1f}"]
    cells += [f"{row['jax']['compile_s']:.1f}"]
    cells += [f"{max(row[name]['difference'].values()):.1e}" for name in names]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


# --- the command -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
  """One command.

  Attributes:
    description: for --help.
    narrow, full: sizes with a `dtype`, for a CPU and for a GPU.
    cases: sizes -> all cases.
    ours, theirs: classes of the two sides.
    count: (sizes, case) -> model FLOPs.
  """

  description: str
  narrow: Any
  full: Any
  cases: Callable[[Any], Sequence[Any]]
  ours: type[JaxSide]
  theirs: type[TorchSide]
  count: Callable[[Any, Any], float]


def main(found: Table, argv: Sequence[str] | None = None) -> int:
  """Runs a table. Exit code 1: the two sides disagree."""
  parser = argparse.ArgumentParser(
    description=found.description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--full", action="store_true", help="full size, for a GPU")
  parser.add_argument("--cases", nargs="+", help="default: all")
  parser.add_argument(
    "--torch", nargs="*", choices=["eager", "compile"], default=["eager"]
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--calls", type=int, default=3, help="per group")
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)
  sizes = found.full if args.full else found.narrow
  every = {case.name: case for case in found.cases(sizes)}
  if unknown := sorted(set(args.cases or ()) - set(every)):
    parser.error(f"--cases {' '.join(unknown)}: use some of {' '.join(every)}")
  cases = [every[name] for name in args.cases or every]
  names = [f"torch-{how}" for how in args.torch]
  settings = {
    "sizes": dataclasses.asdict(sizes),
    "machine": platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "rounds": args.rounds,
    "calls": args.calls,
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }
  print(json.dumps(settings), flush=True)

  def write(report: Mapping[str, Any]) -> None:
    if args.out is not None:
      text = json.dumps(settings | dict(report), indent=2)
      pathlib.Path(args.out).write_text(text + "\n")

  prepare_processes()
  start = time.perf_counter()
  report = measure(
    cases,
    Remote(found.ours, sizes),
    # Whose jax only makes the weights.
    {
      name: Remote(found.theirs, sizes, how == "compile", platform="cpu")
      for name, how in zip(names, args.torch, strict=True)
    },
    lambda case: found.count(sizes, case),
    rounds=args.rounds,
    calls=args.calls,
    progress=lambda text: print(
      f"[{time.perf_counter() - start:.0f} s] {text}", file=sys.stderr, flush=True
    ),
    done=write,
  )
  versions = ("device", "jax", "flax", "torch", "diffusers", "transformers", "peft")
  print(", ".join(f"{name} {report[name]}" for name in versions if name in report))
  known = flops.peak(report["device"])
  if known is not None:
    share = report["rows"][0]["product"]["teraflops_per_s"] * 1e12 / known
    print(
      f"the product runs at {share:.0%} of the data sheet's {known / 1e12:.0f} TF/s"
    )
  print(f"\n{table(report, names)}")
  bad = problems(report, names, sizes.dtype)
  for line in bad:
    print(f"benchmark: {line}", file=sys.stderr)
  return 1 if bad else 0
