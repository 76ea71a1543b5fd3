"""Model folders that generate: the golden SD3.5, and rewards on it; no torch needed."""

from collections.abc import Mapping
import functools
import pathlib

import torch_to_flax

from lrm_jax import build, weights
from lrm_jax import folder as folder_lib
from lrm_jax.models import qformer_head, reward
from tests import golden_models, helpers

# Pixels at which the golden transformer was trained, and of one of its patches.
SIZE, PATCH = 64, 4


class Folders:
  """Each folder is made when it is first asked for.

  Attributes:
    root: where they are made.
  """

  def __init__(self, root: pathlib.Path):
    self.root = root

  @functools.cached_property
  def sd35(self) -> pathlib.Path:
    """The generator."""
    source = helpers.GOLDEN / "dina" / "sd35"
    torch_to_flax.main(["--sd35", str(source), "--out", str(self.root / "sd35")])
    return self.root / "sd35"

  @functools.cached_property
  def drm(self) -> pathlib.Path:
    """A reward with a backbone of its own."""
    source = helpers.GOLDEN / "drm" / "model.safetensors"
    out = str(self.root / "drm")
    torch_to_flax.main(
      ["--base", str(self.sd35), "--reward", str(source), "--out", out]
    )
    return self.root / "drm"

  @functools.cached_property
  def dina(self) -> pathlib.Path:
    """A reward on the generator's weights, with adapters."""
    model = golden_models.dina()
    return self._write("dina", model.config, model.params)

  @functools.cached_property
  def head(self) -> pathlib.Path:
    """A reward that is no more than a head on the generator's first blocks."""
    full = golden_models.transformer().config
    backbone = full.truncate(2, has_output=False, image_taps=(1, 2), text_taps=(2,))
    head = qformer_head.QFormerHeadConfig(
      token_dim=full.width, width=16, num_image_taps=2, num_text_taps=1, num_heads=2
    )
    config = reward.RewardConfig(backbone, head)
    params = golden_models.random_model(lambda: build.make_reward(config), 3).params
    return self._write("head", config, params)

  def _write(
    self, name: str, config: reward.RewardConfig, params: Mapping
  ) -> pathlib.Path:
    """A reward folder without the generator's weights."""
    leaves = {
      path: leaf
      for path, leaf in weights.flatten(params).items()
      if not path.startswith("backbone/") or "/lora_" in path
    }
    with folder_lib.write_atomically(self.root / name, force=False) as out:
      entry = build.save_reward(
        out, leaves, config, reward.ScoringConfig.dina(), stacked=True
      )
      folder_lib.write_config(
        out, {"base": str(self.sd35), "components": {"reward": entry}}
      )
    return self.root / name
