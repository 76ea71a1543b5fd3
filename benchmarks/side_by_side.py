"""What the benchmarks beside PyTorch share: weights and models for both frameworks.

One tree of random numbers, in our layout, goes into both: into torch's modules through
the converters' keymaps. torch's side is diffusers' transformer and the heads of
convert/torch_reference.py (the `convert` extra; PYTHONPATH must hold `convert`), which
are imported where they are needed.
"""

from collections.abc import Mapping
import concurrent.futures
import os
from typing import Any
import zlib

import numpy as np

from lrm_jax import weights
from lrm_jax.keymaps import conv_head as conv_head_keys
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import lora as lora_keys
from lrm_jax.keymaps import mmdit as mmdit_keys
from lrm_jax.keymaps import qformer_head as qformer_keys
from lrm_jax.models import conv_head, mmdit, reward


def random_weights(like: Mapping, seed: int = 0) -> dict:
  """Non-zero parameters (a fresh model's zero gates would hide half of it).

  Each has a generator of its own, and all cores draw: there may be billions.
  """

  def draw(path, leaf):
    rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
    noise = rng.standard_normal(leaf.shape, np.float32)
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
      noise /= np.float32(np.sqrt(leaf.shape[-2] * (9 if "/conv/" in path else 1)))
    elif name in ("lora_a", "lora_b"):  # adapters about half as strong as their layer
      noise *= np.float32(0.5 / np.sqrt(leaf.shape[-2]))
    else:
      noise *= np.float32(0.1)
      noise += np.float32(name == "scale")
    return noise

  flat = weights.flatten(like)
  with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    drawn = pool.map(draw, flat.keys(), flat.values())
    return weights.unflatten(dict(zip(flat, drawn, strict=True)))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
  """Norm of the difference over the norm of what is wanted."""
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def fill_torch(
  module: Any, keymap: engine.Keymap, params: Mapping, ignored: tuple[str, ...] = ()
) -> None:
  """Copies our parameters into a torch module.

  Args:
    ignored: prefixes of the module's keys that keep their own values.

  Raises:
    ValueError: keys that do not fit.
  """
  import torch

  exported = engine.export(keymap, weights.flatten(params), contiguous=False)
  state = {key: torch.from_numpy(a) for key, a in exported}
  missing, unexpected = module.load_state_dict(state, strict=False)
  left = [key for key in missing if not key.startswith(ignored)]
  if left or unexpected:
    raise ValueError(f"weights do not fit torch's model: {left + unexpected}")


def torch_transformer(
  config: mmdit.MMDiTConfig,
  params: Mapping,
  *,
  extra_blocks: int = 0,
  device: str = "cpu",
) -> Any:
  """diffusers' SD3Transformer2DModel with our (stacked) parameters.

  Args:
    device: where it is made: a GPU initialises billions of weights at once.
    extra_blocks: blocks more than the config's, which nobody runs. diffusers never
      updates the text in its last block, so a truncated backbone needs one.
  """
  import diffusers
  import torch

  fields = config.to_diffusers()
  fields["num_layers"] += extra_blocks
  del fields["_class_name"]
  with torch.device(device):
    transformer = diffusers.SD3Transformer2DModel(**fields)
  unused = tuple(
    f"transformer_blocks.{config.num_layers + i}." for i in range(extra_blocks)
  )
  if extra_blocks:
    unused += ("norm_out", "proj_out")
  fill_torch(transformer, mmdit_keys.diffusers(config), params, unused)
  return transformer


def torch_reward(
  config: reward.RewardConfig, params: Mapping, device: str = "cpu"
) -> Any:
  """`model(latents, timesteps, context, pooled) -> (b, 1)` with our parameters.

  Adapters stay beside their layers (PEFT), as in ours.
  """
  import torch_reference

  backbone, head = config.backbone, params["head"]
  base = weights.unflatten(
    {
      path: leaf
      for path, leaf in weights.flatten(params["backbone"]).items()
      if "/lora_" not in path
    }
  )
  transformer = torch_transformer(backbone, base, extra_blocks=1, device=device)
  if isinstance(config.head, conv_head.ConvHeadConfig):
    model = torch_reference.DrmReward(
      transformer,
      skip_last_blocks=1,
      base_channels=config.head.base_channels,
      num_groups=config.head.num_groups,
    )
    fill_torch(model.reward_output, conv_head_keys.drm(""), head)
    return model

  adapters = config.lora
  release = torch_reference.DinaConfig(
    num_blocks=backbone.num_layers,
    image_taps=backbone.image_taps,
    text_taps=backbone.text_taps,
    num_queries=config.head.num_queries,
    num_heads=config.head.num_heads,
    lora_rank=0 if adapters is None else adapters.rank,
    lora_alpha=0 if adapters is None else adapters.alpha,
  )
  model = torch_reference.DinaReward(transformer, release)
  fill_torch(model.reward_head, qformer_keys.dina(), head)
  if adapters is not None:
    leaves = weights.flatten(params["backbone"]).items()
    fill_adapters(
      model.backbone,
      lora_keys.peft(backbone, *lora_keys.peft_names(backbone, adapters)),
      {p: a for p, a in leaves if "/lora_" in p},
    )
  return model


def fill_adapters(model: Any, keymap: engine.Keymap, adapters: Mapping) -> None:
  """Copies our adapters, path -> array, into a PEFT model."""
  import peft
  import torch

  state = {
    key: torch.from_numpy(np.ascontiguousarray(a))
    for key, a in engine.export(keymap, adapters)
  }
  wanted = set(peft.get_peft_model_state_dict(model))
  if wanted != set(state):
    raise ValueError(f"adapters do not fit PEFT's: {sorted(wanted ^ set(state))}")
  peft.set_peft_model_state_dict(model, state)


def sde_moments(
  x: Any, v: Any, sigma: float, sigma_next: float, noise_level: float
) -> tuple[Any, float, float]:
  """Flow-GRPO's step in torch, float32: its mean, its deviation, and s, the KL's."""
  dt = sigma_next - sigma
  below = sigma_next if sigma == 1 else sigma
  s = noise_level * (sigma / (1 - below)) ** 0.5
  drift = s**2 / (2 * sigma)
  mean = x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt
  return mean, s * (-dt) ** 0.5, s
