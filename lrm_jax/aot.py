"""What a jitted step costs on accelerators that are not there.

XLA compiles for a described device without the device: libtpu knows TPU topologies by
name, the CUDA plugin takes a description file. The compiled program then tells the
memory of each chip, the collectives between chips, and (TPU) the compiler's own cost
model. Nothing runs, and nothing here is a measurement.

  target = aot.target("v5p:4x4x8")
  args = ...  # ShapeDtypeStructs with NamedShardings on a mesh of target.devices
  print(aot.format(aot.report(step, args, target, flops_per_step=3e15)))
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jaxlib import xla_client

from lrm_jax import hlo, sharding

GIB = 2**30

# Left free on each chip: prefetched batches, metrics, what a heap loses to gaps.
RESERVE = GIB // 2
# XLA's GPU allocator takes a fraction of the memory at start; its default is 0.75.
GPU_MEMORY_FRACTION = 0.92


class NotInstalledError(RuntimeError):
  """No compiler for the wanted device on this machine."""


class TargetError(ValueError):
  """A target that does not exist or lacks its description."""


# --- targets -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """Data sheet of one chip.

  Attributes:
    memory: bytes of HBM that a program may use. TPU: what libtpu's out-of-memory
      errors call available (16, 95 and 32 GB less what the system keeps); GPU: of the
      device's description, times GPU_MEMORY_FRACTION.
    peak_flops: dense bf16 FLOP/s.
    memory_rate: bytes/s of HBM.
    link_rate: bytes/s that leave the chip over all its interconnect links together;
      None where we compile for one chip only.
    clock: Hz of the matrix units, to turn the compiler's cycles into seconds; the
      peak divided by 2 x (128 x 128 or 256 x 256) x their number. None: no cycles.
    attention_share: of the peak, what splash attention reaches with SD3.5's 64 channels
      per head, by the schedule of its compiled kernels (benchmarks/splash_tiles.py).
  """

  memory: int
  peak_flops: float
  memory_rate: float
  link_rate: float | None = None
  clock: float | None = None
  attention_share: float = 1.0


# cloud.google.com/tpu/docs (v5e, v5p, v6e) for peaks, bandwidths and links.
TPUS = {
  "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 4 * 50e9, 1.5e9, 0.30),
  "v5p": Chip(int(95.74 * GIB), 459e12, 2765e9, 6 * 100e9, 1.75e9, 0.32),
  "v6e": Chip(int(31.25 * GIB), 918e12, 1640e9, 4 * 100e9, 1.75e9, 0.13),
}
# NVIDIA's data sheet: 141 GB, 4.8 TB/s, 989 TFLOP/s dense bf16.
GPUS = {"h200": Chip(int(141e9 * GPU_MEMORY_FRACTION), 989e12, 4.8e12)}


@dataclasses.dataclass(frozen=True)
class Target:
  """Compile-only devices.

  Attributes:
    name: as asked for, e.g. `v5p:4x4x8`.
    kind: `tpu` or `gpu`.
    devices: one per chip, for a Mesh.
    options: compiler options that compiling without the device needs.
  """

  name: str
  kind: str
  devices: Sequence[Any]
  chip: Chip
  options: Mapping[str, Any]


def target(name: str, target_config: str | os.PathLike | None = None) -> Target:
  """Compile-only devices by name: `v5e:4x4`, `v5p:4x4x8`, `v6e:8x8`, ..., or `h200`.

  Call it before anything asks jax for its devices: it keeps the host on its CPU.

  Args:
    target_config: file with XLA's GpuTargetConfigProto as text, for a GPU (openxla/xla
      has them under xla/backends/gpu/target_config/specs).

  Raises:
    TargetError: no such device or topology, or a GPU without a description.
    NotInstalledError: its compiler is missing; the message says what to install.
  """
  generation = name.partition(":")[0]
  if generation in TPUS:
    return _tpu(name, TPUS[generation])
  if name in GPUS:
    return _gpu(name, GPUS[name], target_config)
  raise TargetError(
    f"no target {name!r}: use one of {', '.join(GPUS)}, or a TPU topology such as "
    + ", ".join(f"{g}:{'2x2x1' if g == 'v5p' else '4x4'}" for g in TPUS)
  )


_LIBTPU_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",  # no metadata server off a TPU machine
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device that only one process may hold
  # Only to keep it from complaining that it cannot find these out.
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def _tpu(name: str, chip: Chip) -> Target:
  if not re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
    raise TargetError(
      f"{name!r} lacks the topology's shape, as in v5e:4x4 or v5p:2x2x1"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise NotInstalledError(
      'libtpu, the compiler for TPUs, is not installed: pip install "libtpu==0.0.42.*"'
    )
  _host_on_cpu()
  os.environ |= _LIBTPU_WITHOUT_TPU
  _without_cache()
  try:
    devices = topologies.get_topology_desc(name, "tpu").devices
  except jax.errors.JaxRuntimeError as e:
    raise TargetError(f"libtpu knows no topology {name!r}: {_first_line(e)}") from e
  return Target(name, "tpu", devices, chip, {})


def _gpu(name: str, chip: Chip, target_config: str | os.PathLike | None) -> Target:
  if target_config is None:
    raise TargetError(
      f"{name} needs a description of the device: XLA's GpuTargetConfigProto as a text "
      f"file, {name}.txtpb of xla/backends/gpu/target_config/specs in openxla/xla"
    )
  path = pathlib.Path(target_config)
  if not path.is_file():
    raise TargetError(f"there is no device description {path}")
  _host_on_cpu()
  jax.devices()  # registers the plugins that are installed
  if not xla_client.pjrt_plugin_loaded("cuda"):
    raise NotInstalledError(
      "jax's CUDA plugin, the compiler for NVIDIA GPUs, is not installed: "
      f'pip install "jax-cuda12-plugin[with-cuda]=={jax.__version__}"'
    )
  _without_cache()
  if not xla_client.pjrt_plugin_initialized("cuda"):
    xla_client.initialize_pjrt_plugin("cuda")
  topology = topologies.get_topology_desc(
    name, platform="cuda", target_config=path.read_text(), topology="1x1x1"
  )
  options: dict[str, Any] = {
    # Autotuning times kernels on the GPU. Triton's, untuned, refuse some of our
    # products ("couldn't find output tile sizes"): leave all to cuBLAS.
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
  }
  if (spec := importlib.util.find_spec("nvidia")) is not None:
    for folder in spec.submodule_search_locations or ():
      for name_of_cuda in ("cuda_nvcc", "cu13"):  # of CUDA 12's packages, and of 13's
        if pathlib.Path(folder, name_of_cuda, "bin", "ptxas").is_file():
          options["xla_gpu_cuda_data_dir"] = str(pathlib.Path(folder, name_of_cuda))
  return Target(name, "gpu", topology.devices, chip, options)


def _host_on_cpu() -> None:
  """The host's own backend stays the CPU, whatever plugins are installed."""
  jax.config.update("jax_platforms", "cpu")


def _without_cache() -> None:
  """Compile-only programs can be written to jax's persistent cache, but not read."""
  jax.config.update("jax_enable_compilation_cache", False)


def _first_line(e: Exception) -> str:
  return str(e).strip().splitlines()[0][:300]


# --- memory ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one chip's HBM.

  Attributes:
    arguments, outputs: as the compiler lays them out (padded tiles included).
    aliased: of the outputs, written into donated arguments.
    temporaries: everything between, gradients included.
    code: the program itself.
    total: what a run needs at once: arguments + outputs - aliased + temporaries +
      code; or, of a program that did not fit, what the compiler said.
    compiler_peak: the largest sum of live buffers by the compiler's own analysis,
      None if it gives none. Smaller than `total`, which holds the gaps too.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  total: int
  compiler_peak: int | None = None


def memory_of(compiled: Any) -> Memory:
  """From `compiled.memory_analysis()`."""
  m = compiled.memory_analysis()
  arguments, outputs = m.argument_size_in_bytes, m.output_size_in_bytes
  aliased, temporaries = m.alias_size_in_bytes, m.temp_size_in_bytes
  code = m.generated_code_size_in_bytes
  return Memory(
    arguments=arguments,
    outputs=outputs,
    aliased=aliased,
    temporaries=temporaries,
    code=code,
    total=arguments + outputs - aliased + temporaries + code,
    compiler_peak=getattr(m, "peak_memory_in_bytes", 0) or None,
  )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}
_SIZE = r"([\d.]+)([KMGTPE]?)"


def _bytes(m: re.Match, first: int = 1) -> int:
  return round(float(m[first]) * _UNITS[m[first + 1]])


def parse_out_of_memory(message: str) -> tuple[int, Memory] | None:
  """(available, Memory) of a TPU compiler's out-of-memory error; None: another error.

  Two forms: "Used 21.5G of 15.75G hbm" and a list of program, arguments and what is
  reserved; or, early in the compilation, "memory required for HLO temporaries (24.1G)
  exceeds available HBM (15.75G)", which leaves the arguments out.
  """
  if m := re.search(rf"Used {_SIZE} of {_SIZE} hbm", message):
    listed = {
      name: _bytes(found)
      for name in ("program", "arguments")
      if (found := re.search(rf"^\s*{name}\s+{_SIZE}", message, re.M))
    }
    program = listed.get("program", _bytes(m))
    arguments = listed.get("arguments", 0)
    total = max(_bytes(m), program + arguments)
    return _bytes(m, 3), Memory(arguments, 0, 0, program, 0, total)
  if m := re.search(
    rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    message,
  ):
    return _bytes(m, 3), Memory(0, 0, 0, _bytes(m), 0, _bytes(m))
  return None


# --- the report --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
  """One compiled step on one target; bytes, FLOPs and seconds are per chip and step.

  Attributes:
    capacity: bytes that a program may use, less the reserve.
    fits: `memory.total <= capacity`.
    spare: `capacity - memory.total`, negative if it does not fit.
    advice: what to change if it does not fit, the cheapest first.
    model_flops: by formula; no credit for recomputation.
    program: collectives, cycles, custom calls; None if it did not compile.
    compiler_seconds: the compiler's estimated cycles by the chip's clock: compute and
      HBM traffic of one operation after another. Without collectives, which it does
      not cost, and without custom kernels. None on a GPU.
    kernel_seconds: of the caller's `kernel_flops`, at `kernel_share` of the peak.
    kernel_share: the chip's `attention_share`.
    compute_bound, memory_bound, link_bound: model FLOPs / peak; arguments read and
      outputs written once / HBM rate; wire bytes / rate of all links together.
    lower_bound: the largest of the three.
  """

  target: str
  num_chips: int
  memory: Memory
  capacity: int
  fits: bool
  spare: int
  advice: tuple[str, ...]
  model_flops: float
  program: hlo.Program | None
  compiler_seconds: float | None
  kernel_seconds: float
  kernel_share: float
  compute_bound: float
  memory_bound: float
  link_bound: float
  lower_bound: float
  lower_seconds: float
  compile_seconds: float
  jax_version: str
  settings: dict[str, Any]

  def to_dict(self) -> dict[str, Any]:
    """JSON-ready."""
    return dataclasses.asdict(self)


def report(
  function: Any,
  args: Sequence[Any],
  target: Target,
  *,
  flops_per_step: float,
  kernel_flops: float = 0.0,
  settings: Mapping[str, Any] | None = None,
  reserve: int = RESERVE,
  advice: Callable[..., tuple[str, ...]] | None = None,
) -> Report:
  """Compiles a jitted function for a target. Takes minutes for a full-size step.

  Running out of the target's memory while compiling is a report too.

  Args:
    function: jitted; donation and shardings are part of it.
    args: pytrees of ShapeDtypeStructs with shardings on a mesh of `target.devices`.
    flops_per_step: model FLOPs of one step on all chips, by formula: the compiler's
      `cost_analysis` counts the body of a loop once.
    kernel_flops: of these, per step and all chips, what runs in custom kernels, whose
      cost the compiler does not see (recomputation included).
    settings: config key -> value, for the advice and the record.
    reserve: bytes of each chip to leave free.
    advice: what to say of a program that does not fit, in place of `advise`, whose
      arguments it takes.

  Raises:
    jax.errors.JaxRuntimeError: the compiler failed otherwise.
  """
  settings = dict(settings or {})
  chip, num_chips = target.chip, len(target.devices)
  mesh = jax.tree.leaves(args)[0].sharding.mesh
  start = time.perf_counter()
  with jax.set_mesh(mesh):  # as a run has it: the models pin their batch to it
    lowered = function.lower(*args)
  lower_seconds = time.perf_counter() - start
  capacity = chip.memory - reserve
  program = None
  start = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=dict(target.options))
  except jax.errors.JaxRuntimeError as e:
    parsed = parse_out_of_memory(str(e))
    if parsed is None:
      raise
    compile_seconds = time.perf_counter() - start
    available, memory = parsed
    if memory.arguments == 0:  # the error did not count them
      arguments = sharding.bytes_per_device(args)
      memory = dataclasses.replace(
        memory, arguments=arguments, total=memory.total + arguments
      )
    capacity = min(available, chip.memory) - reserve
  else:
    compile_seconds = time.perf_counter() - start
    memory = memory_of(compiled)
    program = hlo.parse(compiled.as_text())

  flops = flops_per_step / num_chips
  compute = flops / chip.peak_flops
  traffic = (memory.arguments + memory.outputs) / chip.memory_rate
  link = 0.0
  if program is not None and chip.link_rate is not None:
    link = program.wire_bytes / chip.link_rate
  seconds = None
  if program is not None and program.cycles is not None and chip.clock is not None:
    seconds = program.cycles / chip.clock
  fits = memory.total <= capacity
  return Report(
    target=target.name,
    num_chips=num_chips,
    memory=memory,
    capacity=capacity,
    fits=fits,
    spare=capacity - memory.total,
    advice=() if fits else (advice or advise)(memory, capacity, num_chips, settings),
    model_flops=flops,
    program=program,
    compiler_seconds=seconds,
    kernel_seconds=kernel_flops / num_chips / (chip.attention_share * chip.peak_flops),
    kernel_share=chip.attention_share,
    compute_bound=compute,
    memory_bound=traffic,
    link_bound=link,
    lower_bound=max(compute, traffic, link),
    lower_seconds=lower_seconds,
    compile_seconds=compile_seconds,
    jax_version=jax.__version__,
    settings=settings,
  )


def advise(
  memory: Memory, capacity: int, num_chips: int, settings: Mapping[str, Any]
) -> tuple[str, ...]:
  """What to change so that a step fits, the cheapest first.

  Temporaries shrink with rematerialisation and smaller microbatches, arguments
  (parameters, optimizer state) by splitting them over more chips or training fewer.

  Args:
    settings: values of `train.batch_size` (pairs), `train.accumulate`, `model.remat`,
      `mesh.fsdp`, `model.lora`; what is absent is taken as not yet done.
  """
  remat = settings.get("model.remat", "none")
  accumulate = settings.get("train.accumulate", 1)
  batch = settings.get("train.batch_size")
  fsdp = settings.get("mesh.fsdp", 1)
  fsdp = num_chips if fsdp == -1 else fsdp

  room = capacity - memory.arguments
  state: list[str] = []
  if fsdp < num_chips:
    state.append(
      f"mesh.fsdp: {fsdp} -> {num_chips} (splits parameters and optimizer state over "
      "all chips), with the sharding rule 'fsdp' for what is trained"
    )
  activations: list[str] = []
  if remat == "none":
    activations.append("model.remat: 'none' -> 'attention', then 'full'")
  elif remat == "attention":
    activations.append("model.remat: 'attention' -> 'full'")
  rows = None if batch is None else batch // (num_chips * accumulate)
  if rows is None or rows > 1:
    factor = "higher"
    if room > 0 and rows is not None:
      # As if all temporaries were proportional to the microbatch: the least factor.
      needed = math.ceil(memory.temporaries / room)
      divisors = [d for d in range(2, rows + 1) if rows % d == 0 and d >= needed]
      factor = str(accumulate * (divisors[0] if divisors else rows))
    activations.append(
      f"train.accumulate: {accumulate} -> {factor} (smaller microbatches, same step)"
    )
  elif batch is not None and batch > num_chips:
    activations.append(
      f"train.batch_size: {batch} -> {num_chips} (one pair per chip is the least)"
    )
  last = ["a larger topology: more chips share the state and the batch"]
  if not settings.get("model.lora"):
    last.append("model.lora: train adapters instead of all weights")

  if memory.arguments > memory.temporaries:
    if room <= 0:
      # No microbatch is small enough.
      return (*state, *last)
    return (*state, *activations, *last)
  return (*activations, *state, *last)


def format(report: Report) -> str:
  """A few lines for people."""
  m = report.memory
  gib = lambda size: f"{size / GIB:.2f} GiB"  # noqa: E731
  lines = [
    f"compiled for {report.target} ({report.num_chips} chips) with jax "
    f"{report.jax_version} in {report.compile_seconds:.0f} s; per chip and step:"
  ]
  lines.append(
    f"  memory        {gib(m.total)} = arguments {gib(m.arguments)} + outputs "
    f"{gib(m.outputs)} - donated {gib(m.aliased)} + temporaries {gib(m.temporaries)} "
    f"+ code {gib(m.code)}"
  )
  if m.compiler_peak is not None:
    lines.append(
      f"                compiler's own peak of live buffers {gib(m.compiler_peak)}"
    )
  if report.fits:
    lines.append(f"  fits          {gib(report.spare)} spare of {gib(report.capacity)}")
  else:
    lines.append(
      f"  DOES NOT FIT  {gib(-report.spare)} too much for {gib(report.capacity)}; "
      "change, in this order:"
    )
    lines += [f"    {n}. {text}" for n, text in enumerate(report.advice, 1)]
  lines.append(f"  model FLOPs   {report.model_flops / 1e12:.2f} TFLOP (formula)")
  if report.program is None:
    return "\n".join(lines)

  p = report.program
  if p.collective_bytes:
    parts = [
      f"{kind} {p.collective_bytes[kind] / 1e9:.2f} GB in {p.collective_count[kind]}"
      for kind in p.collective_bytes
    ]
    lines.append(f"  collectives   {', '.join(parts)}")
  else:
    lines.append("  collectives   none")
  if p.unknown_loops:
    lines.append(
      f"                {len(p.unknown_loops)} loop(s) of unknown length counted once"
    )
  if report.compiler_seconds is not None:
    text = f"{report.compiler_seconds:.3f} s of the compiler's cost model"
    if report.kernel_seconds:
      text += (
        f" + {report.kernel_seconds:.3f} s for custom kernels at "
        f"{report.kernel_share:.0%} of the peak"
      )
    lines.append(f"  estimate      {text}; collectives not included")
  lines.append(
    f"  at least      {report.lower_bound:.3f} s: compute {report.compute_bound:.3f}, "
    f"memory {report.memory_bound:.3f}, links {report.link_bound:.3f}"
  )
  return "\n".join(lines)
