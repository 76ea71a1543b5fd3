"""Text encoders and the autoencoder, beside PyTorch in the same run.

  encode, decode   the autoencoder, float32 as the pipelines run it
  t5, clip_l, clip_g

PyTorch's side is diffusers' AutoencoderKL and transformers' encoders with the same
random weights. FLOPs are what PyTorch's own counter finds on the meta device.

  python benchmarks/text_and_pixels.py --out benchmarks/results/text_and_pixels_cpu.json
  python benchmarks/text_and_pixels.py --full --torch eager compile --out gpu.json
"""

from collections.abc import Callable
import dataclasses
import functools
import sys
from typing import Any

from flax import nnx
import jax
import numpy as np
import protocol
import side_by_side

from lrm_jax import build, weights
from lrm_jax.keymaps import clip as clip_keys
from lrm_jax.keymaps import t5 as t5_keys
from lrm_jax.keymaps import vae as vae_keys
from lrm_jax.models import clip, t5, vae


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Attributes: dtype is the text encoders'; the autoencoder is float32."""

  vae: vae.VAEConfig
  t5: t5.T5Config
  clip_l: clip.CLIPTextConfig
  clip_g: clip.CLIPTextConfig
  dtype: str
  pixels: tuple[int, ...]
  lengths: tuple[int, ...]  # tokens of T5
  batches: tuple[int, ...]


FULL = Sizes(
  vae=vae.VAEConfig.sd3(),
  t5=t5.T5Config.xxl(),
  clip_l=clip.CLIPTextConfig.clip_l(),
  clip_g=clip.CLIPTextConfig.clip_g(),
  dtype="bfloat16",
  pixels=(512, 1024),
  lengths=(128, 256, 512),
  batches=(1, 8),
)
# The autoencoder keeps its widths: those of convolutions decide how fast they are.
NARROW = dataclasses.replace(
  FULL,
  t5=dataclasses.replace(
    FULL.t5, vocab_size=500, dim=256, mlp_dim=640, num_layers=6, num_heads=4
  ),
  clip_l=dataclasses.replace(
    FULL.clip_l, vocab_size=500, dim=128, mlp_dim=512, num_layers=6, num_heads=2
  ),
  clip_g=dataclasses.replace(
    FULL.clip_g, vocab_size=500, dim=256, mlp_dim=1024, num_layers=8, num_heads=4
  ),
  dtype="float32",
  pixels=(64,),
  lengths=(128,),
  batches=(1, 8),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """Attributes: size is pixels of a side, or tokens."""

  model: str
  size: int
  batch: int

  @property
  def name(self) -> str:
    return f"{self.model}-{self.size}-{self.batch}"

  @property
  def of_pixels(self) -> bool:
    return self.model in ("encode", "decode")

  @property
  def weights(self) -> str:
    """Which of Sizes' models it runs."""
    return "vae" if self.of_pixels else self.model


def cases(sizes: Sizes) -> list[Case]:
  found = [Case(m, p, b) for m in ("encode", "decode") for p in sizes.pixels
           for b in sizes.batches]  # fmt: skip
  found += [Case("t5", n, b) for n in sizes.lengths for b in sizes.batches]
  found += [Case(m, 77, b) for m in ("clip_l", "clip_g") for b in sizes.batches]
  return found


def config_of(sizes: Sizes, case: Case) -> Any:
  return getattr(sizes, case.weights)


def make_inputs(sizes: Sizes, case: Case) -> np.ndarray:
  """Images or latents (b H W C) float32, or token ids (b n) int32."""
  rng, config = np.random.default_rng(case.batch), config_of(sizes, case)
  if not case.of_pixels:
    ids = rng.integers(3, config.vocab_size - 1, (case.batch, case.size), np.int32)
    ids[:, -1] = config.vocab_size - 1  # where CLIP pools
    return ids
  side, channels = case.size, config.in_channels
  if case.model == "decode":
    side, channels = side // config.downsampling, config.latent_channels
  return rng.uniform(-1, 1, (case.batch, side, side, channels)).astype(np.float32)


def our_model(sizes: Sizes, case: Case, **kw) -> Callable[[], nnx.Module]:
  make = {"t5": t5.T5Encoder, "clip_l": clip.CLIPText, "clip_g": clip.CLIPText}
  make = make.get(case.model, vae.VAE)
  return lambda: make(config_of(sizes, case), rngs=nnx.Rngs(0), **kw)


def random_params(sizes: Sizes, case: Case) -> dict:
  return side_by_side.random_weights(weights.abstract(our_model(sizes, case))[1])


def torch_model(sizes: Sizes, case: Case) -> tuple[Any, Any]:
  """(module without our weights, keymap)."""
  import diffusers
  import transformers

  c = config_of(sizes, case)
  if case.of_pixels:
    count = len(c.block_out_channels)
    module = diffusers.AutoencoderKL(
      in_channels=c.in_channels,
      out_channels=c.out_channels,
      down_block_types=["DownEncoderBlock2D"] * count,
      up_block_types=["UpDecoderBlock2D"] * count,
      block_out_channels=list(c.block_out_channels),
      layers_per_block=c.layers_per_block,
      latent_channels=c.latent_channels,
      norm_num_groups=c.norm_num_groups,
      use_quant_conv=False,
      use_post_quant_conv=False,
    )
    return module, vae_keys.diffusers(c)
  if case.model == "t5":
    fields = transformers.T5Config(
      vocab_size=c.vocab_size,
      d_model=c.dim,
      d_kv=c.head_dim,
      d_ff=c.mlp_dim,
      num_layers=c.num_layers,
      num_heads=c.num_heads,
      feed_forward_proj="gated-gelu",
      relative_attention_num_buckets=c.num_buckets,
      relative_attention_max_distance=c.max_distance,
      is_encoder_decoder=False,
      use_cache=False,
    )
    return transformers.T5EncoderModel(fields), t5_keys.transformers(c)
  fields = transformers.CLIPTextConfig(
    vocab_size=c.vocab_size,
    hidden_size=c.dim,
    intermediate_size=c.mlp_dim,
    projection_dim=c.projection_dim,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    max_position_embeddings=c.max_length,
    hidden_act=c.act,
    bos_token_id=c.vocab_size - 2,
    eos_token_id=c.eos_token_id,
  )
  module = transformers.CLIPTextModelWithProjection(fields)
  return module, clip_keys.transformers(c)


def torch_forward(module: Any, case: Case) -> Callable[[Any], dict[str, Any]]:
  """A call of the module as the pipelines make it, of its input."""
  if case.model == "encode":
    return lambda x: {"output": module.encode(x).latent_dist.mean}
  if case.model == "decode":
    return lambda x: {"output": module.decode(x).sample}
  if case.model == "t5":
    return lambda ids: {"output": module(ids).last_hidden_state}

  def run_clip(ids):
    out = module(ids, output_hidden_states=True)
    return {"output": out.hidden_states[-2], "pooled": out.text_embeds}

  return run_clip


@functools.cache
def count(sizes: Sizes, case: Case) -> float:
  """By torch.utils.flop_counter, on one sample of the meta device."""
  import torch
  from torch.utils import flop_counter

  x = make_inputs(sizes, dataclasses.replace(case, batch=1))
  with torch.device("meta"):
    module, _ = torch_model(sizes, case)
  x = x.transpose(0, 3, 1, 2) if case.of_pixels else x
  x = torch.empty(x.shape, dtype=getattr(torch, str(x.dtype)), device="meta")
  with flop_counter.FlopCounterMode(display=False) as counter, torch.inference_mode():
    torch_forward(module.eval(), case)(x)
  return float(case.batch * counter.get_total_flops())


class Ours(protocol.JaxSide):
  """As lrm_jax.encoders runs them."""

  def __init__(self, sizes: Sizes):
    super().__init__(sizes)
    self._models: dict[str, tuple[nnx.GraphDef, Any]] = {}

  def _model(self, case: Case) -> tuple[nnx.GraphDef, Any]:
    if case.weights not in self._models:
      dtype = build.dtype("float32" if case.of_pixels else self.sizes.dtype)
      graphdef, like = weights.abstract(
        our_model(self.sizes, case, dtype=dtype, param_dtype=dtype)
      )
      params = build.fit(random_params(self.sizes, case), like, name="random weights")
      self._models[case.weights] = graphdef, build.to_device(params)
    return self._models[case.weights]

  def make(self, case: Case) -> protocol.Program:
    graphdef, params = self._model(case)

    def run(params, x):
      model = nnx.merge(graphdef, params)
      if case.model == "encode":
        return {"output": model.encode(x)[0].transpose(0, 3, 1, 2)}
      if case.model == "decode":
        return {"output": model.decode(x).transpose(0, 3, 1, 2)}
      if case.model == "t5":
        return {"output": model(x)}
      return dict(zip(("output", "pooled"), model(x), strict=True))

    return protocol.Program(
      jax.jit(run), (params, jax.device_put(make_inputs(self.sizes, case)))
    )

  def outputs(self, case: Case, result: Any) -> dict[str, Any]:
    return result


class Theirs(protocol.TorchSide):
  """diffusers and transformers."""

  def __init__(self, sizes: Sizes, how: str):
    super().__init__(sizes, how)
    self._models: dict[str, Any] = {}

  def _model(self, case: Case) -> Any:
    if case.weights not in self._models:
      with self.torch.device(self.device):
        module, keymap = torch_model(self.sizes, case)
      # T5's second name for its embedding.
      tied = ("encoder.embed_tokens.",) if case.model == "t5" else ()
      side_by_side.fill_torch(module, keymap, random_params(self.sizes, case), tied)
      module = module.to(self.device).eval().requires_grad_(False)
      if not case.of_pixels:
        module = module.to(getattr(self.torch, self.sizes.dtype))
      self._models[case.weights] = module
    return self._models[case.weights]

  def make(self, case: Case) -> Callable[[], dict[str, Any]]:
    torch = self.torch
    forward = self.fast(torch_forward(self._model(case), case))
    x = make_inputs(self.sizes, case)
    x = self.tensor(x.transpose(0, 3, 1, 2) if case.of_pixels else x)

    @torch.inference_mode()
    def call():
      return forward(x)

    return call


TABLE = protocol.Table(
  description=__doc__,
  narrow=NARROW,
  full=FULL,
  cases=cases,
  ours=Ours,
  theirs=Theirs,
  count=count,
)


if __name__ == "__main__":
  sys.exit(protocol.main(TABLE))
