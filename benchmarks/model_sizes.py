"""The architectures that benchmarks run, small and in full, and their random weights.

A narrow model has SD3.5-Medium's depth and proportions, so that what costs how much of
the whole is as in the real one.
"""

from collections.abc import Mapping
import dataclasses

from flax import nnx
import side_by_side

from lrm_jax import build, weights
from lrm_jax.models import conv_head, lora, mmdit, qformer_head, reward


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Architectures, inputs, and how they are run.

  Attributes:
    layers, dual: blocks of the generator, and how many have dual attention.
    dina_layers, taps: of the scorers on the generator's blocks.
    drm_layers: of the scorer with its own.
    latent: side of the latent.
    steps: T.
    scan: blocks under `lax.scan`, else unrolled.
  """

  layers: int = 24
  dual: int = 13
  dina_layers: int = 12
  taps: tuple[int, ...] = (4, 8, 12)
  drm_layers: int = 21
  heads: int = 6
  head_dim: int = 32
  latent: int = 16
  text_tokens: int = 64
  steps: int = 5
  dtype: str = "float32"
  scan: bool = True

  @classmethod
  def full(cls) -> "Sizes":
    """SD3.5-Medium, 512 px, the pipeline's 333 text tokens."""
    return cls(
      heads=24,
      head_dim=64,
      latent=64,
      text_tokens=333,
      steps=50,
      dtype="bfloat16",
      scan=False,
    )

  @property
  def generator(self) -> mmdit.MMDiTConfig:
    """All widths in the proportions of SD3.5-Medium, which is one of them."""
    width = self.heads * self.head_dim
    return dataclasses.replace(
      mmdit.MMDiTConfig.sd35_medium(),
      num_layers=self.layers,
      num_heads=self.heads,
      head_dim=self.head_dim,
      dual_layers=tuple(range(self.dual)),
      context_dim=8 * width // 3,
      pooled_dim=4 * width // 3,
      pos_embed_size=384 if self.latent > 32 else 32,
    )

  @property
  def rewards(self) -> dict[str, reward.RewardConfig]:
    full = self.generator
    tapped = full.truncate(
      self.dina_layers, has_output=False, image_taps=self.taps, text_taps=self.taps
    )
    head = qformer_head.QFormerHeadConfig(
      token_dim=full.width,
      width=full.width,
      num_image_taps=len(self.taps),
      num_text_taps=len(self.taps),
    )
    rank = max(1, full.width // 24)  # 64 at full width
    groups = 32 if full.width >= 192 else 4
    return {
      "dina": reward.RewardConfig(
        tapped, head, lora.LoRAConfig(rank=rank, alpha=2 * rank)
      ),
      "cheap": reward.RewardConfig(tapped, head),
      "drm": reward.RewardConfig(
        full.truncate(self.drm_layers, has_output=True),
        conv_head.ConvHeadConfig(
          base_channels=groups * max(1, full.width // 192), num_groups=groups
        ),
      ),
    }


def make_weights(sizes: Sizes) -> dict[str, dict]:
  """Random parameters of the generator and of each reward, stacked, float32 numpy.

  Of rewards on the generator's blocks: only what is their own.
  """
  _, like = weights.abstract(lambda: mmdit.MMDiT(sizes.generator, rngs=nnx.Rngs(0)))
  made = {"generator": side_by_side.random_weights(like, seed=0)}
  for seed, (name, config) in enumerate(sizes.rewards.items(), 1):
    _, like = weights.abstract(lambda c=config: build.make_reward(c))
    made[name] = side_by_side.random_weights(_own(like, name), seed=seed)
  return made


def _own(params: Mapping, name: str) -> dict:
  """What a reward does not take from the generator."""
  if name == "drm":
    return dict(params)
  flat = weights.flatten(params)
  return weights.unflatten(
    {p: a for p, a in flat.items() if p.startswith("head/") or "/lora_" in p}
  )
