"""Where compiled programs are kept, and how they are counted."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import compilation

SCRIPT = """
import json, sys
from lrm_jax import compilation
folder = compilation.use_cache()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if len(sys.argv) > 1:
  jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
print(json.dumps(None if folder is None else str(folder)))
"""


def folder_in(home, *args, **env):
  """What a process that has `home` says."""
  clean = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME",)}
  del clean["JAX_COMPILATION_CACHE_DIR"]
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, *args],
    env=clean | {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | env,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_programs_are_kept_in_the_users_cache(tmp_path):
  folder, _ = folder_in(tmp_path, "compile")
  assert pathlib.Path(folder).parent == tmp_path / ".cache" / "lrm_jax" / "xla"
  assert list(pathlib.Path(folder).iterdir())
  elsewhere, _ = folder_in(tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg"))
  assert pathlib.Path(elsewhere).parent == tmp_path / "xdg" / "lrm_jax" / "xla"


@pytest.mark.parametrize(
  "env, kept",
  [
    ({"LRM_JAX_COMPILE_CACHE": "off"}, None),
    ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
    ({"JAX_COMPILATION_CACHE_DIR": "of_the_user"}, "of_the_user"),
  ],
)
def test_who_has_chosen_is_left_alone(tmp_path, env, kept):
  assert folder_in(tmp_path, **env)[0] == kept
  assert not (tmp_path / ".cache").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
  (tmp_path / ".cache").write_text("a file")
  folder, errors = folder_in(tmp_path)
  assert folder is None
  assert f"{tmp_path}/.cache/lrm_jax/xla" in errors
  assert "JAX_COMPILATION_CACHE_DIR" in errors


def test_compilations_are_counted_once():
  @jax.jit
  def counted(x):
    return jnp.cos(x) * 3

  x, y = jnp.ones(3), jnp.ones(4)
  with compilation.CompileCount() as compiled:
    counted(x)
    counted(x + 0)
    assert compiled.programs["jit(counted)"] == 1
    counted(y)
  assert compiled.programs["jit(counted)"] == 2
  with compilation.CompileCount() as compiled:
    counted(y)
  assert compiled.count == 0


def test_compiling_ahead_of_a_call_saves_it():
  """What the trainer's warm-up relies on: also for arrays that are split."""

  @jax.jit
  def ahead(x):
    return x * 2

  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  x = jax.device_put(np.ones((8, 2), np.float32), place)
  ahead.lower(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)).compile()
  with compilation.CompileCount() as compiled:
    ahead(x)
  assert compiled.count == 0


def test_flags_of_a_gpu_leave_the_users_alone():
  both = "--xla_gpu_enable_triton_gemm=false --xla_gpu_dot_merger_threshold_mb=0"
  assert compilation.with_gpu_flags("", "0.11.2") == both
  user = "--xla_gpu_enable_triton_gemm=true --xla_dump_to=x"
  assert compilation.with_gpu_flags(user, "0.10.2") == (
    f"{user} --xla_gpu_dot_merger_threshold_mb=0"
  )
  # XLA would stop at a flag that a later one no longer knows.
  assert compilation.with_gpu_flags(user, "0.12.0") == user


def test_xla_knows_the_flags_of_a_gpu():
  """The installed one, on a CPU as well: a flag it does not know ends the process."""
  version = importlib.metadata.version("jaxlib")
  done = subprocess.run(
    [sys.executable, "-c", "import jax; jax.devices(); print('started')"],
    env=os.environ | {"XLA_FLAGS": compilation.with_gpu_flags("", version)},
    capture_output=True,
    text=True,
  )
  assert "started" in done.stdout, done.stderr
