"""Our configs as the `config.json` of the diffusers and transformers classes.

Only what fixes the computation; everything else is left to their defaults.
"""

from typing import Any

from lrm_jax.models import clip, mmdit, t5, vae


def transformer_config(config: mmdit.MMDiTConfig) -> dict[str, Any]:
  """SD3Transformer2DModel."""
  return config.to_diffusers()


def vae_config(config: vae.VAEConfig) -> dict[str, Any]:
  """AutoencoderKL."""
  levels = len(config.block_out_channels)
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(config.block_out_channels),
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "force_upcast": True,
    "in_channels": config.in_channels,
    "out_channels": config.out_channels,
    "latent_channels": config.latent_channels,
    "layers_per_block": config.layers_per_block,
    "mid_block_add_attention": True,
    "norm_num_groups": config.norm_num_groups,
    "sample_size": 1024,
    "scaling_factor": config.scaling_factor,
    "shift_factor": config.shift_factor,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
  }


def clip_config(config: clip.CLIPTextConfig) -> dict[str, Any]:
  """CLIPTextModelWithProjection; a missing projection is the identity."""
  return {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "vocab_size": config.vocab_size,
    "hidden_size": config.dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "projection_dim": config.projection_dim or config.dim,
    "max_position_embeddings": config.max_length,
    "hidden_act": config.act,
    "layer_norm_eps": config.norm_eps,
    "bos_token_id": config.vocab_size - 2,  # unused; the default is out of range
    "eos_token_id": config.eos_token_id,
  }


def t5_config(config: t5.T5Config) -> dict[str, Any]:
  """T5EncoderModel (v1.1: gated GELU)."""
  return {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": config.vocab_size,
    "d_model": config.dim,
    "d_kv": config.head_dim,
    "d_ff": config.mlp_dim,
    "num_layers": config.num_layers,
    "num_heads": config.num_heads,
    "relative_attention_num_buckets": config.num_buckets,
    "relative_attention_max_distance": config.max_distance,
    "layer_norm_epsilon": config.norm_eps,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
  }
