"""PyTorch stand-ins for the published models, at any size, with random weights.

`make_sd35_folder` writes a whole Stable Diffusion 3.5 pipeline folder through
diffusers' and transformers' own classes. The reward models are those of
convert/torch_reference.py; test_torch_models.py holds them against the golden vectors,
so that other tests may use them as an oracle at sizes for which there are none. Needs
the `convert` extra.

Tensors are NCHW, as PyTorch has them.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import safetensors.torch
import torch
from torch_reference import DinaConfig as DinaConfig
from torch_reference import DinaReward as DinaReward
from torch_reference import DrmReward as DrmReward
from torch_reference import draw_weights as draw_weights
from torch_reference import read_dina_release as read_dina_release
import transformers

torch.set_num_threads(1)  # tiny models: threads cost more than they give

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"


# --- Stable Diffusion 3.5 -------------------------------------------------------


def make_transformer(
  *,
  seed: int = 0,
  layers: int = 3,
  heads: int = 2,
  head_dim: int = 8,
  dual: Sequence[int] = (0, 1),
  joint_dim: int = 32,
  pooled_dim: int = 28,
  pos_embed_max_size: int = 16,
  qk_norm: str | None = "rms_norm",
):
  """A random SD3Transformer2DModel in evaluation mode."""
  model = diffusers.SD3Transformer2DModel(
    sample_size=2 * pos_embed_max_size,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=layers,
    num_attention_heads=heads,
    attention_head_dim=head_dim,
    caption_projection_dim=heads * head_dim,
    joint_attention_dim=joint_dim,
    pooled_projection_dim=pooled_dim,
    pos_embed_max_size=pos_embed_max_size,
    dual_attention_layers=tuple(dual),
    qk_norm=qk_norm,
  )
  return draw_weights(model, seed).eval()


def make_vae(*, seed: int = 0, channels: Sequence[int] = (8, 16), layers: int = 1):
  """A random AutoencoderKL without quant convolutions; 2**(len(channels)-1) x down."""
  n = len(channels)
  model = diffusers.AutoencoderKL(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=tuple(channels),
    down_block_types=("DownEncoderBlock2D",) * n,
    up_block_types=("UpDecoderBlock2D",) * n,
    layers_per_block=layers,
    norm_num_groups=4,
    sample_size=32,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  return draw_weights(model, seed).eval()


def make_clip(
  *,
  seed: int = 0,
  width: int,
  projection: int,
  layers: int = 2,
  heads: int = 2,
  act: str = "quick_gelu",
  eos_token_id: int = 545,
):
  """A random CLIPTextModelWithProjection for the golden tokenizers' vocabulary.

  `eos_token_id=2` is the legacy value of the released configs, under which the
  pooled position is the argmax of the token ids.
  """
  config = transformers.CLIPTextConfig(
    vocab_size=546,
    hidden_size=width,
    intermediate_size=2 * width,
    projection_dim=projection,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    max_position_embeddings=77,
    hidden_act=act,
    bos_token_id=544,
    eos_token_id=eos_token_id,
    pad_token_id=545,
  )
  return draw_weights(transformers.CLIPTextModelWithProjection(config), seed).eval()


def make_t5(*, seed: int = 0, width: int, layers: int = 2, heads: int = 2):
  """A random gated-GELU T5EncoderModel for the golden tokenizer's vocabulary."""
  config = transformers.T5Config(
    vocab_size=78,
    d_model=width,
    d_kv=8,
    d_ff=2 * width,
    num_layers=layers,
    num_heads=heads,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=32,
    use_cache=False,
    is_encoder_decoder=False,
  )
  return draw_weights(transformers.T5EncoderModel(config), seed).eval()


def make_sd35_folder(
  path: str | os.PathLike,
  *,
  seed: int = 0,
  layers: int = 3,
  heads: int = 2,
  head_dim: int = 8,
  dual: Sequence[int] = (0, 1),
  joint_dim: int = 32,
  clip_widths: tuple[int, int] = (12, 16),
  clip_projections: tuple[int, int] = (12, 16),
  clip_eos: tuple[int, int] = (2, 545),
  text_layers: int = 2,
  vae_channels: Sequence[int] = (8, 16),
  vae_layers: int = 1,
  pos_embed_max_size: int = 16,
  dtype: torch.dtype = torch.float32,
  max_shard_size: str | None = None,
) -> pathlib.Path:
  """Writes a tiny complete StableDiffusion3Pipeline folder with random weights.

  Args:
    joint_dim: T5's width and the transformer's context width; at least the sum of
      `clip_widths`, whose concatenation is padded to it.
    clip_projections: their sum is the transformer's pooled width.
    max_shard_size: e.g. "50KB" for sharded safetensors files with an index.

  Returns: the folder; the tokenizers and the scheduler are those of the goldens.
  """
  if sum(clip_widths) > joint_dim:
    raise ValueError(f"clip_widths={clip_widths} do not fit joint_dim={joint_dim}")
  path = pathlib.Path(path)
  models = {
    "transformer": make_transformer(
      seed=seed,
      layers=layers,
      heads=heads,
      head_dim=head_dim,
      dual=dual,
      joint_dim=joint_dim,
      pooled_dim=sum(clip_projections),
      pos_embed_max_size=pos_embed_max_size,
    ),
    "vae": make_vae(seed=seed + 1, channels=vae_channels, layers=vae_layers),
    "text_encoder": make_clip(
      seed=seed + 2,
      width=clip_widths[0],
      projection=clip_projections[0],
      layers=text_layers,
      eos_token_id=clip_eos[0],
    ),
    "text_encoder_2": make_clip(
      seed=seed + 3,
      width=clip_widths[1],
      projection=clip_projections[1],
      layers=text_layers + 1,
      act="gelu",
      eos_token_id=clip_eos[1],
    ),
    "text_encoder_3": make_t5(seed=seed + 4, width=joint_dim, layers=text_layers),
  }
  shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
  for name, model in models.items():
    model.to(dtype).save_pretrained(path / name, **shards)
  source = GOLDEN / "dina" / "sd35"
  for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"):
    # copyfile, not copytree's copy2: the goldens may be read-only.
    shutil.copytree(source / name, path / name, copy_function=shutil.copyfile)
  shutil.copyfile(source / "model_index.json", path / "model_index.json")
  return path


# --- The reward models' files -----------------------------------------------------


def write_dina_release(path: str | os.PathLike, model: DinaReward) -> pathlib.Path:
  """Writes config.json, checkpoint/backbone_lora/ and checkpoint/rm_head.pt."""
  path = pathlib.Path(path)
  checkpoint = path / "checkpoint"
  checkpoint.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(model.config.release(), indent=2))
  if model.config.lora_rank:
    model.backbone.save_pretrained(checkpoint / "backbone_lora")
  torch.save(model.reward_head.state_dict(), checkpoint / "rm_head.pt")
  return path


def write_drm(path: str | os.PathLike, model: DrmReward) -> pathlib.Path:
  """Writes one state-dict file; the format is the suffix, .safetensors or .pt."""
  path = pathlib.Path(path)
  state = {k: v.contiguous() for k, v in model.state_dict().items()}
  if path.suffix == ".safetensors":
    safetensors.torch.save_file(state, path)
  elif path.suffix == ".pt":
    torch.save(state, path)
  else:
    raise ValueError(f"{path} should end in .safetensors or .pt")
  return path


# --- Stability's single-file layout ---------------------------------------------

_TOP = {
  "pos_embed.pos_embed": "pos_embed",
  "pos_embed.proj": "x_embedder.proj",
  "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
  "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
  "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
  "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
  "context_embedder": "context_embedder",
  "norm_out.linear": "final_layer.adaLN_modulation.1",
  "proj_out": "final_layer.linear",
}
_BLOCK = {
  "attn.to_out.0": "x_block.attn.proj",
  "attn.to_add_out": "context_block.attn.proj",
  "attn.norm_q": "x_block.attn.ln_q",
  "attn.norm_k": "x_block.attn.ln_k",
  "attn.norm_added_q": "context_block.attn.ln_q",
  "attn.norm_added_k": "context_block.attn.ln_k",
  "attn2.to_out.0": "x_block.attn2.proj",
  "attn2.norm_q": "x_block.attn2.ln_q",
  "attn2.norm_k": "x_block.attn2.ln_k",
  "norm1.linear": "x_block.adaLN_modulation.1",
  "norm1_context.linear": "context_block.adaLN_modulation.1",
  "ff.net.0.proj": "x_block.mlp.fc1",
  "ff.net.2": "x_block.mlp.fc2",
  "ff_context.net.0.proj": "context_block.mlp.fc1",
  "ff_context.net.2": "context_block.mlp.fc2",
}
_QKV = {
  ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
  ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
  ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}


def _split(key: str) -> tuple[str, str]:
  """(module, ".weight" or ".bias"); a buffer has an empty suffix."""
  module, _, leaf = key.rpartition(".")
  return (module, f".{leaf}") if leaf in ("weight", "bias") else (key, "")


def _swap_halves(tensor):
  return torch.cat(tensor.chunk(2)[::-1])


def _transformer_to_stability(state: Mapping[str, torch.Tensor]) -> dict:
  blocks = {
    int(m[1]) for k in state if (m := re.match(r"transformer_blocks\.(\d+)", k))
  }
  out = {}
  for key, tensor in state.items():
    module, leaf = _split(key)
    if not (m := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)):
      # Stability modulates by (shift, scale), diffusers by (scale, shift).
      swap = module == "norm_out.linear"
      out[_TOP[module] + leaf] = _swap_halves(tensor) if swap else tensor
      continue
    prefix, name = f"joint_blocks.{m[1]}.", m[2]
    fused = [names for names in _QKV if name in names]
    if fused:
      if name == fused[0][0]:
        parts = [state[f"transformer_blocks.{m[1]}.{n}{leaf}"] for n in fused[0]]
        out[prefix + _QKV[fused[0]] + leaf] = torch.cat(parts)
    else:
      # The last block's text side only has (shift, scale), and the same swap.
      swap = name == "norm1_context.linear" and int(m[1]) == max(blocks)
      out[prefix + _BLOCK[name] + leaf] = _swap_halves(tensor) if swap else tensor
  return out


def _vae_to_stability(state: Mapping[str, torch.Tensor]) -> dict:
  ups = [int(m[1]) for k in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", k))]
  renames = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    # The original counts the decoder's blocks from the fine end.
    (
      r"up_blocks\.(\d+)\.resnets\.(\d+)",
      lambda m: f"up.{last - int(m[1])}.block.{m[2]}",
    ),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
  )
  last = max(ups)
  out = {}
  for key, tensor in state.items():
    for pattern, name in renames:
      key = re.sub(pattern, name, key)
    if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", key):
      tensor = tensor[:, :, None, None]  # 1x1 convolutions there
    out[key] = tensor
  return out


def to_stability_layout(
  transformer: Mapping[str, torch.Tensor],
  vae: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
  """State dicts in diffusers' layout -> the keys of the single-file SD3.5 release.

  Returns `model.diffusion_model.*`, and `first_stage_model.*` where `vae` is given.
  """
  parts = {"model.diffusion_model.": _transformer_to_stability(transformer)}
  if vae is not None:
    parts["first_stage_model."] = _vae_to_stability(vae)
  return {
    prefix + key: tensor.contiguous()
    for prefix, state in parts.items()
    for key, tensor in state.items()
  }
