"""A latent reward model: a truncated diffusion transformer and a head.

`R(x, sigma, c)` scores a noisy latent x at noise level sigma for a prompt c with one
scalar. Published presets: DiNa-LRM (Q-Former head on tapped tokens, LoRA on the
backbone) and DRM (convolutional head on the output, all weights trained).

Axes: b batch, H W latent pixels, C latent channels, k noise levels of an ensemble.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from lrm_jax.models import conv_head, features, mmdit, qformer_head
from lrm_jax.models import lora as lora_lib
from lrm_jax.models.layers import Dtype

HeadConfig = qformer_head.QFormerHeadConfig | conv_head.ConvHeadConfig


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
  """How a published model is meant to be asked, and how its score is reported.

  Attributes:
    u_generated, u_image: noise level for generated latents and for encoded images.
    table: look u up as the nearest entry of the shifted 1000-step table (DiNa-LRM);
      False takes sigma = u exactly (DRM scores clean latents at t = 0).
    add_noise: noise is mixed into the latent; False only tells the model the level.
    offset, scale: the reported score is `(raw + offset) / scale`.
  """

  u_generated: float = 0.4
  u_image: float = 0.1
  table: bool = True
  add_noise: bool = True
  offset: float = 0.0
  scale: float = 1.0

  @classmethod
  def dina(cls) -> "ScoringConfig":
    """u = 0.4 on generated latents, 0.1 on images; reported as (raw + 10) / 10."""
    return cls(offset=10.0, scale=10.0)

  @classmethod
  def drm(cls) -> "ScoringConfig":
    """The clean latent at t = 0; reported raw."""
    return cls(u_generated=0.0, u_image=0.0, table=False)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """A backbone (already truncated, with its taps), a head, and adapters.

  Attributes:
    lora: adapters on the backbone, None for none.
    logistic: squash the score to (-2, 2) with two learned parameters,
      `4 / (1 + exp(-(s - eta3) / (|eta4| + 1e-6))) - 2`.
  """

  backbone: mmdit.MMDiTConfig
  head: HeadConfig
  lora: lora_lib.LoRAConfig | None = None
  logistic: bool = False

  @classmethod
  def dina_sd35m_12layers(cls) -> "RewardConfig":
    """liuhuohuo/DiNa-LRM-SD35M-12layers."""
    taps = (4, 8, 12)
    backbone = mmdit.MMDiTConfig.sd35_medium().truncate(
      12, has_output=False, image_taps=taps, text_taps=taps
    )
    return cls(
      backbone=backbone,
      head=qformer_head.QFormerHeadConfig(token_dim=backbone.width),
      lora=lora_lib.LoRAConfig(rank=64, alpha=128),
    )

  @classmethod
  def drm_2b(cls) -> "RewardConfig":
    """DRM on SD3.5-Medium without its last 3 blocks."""
    full = mmdit.MMDiTConfig.sd35_medium()
    return cls(
      backbone=full.truncate(full.num_layers - 3, has_output=True),
      head=conv_head.ConvHeadConfig(),
    )

  @classmethod
  def drm_7b(cls) -> "RewardConfig":
    """DRM on SD3.5-Large without its last 5 blocks."""
    full = mmdit.MMDiTConfig.sd35_large()
    return cls(
      backbone=full.truncate(full.num_layers - 5, has_output=True),
      head=conv_head.ConvHeadConfig(),
    )


class Logistic(nnx.Module):
  """DiNa-LRM's optional squashing of the score to (-2, 2)."""

  def __init__(self):
    self.eta3 = nnx.Param(jnp.zeros((), jnp.float32))
    self.eta4 = nnx.Param(jnp.full((), 0.15, jnp.float32))

  def __call__(self, score: jax.Array) -> jax.Array:
    width = jnp.abs(self.eta4[...]) + 1e-6
    return 4.0 * jax.nn.sigmoid((score - self.eta3[...]) / width) - 2.0


class RewardModel(nnx.Module):
  """`(x, sigma, cond) -> (b,)`."""

  def __init__(
    self,
    config: RewardConfig,
    *,
    scan_blocks: bool = True,
    remat: str = "none",
    attention_impl: str = "auto",
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    trained_dtype: Dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """`trained_dtype`: parameters of the head and the adapters (default
    `param_dtype`); a frozen bfloat16 backbone wants float32 here."""
    trained_dtype = param_dtype if trained_dtype is None else trained_dtype
    self.backbone = mmdit.MMDiT(
      config.backbone,
      scan_blocks=scan_blocks,
      remat=remat,
      attention_impl=attention_impl,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    if config.lora is not None:
      lora_lib.add_adapters(
        self.backbone, config.lora, param_dtype=trained_dtype, rngs=rngs
      )
    make_head = (
      conv_head.ConvHead
      if isinstance(config.head, conv_head.ConvHeadConfig)
      else qformer_head.QFormerHead
    )
    self.head = make_head(
      config.head, dtype=dtype, param_dtype=trained_dtype, rngs=rngs
    )
    self.squash = Logistic() if config.logistic else nnx.data(None)
    self.config = config

  def __call__(
    self,
    x: jax.Array,
    sigma: jax.Array,
    cond: features.Cond | features.Embedded,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Raw score of each noisy latent.

    Args:
      x: (b H W C) latent at noise level sigma, scaled as SD3.5's.
      sigma: (b,) in [0, 1]; 0 scores a clean latent.
      cond: the prompts, or what `backbone.embed` made of them.
      key: turns the head's dropout on (training only).

    Returns: (b,) float32.
    """
    return self.score(*self.backbone.run(x, 1000.0 * sigma, cond), key)

  def score(
    self,
    tokens: features.Tokens,
    feats: features.Features,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """(b,) float32: a call's second half, from what `backbone.run` returns."""
    return self._squash(self.head(self.backbone.output(tokens), feats, key))

  def ensemble(
    self,
    xs: jax.Array,
    sigmas: jax.Array,
    cond: features.Cond | features.Embedded,
  ) -> jax.Array:
    """One score from several noise levels: their tokens meet in one head pass.

    DiNa-LRM's token-level ensemble: each level's adapted tokens are concatenated on
    the sequence axis. The k levels run through the backbone as one batch.

    Args:
      xs: (k b H W C) the same latents at k noise levels.
      sigmas: (k b).
      cond: (b ...) the prompts, or what `backbone.embed` made of them.

    Returns: (b,) float32.

    Raises:
      ValueError: the head has no token stage (DRM's): average its scores instead.
    """
    if not hasattr(self.head, "tokens"):
      raise ValueError(
        f"{type(self.head).__name__} has no token stage to ensemble: average the "
        "scores of the noise levels instead"
      )
    k, b = sigmas.shape
    flat = xs.reshape(k * b, *xs.shape[2:])
    tiled = jax.tree.map(lambda a: jnp.tile(a, (k,) + (1,) * (a.ndim - 1)), cond)
    _, feats = self.backbone(flat, 1000.0 * sigmas.reshape(-1), tiled)

    def levels_on_sequence(tokens):  # (k*b n d) -> (b k*n d)
      if tokens is None:
        return None
      tokens = tokens.reshape(k, b, *tokens.shape[1:])
      return jnp.concatenate(list(tokens), axis=1)

    image, text = (levels_on_sequence(t) for t in self.head.tokens(feats))
    return self._squash(self.head.score(image, text))

  def _squash(self, score: jax.Array) -> jax.Array:
    return score if self.squash is None else self.squash(score)
