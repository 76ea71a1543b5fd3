"""What a single-file SD3.5 checkpoint in Stability's layout says about itself.

Such a file has no configs: sizes are read off the shapes of its tensors. Settings
that leave no trace in a shape are the published ones, and are named here.
"""

from collections.abc import Mapping
import re

from lrm_jax.keymaps.engine import ConversionError
from lrm_jax.models import clip, mmdit, t5, vae

TRANSFORMER = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "text_encoders.clip_l."
CLIP_G = "text_encoders.clip_g."
T5 = "text_encoders.t5xxl."
CLIP_HEAD_DIM = 64  # of both published CLIPs

Tensors = Mapping[str, tuple[tuple[int, ...], object]]


def _shape(tensors: Tensors, key: str, name: str, axes: int) -> tuple[int, ...]:
  if key not in tensors:
    raise ConversionError(f"{name}: missing key {key}")
  shape = tensors[key][0]
  if len(shape) != axes:
    raise ConversionError(f"{name}: {key} has shape {shape}, expected {axes} axes")
  return shape


def _count(tensors: Tensors, pattern: str) -> int:
  """1 + the largest number that the first group of `pattern` matches; 0 if none."""
  found = [int(m[1]) for key in tensors if (m := re.match(pattern, key))]
  return max(found, default=-1) + 1


def mmdit_config(tensors: Tensors, name: str) -> mmdit.MMDiTConfig:
  """Sizes of the transformer.

  Raises:
    ConversionError: a key that the sizes are read from is missing.
  """
  p = TRANSFORMER
  width, channels, patch, _ = _shape(tensors, f"{p}x_embedder.proj.weight", name, 4)
  blocks = rf"{re.escape(p)}joint_blocks\.(\d+)\."
  num_layers = _count(tensors, blocks)
  if not num_layers:
    raise ConversionError(f"{name}: no key {p}joint_blocks.N...")
  head = f"{p}joint_blocks.0.x_block.attn.ln_q.weight"
  if head not in tensors:
    raise ConversionError(
      f"{name}: missing key {head}: not an SD3.5 transformer (SD3 has no norms of "
      "queries and keys)"
    )
  (head_dim,) = _shape(tensors, head, name, 1)
  dual = {
    int(m[1]) for k in tensors if (m := re.match(blocks + r"x_block\.attn2\.", k))
  }
  out_width, _ = _shape(tensors, f"{p}final_layer.linear.weight", name, 2)
  size = round(_shape(tensors, f"{p}pos_embed", name, 3)[1] ** 0.5)
  return mmdit.MMDiTConfig(
    num_layers=num_layers,
    num_heads=width // head_dim,
    head_dim=head_dim,
    dual_layers=tuple(sorted(dual)),
    patch_size=patch,
    in_channels=channels,
    out_channels=out_width // patch**2,
    context_dim=_shape(tensors, f"{p}context_embedder.weight", name, 2)[1],
    pooled_dim=_shape(tensors, f"{p}y_embedder.mlp.0.weight", name, 2)[1],
    pos_embed_size=size,
  )


def vae_config(tensors: Tensors, name: str, norm_num_groups: int) -> vae.VAEConfig:
  """Sizes of the autoencoder; the number of norm groups leaves no trace in shapes."""
  p = f"{VAE}encoder."
  levels = _count(tensors, rf"{re.escape(p)}down\.(\d+)\.")
  widths = tuple(
    _shape(tensors, f"{p}down.{i}.block.0.conv1.weight", name, 4)[0]
    for i in range(levels)
  )
  return vae.VAEConfig(
    block_out_channels=widths,
    layers_per_block=_count(tensors, rf"{re.escape(p)}down\.0\.block\.(\d+)\."),
    latent_channels=_shape(tensors, f"{p}conv_out.weight", name, 4)[0] // 2,
    in_channels=_shape(tensors, f"{p}conv_in.weight", name, 4)[1],
    out_channels=_shape(tensors, f"{VAE}decoder.conv_out.weight", name, 4)[0],
    norm_num_groups=norm_num_groups,
  )


def clip_config(tensors: Tensors, prefix: str, name: str) -> clip.CLIPTextConfig:
  """Sizes of CLIP-L or bigG; heads of width 64, the legacy end-token rule."""
  p = f"{prefix}transformer."
  model = f"{p}text_model."
  vocab, dim = _shape(tensors, f"{model}embeddings.token_embedding.weight", name, 2)
  projection = tensors.get(f"{p}text_projection.weight")
  return clip.CLIPTextConfig(
    vocab_size=vocab,
    dim=dim,
    mlp_dim=_shape(tensors, f"{model}encoder.layers.0.mlp.fc1.weight", name, 2)[0],
    num_layers=_count(tensors, rf"{re.escape(model)}encoder\.layers\.(\d+)\."),
    num_heads=max(1, dim // CLIP_HEAD_DIM),
    projection_dim=None if projection is None else projection[0][0],
    max_length=_shape(tensors, f"{model}embeddings.position_embedding.weight", name, 2)[
      0
    ],
    act="quick_gelu" if prefix == CLIP_L else "gelu",
  )


def t5_config(tensors: Tensors, name: str) -> t5.T5Config:
  """Sizes of the T5 encoder; the published distance and eps."""
  p = f"{T5}transformer."
  block = f"{p}encoder.block.0.layer"
  vocab, dim = _shape(tensors, f"{p}shared.weight", name, 2)
  buckets, heads = _shape(
    tensors, f"{block}.0.SelfAttention.relative_attention_bias.weight", name, 2
  )
  inner = _shape(tensors, f"{block}.0.SelfAttention.q.weight", name, 2)[0]
  return t5.T5Config(
    vocab_size=vocab,
    dim=dim,
    head_dim=inner // heads,
    mlp_dim=_shape(tensors, f"{block}.1.DenseReluDense.wi_0.weight", name, 2)[0],
    num_layers=_count(tensors, rf"{re.escape(p)}encoder\.block\.(\d+)\."),
    num_heads=heads,
    num_buckets=buckets,
  )
