"""Tiny training runs: their data, their configs, and their processes."""

from collections.abc import Callable, Mapping, Sequence
import importlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp

from lrm_jax import build, folder, run_log, weights
from lrm_jax.data import parquet, prompt_cache
from lrm_jax.models import mmdit
from tests import golden_models

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "train"), str(ROOT / "configs")]

SIZES, CHANNELS, TEXT, POOLED = ((4, 6), (4, 4)), 16, 12, 20
PROMPTS = ("", "a cat", "a dog")


def config_of(name: str, *args) -> ConfigDict:
  """A config of configs/."""
  return importlib.import_module(name).get_config(*args)


def make_base(path: pathlib.Path) -> pathlib.Path:
  """A model folder with a random transformer of 3 blocks."""
  config = mmdit.MMDiTConfig(
    num_layers=3,
    num_heads=2,
    head_dim=8,
    dual_layers=(0,),
    context_dim=TEXT,
    pooled_dim=POOLED,
    pos_embed_size=6,
    pos_embed_base=6,
  )
  model = golden_models.random_model(golden_models.make_mmdit(config))
  with folder.write_atomically(path, force=False) as out:
    folder.save_params(out / "transformer", weights.flatten(model.params))
    entry = {"config": build.config_to_dict(config)}
    folder.write_config(out, {"components": {"transformer": entry}})
  return path


def records(count: int, seed: int = 0, sizes=SIZES, **fields):
  """Pairs of these sizes that can be told apart: the chosen latent is shifted."""
  rng = np.random.default_rng(seed)
  for i in range(count):
    shape = (*sizes[(i % 3 == 0) % len(sizes)], CHANNELS)
    yield dict(
      prompt=PROMPTS[rng.integers(1, len(PROMPTS))],
      chosen=rng.standard_normal(shape, np.float32) + 0.5,
      rejected=rng.standard_normal(shape, np.float32) - 0.5,
      **fields,
    )


def make_pairs(root: pathlib.Path, sizes=SIZES) -> pathlib.Path:
  """Folders `train`, `held_out` and `prompts`."""
  for seed, (name, count) in enumerate((("train", 48), ("held_out", 20))):
    (root / name).mkdir(parents=True)
    by_size = sorted(records(count, seed, sizes), key=lambda r: r["chosen"].shape)
    parquet.write_part(root / name / "part.parquet", by_size, rows_per_group=8)
    parquet.write_index(root / name)
  rng = np.random.default_rng(2)
  with prompt_cache.PromptCacheWriter(
    root / "prompts", t5_length=3, dtype="float32", encoder="random"
  ) as cache:
    cache.append(
      PROMPTS,
      rng.standard_normal((len(PROMPTS), 5, TEXT), np.float32),
      rng.standard_normal((len(PROMPTS), POOLED), np.float32),
    )
  return root


def tiny(
  name: str, base: pathlib.Path, pairs: pathlib.Path, workdir: pathlib.Path
) -> ConfigDict:
  """A full-size recipe with its sizes, and nothing else, made small."""
  c = config_of(name)
  c.workdir = str(workdir)
  c.data.train = str(pairs / "train")
  c.data.held_out = str(pairs / "held_out")
  c.data.prompts = str(pairs / "prompts")
  c.data.t5_length = 3
  c.data.num_threads = 2
  c.model.base = str(base)
  c.model.transformer = ""
  c.model.num_layers = 2
  c.model.dtype = "float32"
  c.model.backbone_dtype = "float32"
  if name == "sd35m":
    c.model.image_taps = c.model.text_taps = (1, 2)
    c.model.head.update(width=16, num_heads=2)
    c.model.lora.update(rank=2, alpha=4.0)
  else:
    c.model.head.update(base_channels=4, num_groups=2, hidden=8)
  c.train.batch_size = 8
  c.train.num_steps = 4
  c.train.learning_rate = 1e-2
  c.train.warmup_steps = 0
  c.train.log_every = 1
  c.train.checkpoint_every = 2
  c.eval.sigmas = (0.1, 0.6)
  c.eval.batch_size = 8
  c.eval.every = 4
  return c


# --- in this process ---------------------------------------------------------------


def once(function: Callable, key: Callable) -> Callable:
  """`function`, called once for all arguments of which `key` makes the same."""
  made: dict = {}

  def call(*args, **kw):
    k = key(*args, **kw)
    if k not in made:
      made[k] = function(*args, **kw)
    return made[k]

  return call


def settings_but(config: ConfigDict, pattern: str) -> str:
  """A config without the settings whose dotted names match; to be compared."""
  flat = run_log._dotted(config.to_dict())
  return json.dumps({k: v for k, v in flat.items() if not re.fullmatch(pattern, k)})


# --- as a process of its own -------------------------------------------------------


def start(
  config: ConfigDict,
  *flags: str,
  script: str = "reward",
  devices: int = 1,
  name: str = "config",
  wrapper: Sequence[str] = (),
  env: Mapping[str, str] | None = None,
) -> subprocess.Popen:
  """`python train/SCRIPT.py` on a config; output in `<workdir>.<name>.log`.

  `wrapper` is put in front of the command, `env` is added to the environment.
  """
  workdir = pathlib.Path(config.workdir)
  file = workdir.with_name(f"{workdir.name}.{name}.py")
  file.write_text(
    "import gc\nimport json\nfrom ml_collections import ConfigDict\n\n"
    "gc.set_threshold(50_000, 10, 10)  # as tests/conftest.py\n\n\n"
    "def get_config():\n"
    f"  return ConfigDict(json.loads({config.to_json()!r}))\n"
  )
  xla = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  path = ROOT / "train" / f"{script}.py"
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/data/no_torch")]),
    # Starting again is most of these tests' time, and compiling most of starting.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # Threads of XLA on a CPU. Collectives between processes block theirs: with as few
    # as this machine has cores, two processes can wait for each other for ever.
    "NPROC": "16",
    "XLA_FLAGS": " ".join([*xla, f"--xla_force_host_platform_device_count={devices}"]),
  }
  with log_file(config, name).open("ab") as log:
    return subprocess.Popen(
      [*wrapper, sys.executable, str(path), f"--config={file}", *flags],
      env=environment | dict(env or {}),
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def log_file(config: ConfigDict, name: str = "config") -> pathlib.Path:
  workdir = pathlib.Path(config.workdir)
  return workdir.with_name(f"{workdir.name}.{name}.log")


def finish(process: subprocess.Popen, config: ConfigDict, name: str = "config") -> str:
  """Waits for a process that must succeed; its output."""
  code = process.wait(timeout=300)
  output = log_file(config, name).read_text()
  assert code == 0, output[-4000:]
  return output


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


# --- what a run left ---------------------------------------------------------------


# Metrics that depend on the clock.
CLOCK = r"perf/|cost/seconds"


def metrics(workdir) -> list[dict]:
  """The lines of metrics.jsonl without what depends on the clock."""
  lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not re.match(CLOCK, k)}
    for line in lines
  ]


def final_state(workdir, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint's train state, by path."""
  path = pathlib.Path(workdir, "checkpoints", str(step), "state").absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(path)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def assert_same_run(a, b, step: int) -> None:
  """Two work folders hold the same metrics and the same state, bit for bit."""
  assert metrics(a) == metrics(b)
  one, two = final_state(a, step), final_state(b, step)
  assert one.keys() == two.keys()
  for path, leaf in one.items():
    np.testing.assert_array_equal(leaf, two[path], err_msg=path)
