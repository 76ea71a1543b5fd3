"""Compiled programs: how they are compiled, kept on disk, and counted."""

from collections import Counter
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import tempfile
from typing import Any

from absl import logging
import jax

OFF = "LRM_JAX_COMPILE_CACHE"  # environment variable; "off" keeps nothing
MIN_SECONDS = 1.0  # programs that compile faster are not kept

# Of XLA on a GPU (docs/PERFORMANCE.md). Triton's products are tuned for minutes per
# program. Products that share an input are merged by concatenating their weights in
# every step, 3 GB of them.
GPU_FLAGS = {
  "--xla_gpu_enable_triton_gemm": "false",
  "--xla_gpu_dot_merger_threshold_mb": "0",
}
FLAGS_KNOWN_TO = ("0.10.", "0.11.")  # jaxlib; XLA stops at a flag it does not know

_COMPILED = "/jax/core/compile/backend_compile_duration"
# Programs of this process since somebody counts, by name.
_compiled: Counter[str] = Counter()


def configure() -> pathlib.Path | None:
  """XLA's flags for a GPU, and the cache. For commands, before jax has a device.

  Returns: see `use_cache`.
  """
  plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
  if importlib.util.find_spec("jax_plugins") and any(
    importlib.util.find_spec(name) for name in plugins
  ):
    given = os.environ.get("XLA_FLAGS", "")
    flags = with_gpu_flags(given, importlib.metadata.version("jaxlib"))
    os.environ["XLA_FLAGS"] = flags
  return use_cache()


def with_gpu_flags(given: str, version: str) -> str:
  """GPU_FLAGS beside those of the user, who may have set the same; of jaxlib `version`.

  Of a jaxlib that was not tried, those of the user alone.
  """
  if not version.startswith(FLAGS_KNOWN_TO):
    return given
  missing = [f"{k}={v}" for k, v in GPU_FLAGS.items() if k not in given]
  return " ".join([given, *missing]).strip()


def use_cache() -> pathlib.Path | None:
  """Keeps compiled programs (and what autotuning found on a GPU) on disk.

  For commands, before anything is compiled. In `JAX_COMPILATION_CACHE_DIR` where that
  is set, else in `$XDG_CACHE_HOME/lrm_jax/xla` or `~/.cache/lrm_jax/xla`; not at all
  with `LRM_JAX_COMPILE_CACHE=off` or `JAX_ENABLE_COMPILATION_CACHE=false`.

  Returns: the folder; None if nothing is kept.
  """
  if not jax.config.jax_enable_compilation_cache:
    return None
  if jax.config.jax_compilation_cache_dir is not None:
    return pathlib.Path(jax.config.jax_compilation_cache_dir)
  if os.environ.get(OFF, "").lower() == "off":
    return None
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(base, "lrm_jax", "xla", _host_kind())
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    # No reason to stop: everything works, only slower.
    logging.warning(
      "compiled programs are not kept, since %s cannot be written: %s. Set "
      "JAX_COMPILATION_CACHE_DIR to another folder, or %s=off",
      folder,
      e.strerror,
      OFF,
    )
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
  return folder


def _host_kind() -> str:
  """Of this CPU's instructions: a home folder may be shared by different machines.

  Code for a CPU, which GPU programs contain as well, may not run on another one.
  """
  about = [platform.machine(), platform.processor()]
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    lines = cpuinfo.read_text().splitlines()
    about += sorted({line for line in lines if line.startswith(("flags", "Features"))})
  return hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]


class CompileCount:
  """Programs compiled while it is open (or read from the cache: both stall a step).

  with CompileCount() as compiled:
    ...
  print(compiled.count, compiled.programs)
  """

  def __init__(self):
    _listen()
    self._before = Counter(_compiled)

  def __enter__(self) -> "CompileCount":
    self._before = Counter(_compiled)
    return self

  def __exit__(self, *exception: Any) -> None:
    del exception

  @property
  def programs(self) -> Counter[str]:
    """By name, `jit(train_step)`; since it was opened, or made."""
    return _compiled - self._before

  @property
  def count(self) -> int:
    return self.programs.total()


@functools.cache
def _listen() -> None:
  """One listener for all, since jax never lets go of them."""

  def on_event(event: str, duration: float, **about: Any) -> None:
    del duration
    if event == _COMPILED:
      _compiled[about["fun_name"]] += 1

  jax.monitoring.register_event_duration_secs_listener(on_event)
