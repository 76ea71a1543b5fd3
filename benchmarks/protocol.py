"""How a benchmark compares our program with PyTorch's: fairly, and in one run.

Each side lives in a process of its own and holds the same random weights. Before
anything is timed both compute the same case and must agree (float32; in bfloat16 the
difference is reported, and where a table knows the result in float32 our error may not
exceed PyTorch's by half). Then they take turns, case by case and round by round, so
that a machine that slows down slows both; a ratio is formed within a round. A matrix
product of fixed size opens every round: it shows a drifting machine, and is the peak
that rates are fractions of.

PyTorch runs `eager`, through torch.compile as a whole (`compile`), or with every kind
of transformer block compiled once (`blocks`, as diffusers' compile_repeated_blocks
does): minutes less to compile. A side that fails a case, for instance out of memory, is
reported with its error, and the others go on.

A table is a module with cases, a JaxSide and a TorchSide:

  class Ours(protocol.JaxSide):
    def make(self, case): return protocol.Program(jitted, args)

  class Theirs(protocol.TorchSide):
    def make(self, case): return call  # () -> outputs

  protocol.main(table, argv)
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import math
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

from lrm_jax import aot, compilation, flops

AGREE = 1e-3  # relative difference of float32 outputs that counts as agreement
DRIFT = 1.02  # of the product: more, and a round on a GPU is measured again
ATTEMPTS = 3  # at a round that does not drift
GROUP_SECONDS = 0.3  # that a group of calls takes on a GPU at least
EXACT_ROWS = 8  # of a batch, computed in float32 as well
WORSE = 1.5  # than PyTorch's may our error in bfloat16 be
HOWS = ("eager", "compile", "blocks")


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
  given = os.environ.get("XLA_FLAGS", "")
  version = importlib.metadata.version("jaxlib")
  os.environ["XLA_FLAGS"] = compilation.with_gpu_flags(given, version)
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
    function: jitted, or compiled.
    args: on the devices; of a second call of `make`, of the same shapes.
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
    self._compiled: dict[Any, tuple[Any, float]] = {}  # with seconds
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

  def compile(self, cases: Sequence[Any]) -> None:
    """Compiles all cases, as many at a time as there are cores."""

    def one(case, lowered):
      start = time.perf_counter()
      compiled = lowered.compile()
      self._compiled[case] = compiled, time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
      jobs = []
      for case in cases:
        made = self.make(case)
        jobs.append(pool.submit(one, case, made.function.lower(*made.args)))
        del made  # its arrays: `prepare` makes them when their turn has come
      errors = [job.exception() for job in jobs]
    # Of several, `prepare` compiles those that are missing once more, each alone.
    if len(cases) == 1 and errors[0] is not None:
      raise errors[0]

  def prepare(self, case: Any) -> dict[str, Any]:
    """Outputs of the first call; seconds of compiling, and bytes."""
    if case not in self._compiled:
      self.compile([case])
    compiled, seconds = self._compiled[case]
    self._programs[case] = dataclasses.replace(self.make(case), function=compiled)
    memory = aot.memory_of(compiled)
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
    self._programs.pop(case, None)

  def peak_rss(self) -> int:
    return peak_rss()


class TorchSide:
  """PyTorch's, run as `how` of HOWS. Subclasses `make` a case's call."""

  def __init__(self, sizes: Any, how: str):
    import torch

    self.torch, self.sizes, self.how = torch, sizes, how
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = self.device == "cuda"
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    if not on_gpu:
      torch.set_num_threads(len(os.sched_getaffinity(0)))
    if how != "eager":
      # Each case has shapes of its own; beyond the limit they would run uncompiled.
      torch._dynamo.config.recompile_limit = 100
      torch._dynamo.config.fail_on_recompile_limit_hit = True
    self._calls: dict[Any, Callable[[], Any]] = {}
    # case -> outputs in float32, of the first EXACT_ROWS rows; `make` may fill it.
    self.exact: dict[Any, dict[str, Any]] = {}

  def make(self, case: Any) -> Callable[[], dict[str, Any]]:
    """() -> named outputs, tensors."""
    raise TypeError(f"{type(self).__name__} has no make()")

  def fast(self, module: Any) -> Any:
    """A module as this side runs it."""
    torch = self.torch
    if self.how == "blocks" and isinstance(module, torch.nn.Module):
      found = [m.transformer_blocks for m in module.modules()
               if hasattr(m, "transformer_blocks")]  # fmt: skip
      for blocks in found[:1]:
        for block in blocks:
          block.compile(dynamic=False)
        return module
    return module if self.how == "eager" else torch.compile(module, dynamic=False)

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
    ready = lambda some: {  # noqa: E731
      name: a.detach().float().cpu().numpy() for name, a in some.items()
    }
    return {
      "outputs": ready(outputs),
      "exact": ready(self.exact.pop(case, {})),
      "first_call_s": seconds,
      "peak_bytes": peak,
    }

  def run(self, case: Any, calls: int) -> float:
    """Seconds per call, of a group of calls."""
    if self.device == "cuda":
      self._calls[case]()  # takes its memory back
    self._wait()
    start = time.perf_counter()
    for _ in range(calls):
      self._calls[case]()
    self._wait()
    seconds = (time.perf_counter() - start) / calls
    if self.device == "cuda":
      self.torch.cuda.empty_cache()  # the next side may need it
    return seconds

  def _wait(self) -> None:
    if self.device == "cuda":
      self.torch.cuda.synchronize()

  def forget(self, case: Any) -> None:
    self._calls.pop(case, None)
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
  """Relative difference of each output; `theirs` may have fewer rows.

  Raises:
    ValueError: outputs of other names, or that are not numbers.
  """
  if set(ours) != set(theirs):
    raise ValueError(f"outputs {sorted(ours)} and {sorted(theirs)}")
  for name in ours:
    for side, a in (("jax", ours[name]), ("torch", theirs[name])):
      if not np.isfinite(a).all() or not np.any(a):
        raise ValueError(f"{side}'s {name} is not finite, or zero")
  some = lambda a, like: a[: len(like)] if np.ndim(like) else a  # noqa: E731
  return {
    n: side_by_side.relative_error(some(ours[n], b), b) for n, b in theirs.items()
  }


def each(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
  """All calls at a time; their results by name."""
  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    jobs = {name: pool.submit(call) for name, call in calls.items()}
    return {name: job.result() for name, job in jobs.items()}


def _prepare(side, name, cases, progress) -> list[dict[str, Any]]:
  """Of a case that fails, out of memory perhaps: {"failed": its error}."""
  found = []
  for case in cases:
    try:
      found.append(side.prepare(case))
      progress(f"{case.name}: {name} ready")
    except RuntimeError as e:
      text = str(e).strip()
      found.append({"failed": text.splitlines()[-1]})
      progress(f"{case.name}: {name} failed: {text}")
  return found


def measure(
  cases: Sequence[Any],
  ours: Any,
  theirs: Mapping[str, Any],
  count: Callable[[Any], float],
  *,
  rounds: int,
  calls: int,
  together: bool = True,
  progress: Callable[[str], None] = lambda text: None,
  done: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
  """Compiles, compares and times each case on both sides.

  Args:
    cases: hashable, with a `name`.
    ours, theirs: a JaxSide, and TorchSides by name, or Remotes of them.
    count: model FLOPs of a case.
    together: all cases fit into memory at once, and are prepared before the first one
      is timed.
    done: is given the report after every case, which may be the last one there is
      time for.

  Returns: `rows`, and what concerns all.
  """
  report: dict[str, Any] = {"rows": []}
  sides = {"jax": ours, **theirs}
  first = cases if together else ()

  def start(name, side):
    about = side.about()
    if name == "jax":
      side.compile(cases)
      progress("jax: all compiled")
    return about, _prepare(side, name, first, progress)

  started = each({n: lambda n=n, s=side: start(n, s) for n, side in sides.items()})
  for about, _ in started.values():
    report |= about
  on_gpu = any(kind in report["device"] for kind in ("NVIDIA", "H100", "H200", "A100"))
  for i, case in enumerate(cases):
    if together:
      made = {name: found[i] for name, (_, found) in started.items()}
    else:
      made = each(
        {
          n: lambda n=n, s=side, c=case: _prepare(s, n, [c], progress)[0]
          for n, side in sides.items()
        }
      )
    row = {"case": case.name, "teraflops": count(case) / 1e12, **made}
    report["rows"].append(row)
    running = {n: side for n, side in sides.items() if "failed" not in row[n]}
    outputs = {name: row[name].pop("outputs") for name in running}
    exact = [row[name].pop("exact", None) for name in running]
    for name in running:
      if "jax" in running and name != "jax":
        row[name]["difference"] = differences(outputs["jax"], outputs[name])
      for known in filter(None, exact):
        row[name]["error"] = differences(outputs[name], known)
        row["exact_rows"] = max(len(np.atleast_1d(a)) for a in known.values())
    row |= _time(case, ours, running, rounds, calls, on_gpu)
    for name in running:
      values = row["seconds"][name]
      rate = count(case) / statistics.median(values)
      row[name] |= {"seconds": values, **spread(values)}
      row[name]["of_product"] = rate / 1e12 / row["product"]["teraflops_per_s"]
      if name != "jax" and "jax" in running:
        pairs = zip(row["seconds"]["jax"], values, strict=True)
        row[name]["jax_to_it"] = spread([a / b for a, b in pairs])
    del row["seconds"]
    report["peak_rss_bytes"] = {n: side.peak_rss() for n, side in sides.items()}
    done(report)
    progress(f"{case.name}: timed")
    for side in sides.values():
      side.forget(case)
  return report


def _time(case, ours, sides, rounds, calls, on_gpu) -> dict[str, Any]:
  """Seconds of every side in every round, and what the product took."""
  number = {}
  for name, side in sides.items():
    first = side.run(case, 1)  # warm
    enough = math.ceil(GROUP_SECONDS / first) if on_gpu else 0
    number[name] = max(calls, enough)
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  products = []
  for _ in range(rounds):
    product, found = _round(case, ours, sides, number, on_gpu)
    products.append(product)
    for name, value in found.items():
      seconds[name].append(value)
  peak = products[0]["flops"] / statistics.median(p["seconds"] for p in products)
  return {
    "seconds": seconds,
    "calls": number,
    "product": {
      "teraflops_per_s": peak / 1e12,
      "slowest_to_fastest": max(p["drift"] for p in products),
    },
  }


def _round(case, ours, sides, calls, on_gpu) -> tuple[dict, dict[str, float]]:
  """One turn of each side, between two products; again if a GPU's clock drifted."""
  for _ in range(ATTEMPTS):
    before, operations = ours.product()
    found = {name: side.run(case, calls[name]) for name, side in sides.items()}
    after, _ = ours.product()
    drift = max(before, after) / min(before, after)
    if drift <= DRIFT or not on_gpu:
      break
  middle = (before + after) / 2
  return {"seconds": middle, "flops": operations, "drift": drift}, found


def problems(report: Mapping[str, Any], names: Sequence[str], dtype: str) -> list[str]:
  """What makes a run invalid, one line each."""
  bad = []
  for row in report["rows"]:
    for name in ("jax", *names):
      if "failed" in row[name]:
        bad.append(f"{row['case']}: {name} failed: {row[name]['failed']}")
      for output, error in row[name].get("difference", {}).items():
        if dtype == "float32" and not error <= AGREE:
          bad.append(f"{row['case']}: {output} of {name} differs by {error:.1e}")
    theirs = [row[name]["error"] for name in names if "error" in row[name]]
    if row.get("exact_rows", 0) < EXACT_ROWS or "error" not in row["jax"]:
      continue  # the rounding of a single number says nothing
    for output, error in row["jax"]["error"].items():
      least = min(e[output] for e in theirs)
      if not error <= WORSE * least:
        text = f"{output} is {error:.1e} from float32's, PyTorch's {least:.1e}"
        bad.append(f"{row['case']}: {text}")
  return bad


def table(report: Mapping[str, Any], names: Sequence[str]) -> str:
  """The rows as a Markdown table; absolute times only of a GPU."""
  rows = report["rows"]
  on_gpu = any(row["jax"].get("peak_bytes_so_far") is not None for row in rows)
  every = ("jax", *names)
  head = ["case", "TFLOP", *(f"jax to {name}" for name in names)]
  head += [f"{name}, of the product's rate" for name in every]
  if on_gpu:
    head += [f"{name}, ms" for name in every]
    head += ["jax, program GiB", *(f"{name}, peak GiB" for name in names)]
  head += ["temporaries, MiB", "compiling, s", *(f"difference to {n}" for n in names)]
  if exact := any("error" in row["jax"] for row in rows):
    head += [f"{name}, error" for name in every]
  lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]

  def cells_of(row):
    def cell(name, key, text):
      return text(row[name][key]) if row[name].get(key) is not None else "-"

    ranged = lambda r: f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"  # noqa: E731
    gib = lambda size: f"{size / aot.GIB:.2f}"  # noqa: E731
    worst = lambda errors: f"{max(errors.values()):.1e}"  # noqa: E731
    yield row["case"]
    yield f"{row['teraflops']:.3g}"
    yield from (cell(name, "jax_to_it", ranged) for name in names)
    yield from (cell(name, "of_product", "{:.0%}".format) for name in every)
    if on_gpu:
      yield from (cell(n, "median", lambda s: f"{1000 * s:.2f}") for n in every)
      yield cell("jax", "program_bytes", gib)
      yield from (cell(name, "peak_bytes", gib) for name in names)
    yield cell("jax", "temporary_bytes", lambda size: f"{size / 2**20:.1f}")
    yield cell("jax", "compile_s", "{:.1f}".format)
    yield from (cell(name, "difference", worst) for name in names)
    if exact:
      yield from (cell(name, "error", worst) for name in every)

  lines += [f"| {' | '.join(cells_of(row))} |" for row in rows]
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
    together: all cases' arrays fit into memory at once.
  """

  description: str
  narrow: Any
  full: Any
  cases: Callable[[Any], Sequence[Any]]
  ours: type[JaxSide]
  theirs: type[TorchSide]
  count: Callable[[Any, Any], float]
  together: bool = True


def main(found: Table, argv: Sequence[str] | None = None) -> int:
  """Runs a table. Exit code 1: the two sides disagree."""
  parser = argparse.ArgumentParser(
    description=found.description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--full", action="store_true", help="full size, for a GPU")
  parser.add_argument("--cases", nargs="+", help="default: all")
  parser.add_argument(
    "--torch", nargs="*", choices=HOWS, default=["eager"], help="default: eager"
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--calls", type=int, default=3, help="per group")
  parser.add_argument(
    "--jax-memory",
    type=float,
    help="most of a GPU's memory that jax may take (its allocator keeps what it has "
    "taken, twice what a program needs perhaps); default 0.75",
  )
  parser.add_argument("--out", help="also write the result to this JSON file")
  args = parser.parse_args(argv)
  sizes = found.full if args.full else found.narrow
  every = {case.name: case for case in found.cases(sizes)}
  if unknown := sorted(set(args.cases or ()) - set(every)):
    parser.error(f"--cases {' '.join(unknown)}: use some of {' '.join(every)}")
  cases = [every[name] for name in args.cases or every]
  names = [f"torch-{how}" for how in args.torch]
  prepare_processes()
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

  if args.jax_memory is not None:
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(args.jax_memory)
  start = time.perf_counter()
  report = measure(
    cases,
    Remote(found.ours, sizes),
    # Whose jax only makes the weights.
    {
      name: Remote(found.theirs, sizes, how, platform="cpu")
      for name, how in zip(names, args.torch, strict=True)
    },
    lambda case: found.count(sizes, case),
    rounds=args.rounds,
    calls=args.calls,
    together=found.together,
    progress=lambda text: print(
      f"[{time.perf_counter() - start:.0f} s] {text}", file=sys.stderr, flush=True
    ),
    done=write,
  )
  versions = ("device", "jax", "flax", "torch", "diffusers", "transformers", "peft")
  print(", ".join(f"{name} {report[name]}" for name in versions if name in report))
  known = flops.peak(report["device"])
  if known is not None and report["rows"]:
    share = report["rows"][0]["product"]["teraflops_per_s"] * 1e12 / known
    print(
      f"the product runs at {share:.0%} of the data sheet's {known / 1e12:.0f} TF/s"
    )
  print(f"\n{table(report, names)}")
  bad = problems(report, names, sizes.dtype)
  for line in bad:
    print(f"benchmark: {line}", file=sys.stderr)
  return 1 if bad else 0
