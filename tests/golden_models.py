"""The golden models through the production keymaps, and random ones; no torch needed.

A reward model is `(config, graphdef, params, keymaps)`: params nested numpy, keymaps
by the part of the tree (`backbone`, `lora`, `head`) they export.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import numpy as np

from lrm_jax import weights
from lrm_jax.keymaps import conv_head as conv_head_keys
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import lora as lora_keys
from lrm_jax.keymaps import mmdit as mmdit_keys
from lrm_jax.keymaps import qformer_head as qformer_keys
from lrm_jax.models import conv_head, features, lora, mmdit, qformer_head, reward
from tests import helpers


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model, split; `run` calls one of its methods under jit."""

  config: Any
  graphdef: nnx.GraphDef
  params: dict
  keymaps: Mapping[str, engine.Keymap] = dataclasses.field(default_factory=dict)

  def run(self, *args, method: str = "__call__", params: dict | None = None):
    """`model.method(*args)` under jit."""
    return _run(self.graphdef, method)(params or self.params, *args)


@functools.cache
def _run(graphdef, method):
  return jax.jit(
    lambda params, *args: getattr(nnx.merge(graphdef, params), method)(*args)
  )


def random_params(like: Mapping, seed: int = 0) -> dict:
  """Parameters for an abstract tree, none of them zero: a dead path hides errors."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
      fan_in = leaf.shape[-2] * (9 if "conv/" in path else 1)
      noise /= fan_in**0.5
    elif name == "scale":
      noise = 1 + 0.1 * noise
    elif name == "lora_b" or name == "bias":
      noise *= 0.1
    elif name == "lora_a":
      noise /= leaf.shape[-2] ** 0.5
    else:
      noise *= 0.5
    return noise.astype(leaf.dtype)

  flat = weights.flatten(like)
  return weights.unflatten({path: draw(path, leaf) for path, leaf in flat.items()})


def random_model(make: Callable[[], nnx.Module], seed: int = 0) -> Loaded:
  """The model that `make` builds, with `random_params`."""
  graphdef, like = weights.abstract(make)
  return Loaded(None, graphdef, random_params(like, seed))


def fresh_model(make: Callable[[], nnx.Module]) -> Loaded:
  """The model that `make` builds, as it is initialised."""
  graphdef, _ = weights.abstract(make)
  return Loaded(None, graphdef, jax.jit(lambda: weights.split(make())[1])())


def random_inputs(
  config: mmdit.MMDiTConfig, *, b: int = 2, hw=(6, 8), length: int = 5, seed: int = 1
):
  """x (b H W C), sigma (b,), cond for a backbone."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  x = normal(b, *hw, config.in_channels)
  sigma = np.linspace(0.15, 0.85, b, dtype=np.float32)
  cond = features.Cond(
    normal(b, length, config.context_dim), normal(b, config.pooled_dim)
  )
  return x, sigma, cond


def make_mmdit(config: mmdit.MMDiTConfig, **kw) -> Callable[[], mmdit.MMDiT]:
  return lambda: mmdit.MMDiT(config, rngs=nnx.Rngs(0), **kw)


def load_mmdit(config, state, keymap=None, **kw) -> Loaded:
  """A transformer from a diffusers state dict (numpy)."""
  keymap = mmdit_keys.diffusers(config) if keymap is None else keymap
  return Loaded(config, *helpers.load(make_mmdit(config, **kw), keymap, state))


def transformer() -> Loaded:
  """The golden transformer, all blocks."""
  folder = "dina/sd35/transformer"
  config = mmdit.MMDiTConfig.from_diffusers(helpers.golden_config(f"{folder}/config"))
  state = helpers.golden(f"{folder}/diffusion_pytorch_model")
  return load_mmdit(config, state)


def load_dina(
  full: Loaded, release: Mapping, adapter: Mapping, adapters: Mapping, head: Mapping
) -> Loaded:
  """A DiNa-LRM reward on the transformer `full`, as convert/ would put it together.

  Args:
    release, adapter: `config.json["model"]` and `adapter_config.json`; an empty
      `adapter` means no LoRA.
    adapters, head: state dicts (numpy).
  """
  backbone = full.config.truncate(
    release["num_transformer_layers"],
    has_output=False,
    image_taps=tuple(release["visual_head_idx"]),
    text_taps=tuple(release["text_head_idx"]),
  )
  head_config = qformer_head.QFormerHeadConfig(
    **qformer_keys.config_kwargs(release, backbone.width)
  )
  lora_config, keymaps = None, {"head": qformer_keys.dina()}
  if adapter:
    lora_config = lora.LoRAConfig(adapter["r"], adapter["lora_alpha"])
    keymaps["lora"] = lora_keys.peft(
      backbone, adapter["target_modules"], adapter["exclude_modules"] or ()
    )
  config = reward.RewardConfig(backbone, head_config, lora_config)
  graphdef, like = weights.abstract(
    lambda: reward.RewardModel(config, rngs=nnx.Rngs(0))
  )
  shapes = weights.shapes(like)
  base = mmdit.truncate_params(full.params, full.config, backbone)
  params = {f"backbone/{k}": v for k, v in weights.flatten(base).items()}
  if adapter:
    found = _fill(keymaps["lora"], adapters, shapes, "backbone/", only="lora_")
    params |= {f"backbone/{k}": v for k, v in found.items()}
  found = _fill(keymaps["head"], head, shapes, "head/")
  params |= {f"head/{k}": v for k, v in found.items()}
  assert params.keys() == shapes.keys(), params.keys() ^ shapes.keys()
  return Loaded(config, graphdef, weights.unflatten(params), keymaps)


def load_drm(full_config, state: Mapping, skip: int, base: int, groups: int) -> Loaded:
  """A DRM reward from its checkpoint, which holds all blocks of the transformer."""
  parts = {
    prefix: {k: v for k, v in state.items() if k.startswith(prefix)}
    for prefix in ("transformer.", "reward_output.")
  }
  assert sum(map(len, parts.values())) == len(state)
  full = load_mmdit(
    full_config,
    parts["transformer."],
    mmdit_keys.diffusers(full_config, "transformer."),
  )
  backbone = full_config.truncate(full_config.num_layers - skip, has_output=True)
  head = conv_head.ConvHeadConfig(base_channels=base, num_groups=groups)
  config = reward.RewardConfig(backbone, head)
  graphdef, like = weights.abstract(
    lambda: reward.RewardModel(config, rngs=nnx.Rngs(0))
  )
  found = _fill(
    conv_head_keys.drm(), parts["reward_output."], weights.shapes(like), "head/"
  )
  params = {
    "backbone": mmdit.truncate_params(full.params, full_config, backbone),
    "head": weights.unflatten(found),
  }
  keymaps = {
    "backbone": mmdit_keys.diffusers(backbone, "transformer."),
    "head": conv_head_keys.drm(),
  }
  return Loaded(config, graphdef, params, keymaps)


def _fill(keymap, state, shapes, under: str, only: str = "") -> dict:
  """Fills the parameters below `under` whose path contains `only`."""
  shapes = {
    path[len(under) :]: shape
    for path, shape in shapes.items()
    if path.startswith(under) and only in path
  }
  source = {key: (array.shape, array.dtype) for key, array in state.items()}
  return engine.fill(keymap, source, shapes, state.__getitem__)


def dina() -> Loaded:
  """The golden DiNa-LRM; its head from a copy of rm_head.pt that needs no torch."""
  lora_folder = "dina/reward/checkpoint/backbone_lora"
  return load_dina(
    transformer(),
    helpers.golden_config("dina/reward/config")["model"],
    helpers.golden_config(f"{lora_folder}/adapter_config"),
    helpers.golden(f"{lora_folder}/adapter_model"),
    helpers.golden("dina/rm_head"),
  )


def drm() -> Loaded:
  """The golden DRM."""
  head = helpers.golden_config("drm/head")
  return load_drm(
    transformer().config,
    helpers.golden("drm/model"),
    head["skip_last_blocks"],
    head["base_channels"],
    head["num_groups"],
  )
