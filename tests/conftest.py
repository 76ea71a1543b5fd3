"""Test environment: 8 fake CPU devices, exact float32, a persistent compile cache.

Set as environment variables before jax is imported, so that command lines started by
tests inherit them. Variables that are already set win, e.g. `JAX_PLATFORMS=cuda`.
"""

import os
import pathlib
import sys

import pytest

if "jax" in sys.modules:
  raise RuntimeError("jax was imported before tests/conftest.py could configure it")

ROOT = pathlib.Path(__file__).resolve().parent.parent

for name, value in {
  "JAX_PLATFORMS": "cpu",
  # float32 dots in float32: some backends default to fewer bits.
  "JAX_DEFAULT_MATMUL_PRECISION": "highest",
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
  # Nothing in the suite may reach for a network.
  "HF_HUB_OFFLINE": "1",
}.items():
  os.environ.setdefault(name, value)

XLA_FLAGS = {
  "--xla_force_host_platform_device_count": "8",
  # The suite's time is compile time: tiny programs, each run a few times.
  "--xla_backend_optimization_level": "0",
  "--xla_cpu_use_fusion_emitters": "false",
}
given = os.environ.get("XLA_FLAGS", "")
missing = [f"{k}={v}" for k, v in XLA_FLAGS.items() if k not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


@pytest.fixture(scope="session")
def golden_folders(tmp_path_factory):
  """The golden models, converted once for all tests (see tests/conversion.py)."""
  from tests import conversion  # needs torch, which a test run may lack

  return conversion.Golden(tmp_path_factory.mktemp("golden"))
