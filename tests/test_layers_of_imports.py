"""One direction of imports: a module imports only what stands on a lower level.

Reads the sources, imports nothing of ours; `problems` is tested on made-up sources.
"""

import ast
from collections.abc import Mapping
import importlib.metadata
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# (pattern of the dotted name, (level, step)); the first match counts. A module may
# import lower levels, and lower steps of its own level.
LEVELS: tuple[tuple[str, tuple[int, int]], ...] = (
  (r"lrm_jax(\.(models|keymaps|data|align))?", (0, 0)),  # docstrings, the version
  (r"lrm_jax\.(align_recipe|flops|flow|hlo|losses|metrics|sharding)", (0, 0)),
  (r"lrm_jax\.keymaps\.engine", (0, 0)),
  (r"lrm_jax\.keymaps\.\w+", (0, 1)),
  (r"lrm_jax\.data\.buckets", (0, 0)),
  (r"lrm_jax\.models\.(features|layers)", (1, 0)),
  (r"lrm_jax\.models\.(attention|lora)", (1, 1)),
  (r"lrm_jax\.models\.(mmdit|vae|clip|t5|qformer_head|conv_head)", (1, 2)),
  (r"lrm_jax\.models\.reward", (1, 3)),
  (
    r"lrm_jax\.(align\.\w+|data\.\w+|sample|explore|rewards|steering|weights|optim|train_state"
    r"|alignment_report"
    r"|checkpoint|compilation|folder|text|run_log|plots|sheets|processes|aot|preference|evaluation)",
    (2, 0),
  ),
  (r"lrm_jax\.build", (3, 0)),
  (r"lrm_jax\.(encoders|denoiser)", (3, 1)),
  (r"lrm_jax\.(scorer|policy)", (3, 2)),
  (r"lrm_jax\.(pipeline|alignment)", (3, 3)),
  (r"lrm_jax\.benchmark_scores", (3, 3)),
  (r"lrm_jax\.(score|generate|trainers)", (4, 0)),
  (r"(train|convert|configs|benchmarks)\.\w+", (4, 1)),
  (r"tests\.\w+", (5, 0)),
)
# Level 2 is a flat set of tools: they may use each other, but not in a circle.
# Tests use each other's helpers.
ONE_ANOTHER = (2, 5)

# Imported only where PyTorch checkpoints or parity are the subject.
TORCH = {"torch", "torchvision", "diffusers", "peft", "accelerate"}
TORCH_FREE = ("lrm_jax", "train", "configs")  # benchmarks time it beside jax
SCRIPT_FOLDERS = ("train", "convert", "benchmarks")  # on sys.path when they run
FOLDERS = ("lrm_jax", "train", "convert", "configs", "benchmarks", "tests")


def level_of(module: str) -> tuple[int, int] | None:
  for pattern, level in LEVELS:
    if re.fullmatch(pattern, module):
      return level
  return None


def imported(tree: ast.AST, modules: set[str]) -> list[tuple[int, str, bool]]:
  """(line, dotted module, is a star import) of each import, nested ones included.

  `from lrm_jax import flow` imports `lrm_jax.flow` where that is one of `modules`.
  """
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name, False) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = "." * node.level + (node.module or "")
      for alias in node.names:
        name = f"{base}.{alias.name}"
        found.append(
          (node.lineno, name if name in modules else base, alias.name == "*")
        )
  return found


def problems(sources: Mapping[str, str], packages: set[str]) -> list[str]:
  """What breaks the rules, one line each.

  Args:
    sources: path below the repository's root -> Python source.
    packages: top-level names that a script's file name would shadow.
  """
  names = {
    path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for path in sources
  }
  modules = set(names.values())
  bad: list[str] = []
  graph: dict[str, set[str]] = {}
  for path, source in sources.items():
    module, folder = names[path], path.split("/")[0]
    level = level_of(module)
    if level is None:
      bad.append(f"{path}: has no level; add it to LEVELS and to the layout")
      continue
    if folder in SCRIPT_FOLDERS and pathlib.Path(path).stem in packages:
      bad.append(f"{path}: bears a package's name and shadows it when it runs")

    tree = ast.parse(source, filename=path)
    for line, target, star in imported(tree, modules):
      where = f"{path}:{line}: imports {target}"
      if star:
        bad.append(f"{where} with a star")
      if target.startswith("."):
        bad.append(f"{where}: write it absolutely")
        continue
      if target.split(".")[0] in TORCH and folder in TORCH_FREE:
        bad.append(f"{where}: only convert/ and tests/ may")
      if target.split(".")[0] not in FOLDERS or target == module:
        continue
      target_level = level_of(target)
      if target_level is None:
        bad.append(f"{where}, which has no level")
      elif level[0] == target_level[0] and level[0] in ONE_ANOTHER:
        graph.setdefault(module, set()).add(target)
      elif not target_level < level:
        bad.append(f"{where}: level {target_level} is not below {level}")

    if folder == "tests":
      bad += [f"{path}:{line}: {what}" for line, what in unguarded(tree)]
  return bad + [f"circular imports: {' -> '.join(c)}" for c in cycles(graph)]


def unguarded(tree: ast.Module) -> list[tuple[int, str]]:
  """Module-level imports of torch in a test, without `importorskip` before them.

  The suite has to pass where torch is not installed.
  """
  found = []
  for node in tree.body:
    if "importorskip" in ast.dump(node):
      return found
    if isinstance(node, ast.Import | ast.ImportFrom):
      for line, target, _ in imported(node, set()):
        top = target.split(".")[0]
        if top in TORCH:
          found.append((line, f"imports {top} before pytest.importorskip('torch')"))
  return found


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
  """Circles of a directed graph, one per back edge of a depth-first walk."""
  found: list[list[str]] = []
  done: set[str] = set()

  def walk(node: str, trail: list[str]):
    if node in trail:
      found.append([*trail[trail.index(node) :], node])
    elif node not in done:
      for target in sorted(graph.get(node, ())):
        walk(target, [*trail, node])
      done.add(node)

  for node in sorted(graph):
    walk(node, [])
  return found


def top_level_packages() -> set[str]:
  installed = set(importlib.metadata.packages_distributions())
  return installed | set(sys.stdlib_module_names) | {"lrm_jax", *TORCH}


def test_repository():
  sources = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(ROOT / "tests" / "data")  # stand-ins for packages
  }
  assert "lrm_jax/keymaps/engine.py" in sources
  assert not problems(sources, top_level_packages())


def test_good_sources_pass():
  assert not problems(
    {
      "lrm_jax/__init__.py": "",
      "lrm_jax/flow.py": "import jax",
      "lrm_jax/keymaps/engine.py": "",
      "lrm_jax/keymaps/vae.py": "from lrm_jax.keymaps.engine import Rule",
      "lrm_jax/models/layers.py": "",
      "lrm_jax/models/mmdit.py": "from lrm_jax.models import layers",
      "lrm_jax/data/buckets.py": "",
      "lrm_jax/data/pairs.py": "from lrm_jax import weights\nimport lrm_jax",
      "lrm_jax/weights.py": "from lrm_jax.data import buckets",
      "lrm_jax/build.py": "from lrm_jax import flow, weights",
      "train/reward.py": "from lrm_jax import build",
      "convert/sd35.py": "import torch",
      "tests/torch_models.py": "import pytest\npytest.importorskip('torch')\n"
      "import torch\nfrom tests import golden",
      "tests/golden.py": "",
    },
    {"grain"},
  )


BAD = {
  "lrm_jax/flow.py": ("from lrm_jax import losses", "level (0, 0)"),
  "lrm_jax/losses.py": ("def f():\n  from lrm_jax import build", "level (3, 0)"),
  "lrm_jax/keymaps/vae.py": ("from lrm_jax.keymaps import clip", "level (0, 1)"),
  "lrm_jax/keymaps/clip.py": ("import lrm_jax.models.layers", "level (1, 0)"),
  "lrm_jax/models/layers.py": ("from lrm_jax.models import vae", "level (1, 2)"),
  "lrm_jax/models/vae.py": ("from lrm_jax.models.reward import R", "level (1, 3)"),
  "lrm_jax/models/reward.py": ("from .layers import Dense", "write it absolutely"),
  "lrm_jax/weights.py": ("from diffusers.models import x", "only convert/ and tests/"),
  "lrm_jax/build.py": ("from lrm_jax.losses import *", "with a star"),
  "lrm_jax/manager.py": ("", "has no level"),
  "lrm_jax/text.py": ("from lrm_jax import missing", None),  # ruff's business
  "lrm_jax/score.py": (
    "from lrm_jax import nothing_here\nimport torch",
    "only convert",
  ),
  "lrm_jax/sample.py": ("from lrm_jax.align import grpo", "circular imports"),
  "lrm_jax/align/grpo.py": ("from lrm_jax import sample", "circular imports"),
  "train/grain.py": ("", "bears a package's name"),
  "train/reward.py": ("import train.grain", "level (4, 1)"),
  "tests/test_x.py": ("import torch\nimport pytest", "before pytest.importorskip"),
}


def test_each_violation_is_found():
  found = problems({path: source for path, (source, _) in BAD.items()}, {"grain"})
  for path, (_, message) in BAD.items():
    module = path.removesuffix(".py").replace("/", ".")
    of_path = [p for p in found if path in p or (module in p and "circular" in p)]
    if message is None:
      assert not of_path, of_path
    else:
      assert any(message in p for p in of_path), (path, found)
  assert len(found) == sum(m is not None for _, m in BAD.values()) - 1, found
