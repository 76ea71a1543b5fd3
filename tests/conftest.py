"""Test environment: 8 fake CPU devices, exact float32, a persistent compile cache.

Set as environment variables before jax is imported, so that command lines started by
tests inherit them. Variables that are already set win, e.g. `JAX_PLATFORMS=cuda`.
"""

import gc
import importlib.metadata
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
  # Parts for other threads to compile repeat what they share: a quarter more time in
  # all, and the other cores have test files of their own.
  "--xla_cpu_parallel_codegen_split_count": "1",
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # Later ones do not know it, and refuse to start.
  XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
missing = [f"{k}={v}" for k, v in XLA_FLAGS.items() if k not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


# By time taken. With one of these last, the other processes would wait for it.
LONGEST = (
  "survival",
  "align_train",
  "train",
  "alignment",
  "pipeline_generate",
  "align_aot",
  "benchmarks_tables",
  "pipeline",
  "denoiser",
)


def pytest_collection_modifyitems(items):
  """The longest files first."""
  rank = {f"test_{name}": i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish(session):
  """Less time for bookkeeping, which changes no number."""
  from flax import nnx
  import jax

  # A heap of modules that never go away, and a test's short-lived jaxprs: looking for
  # cycles at Python's default pace is a twentieth of the suite's time.
  gc.freeze()
  gc.set_threshold(50_000, 10, 10)

  def next_key(stream):
    # As flax 0.12, except that it increments through `count[...] += 1`. That asks two
    # tracers for their sharding; they have none, and say so in a message that lists
    # all they are made of, which is every increment before.
    stream.count._check_can_update()
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key

  nnx.RngStream.__call__ = next_key


@pytest.fixture(scope="session")
def golden_folders(tmp_path_factory):
  """The golden models, converted once for all tests (see tests/conversion.py)."""
  from tests import conversion  # needs torch, which a test run may lack

  return conversion.Golden(tmp_path_factory.mktemp("golden"))
