"""PyTorch stand-ins for the published models, at any size, with random weights.

`make_sd35_folder` writes a whole Stable Diffusion 3.5 pipeline folder through
diffusers' and transformers' own classes. `DinaReward` and `DrmReward` are written
from the papers and from the key names of the released files; test_torch_models.py
holds them against the golden vectors, so that other tests may use them as an oracle
at sizes for which there are none. Needs the `convert` extra.

Tensors are NCHW, as PyTorch has them. Axes: b batch, n tokens, q queries, d width.
"""

from collections.abc import Mapping, Sequence
import dataclasses
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
import peft
import safetensors.torch
import torch
from torch import nn
import transformers

torch.set_num_threads(1)  # tiny models: threads cost more than they give

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"

# The projections that DiNa-LRM adapts, on either side of the joint attention.
LORA_IMAGE = ("to_q", "to_k", "to_v", "to_out.0")
LORA_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def draw_weights(module: nn.Module, seed: int) -> nn.Module:
  """Overwrites every parameter so that no path through the network is dead.

  Default initialisations are zero (adaLN, LoRA's B) or 0.02-sized, under which wrong
  code gives right numbers. Matrices: normal with std 1 / sqrt(fan_in), tables of
  embeddings 0.5, norm scales about 1, biases 0.1.
  """
  g = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for m in module.modules():
      for name, p in m.named_parameters(recurse=False):
        noise = torch.randn(p.shape, generator=g, dtype=torch.float32)
        if isinstance(m, nn.Embedding):
          value = 0.5 * noise
        elif p.ndim >= 2 and name == "weight":
          value = noise / p[0].numel() ** 0.5
        elif name == "weight":
          value = 1 + 0.1 * noise
        elif name == "bias":
          value = 0.1 * noise
        else:  # free parameters: queries, layer embeddings
          value = 0.5 * noise
        p.copy_(value)
  return module


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


# --- The backbone that both reward models share ---------------------------------


class Backbone(nn.Module):
  """The first `num_blocks` blocks of an SD3Transformer2DModel (shared, not copied)."""

  def __init__(self, transformer, num_blocks: int):
    super().__init__()
    self.pos_embed = transformer.pos_embed
    self.time_text_embed = transformer.time_text_embed
    self.context_embedder = transformer.context_embedder
    self.transformer_blocks = transformer.transformer_blocks[:num_blocks]

  def forward(self, latents, timesteps, context, pooled):
    """Returns temb (b d), and image and text tokens after 0..num_blocks blocks."""
    temb = self.time_text_embed(timesteps, pooled)
    image, text = [self.pos_embed(latents)], [self.context_embedder(context)]
    for block in self.transformer_blocks:
      c, x = block(image[-1], text[-1], temb)
      image.append(x)
      text.append(c)
    return temb, image, text


# --- DiNa-LRM -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DinaConfig:
  """`width=-1`: the backbone's; `lora_rank=0`: no adapters."""

  num_blocks: int = 2
  image_taps: tuple[int, ...] = (1, 2)
  text_taps: tuple[int, ...] = (1, 2)
  width: int = -1
  use_proj_in: bool = False
  num_queries: int = 4
  num_heads: int = 8
  lora_rank: int = 4
  lora_alpha: int = 8

  def release(self) -> dict:
    """The released config.json with these values."""
    return {
      "model": {
        "model_type": "thurstone",
        "num_transformer_layers": self.num_blocks,
        "freeze_backbone": False,
        "use_lora": self.lora_rank > 0,
        "use_text_features": True,
        "lora_config": {
          "r": self.lora_rank,
          "lora_alpha": self.lora_alpha,
          "init_lora_weights": "gaussian",
        },
        "use_logistic": False,
        "visual_head_idx": list(self.image_taps),
        "text_head_idx": list(self.text_taps),
        "use_t_embed": True,
        "reward_head": {
          "use_proj_in": self.use_proj_in,
          "width": self.width,
          "out_dim": 1,
          "num_queries": self.num_queries,
          "num_attn_heads": self.num_heads,
          "dropout": 0.0,
        },
      },
      "training": {"add_noise": True},
    }


def _mlp(d_in: int, d_hidden: int, d_out: int, act: nn.Module) -> nn.Sequential:
  return nn.Sequential(nn.Linear(d_in, d_hidden), act, nn.Linear(d_hidden, d_out))


class FilmAdapter(nn.Module):
  """One tap's tokens, modulated by temb and projected: (b n d) -> (b n out)."""

  def __init__(self, token_dim, temb_dim, width, out, use_proj_in):
    super().__init__()
    if use_proj_in or token_dim != width:
      self.proj_in = nn.Linear(token_dim, width)
    else:
      self.proj_in = nn.Identity()
    self.cond_mlp = _mlp(temb_dim, 2 * width, 2 * width, nn.SiLU())
    self.layer_embed = nn.Parameter(torch.zeros(1, 1, width))
    self.proj = nn.Linear(width, out)

  def forward(self, tokens, temb):
    gamma, beta = self.cond_mlp(temb)[:, None].chunk(2, dim=-1)
    return self.proj(self.proj_in(tokens) * (1 + gamma) + beta + self.layer_embed)


class CrossAttention(nn.Module):
  """Queries to image tokens and, in a softmax of its own, to text tokens."""

  def __init__(self, width, num_heads, *, with_text, gated):
    super().__init__()
    self.num_heads = num_heads
    self.norm_q = nn.RMSNorm(width)
    self.norm_v = nn.RMSNorm(width)
    self.to_q = nn.Linear(width, width)
    self.to_k_vis = nn.Linear(width, width)
    self.to_v_vis = nn.Linear(width, width)
    self.to_out = nn.Sequential(nn.Linear(width, width))
    self.gate_vis = _mlp(width, width, 1, nn.SiLU()) if gated else None
    if with_text:
      self.norm_t = nn.RMSNorm(width)
      self.to_k_text = nn.Linear(width, width)
      self.to_v_text = nn.Linear(width, width)
      self.gate_text = _mlp(width, width, 1, nn.SiLU()) if gated else None

  def _attend(self, q, tokens, to_k, to_v, gate):
    k, v = to_k(tokens), to_v(tokens)
    if gate is not None:
      v = v * torch.sigmoid(gate(tokens))
    q, k, v = (a.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for a in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

  def forward(self, queries, image, text=None):
    q = self.to_q(self.norm_q(queries))
    image = self.norm_v(image)
    y = self._attend(q, image, self.to_k_vis, self.to_v_vis, self.gate_vis)
    if text is not None:
      text = self.norm_t(text)
      y = y + self._attend(q, text, self.to_k_text, self.to_v_text, self.gate_text)
    return queries + self.to_out(y)


class QFormerHead(nn.Module):
  def __init__(self, config: DinaConfig, token_dim: int, temb_dim: int):
    super().__init__()
    w = token_dim if config.width == -1 else config.width
    adapter = (token_dim, temb_dim, w, w // 4, config.use_proj_in)
    self.query_tokens = nn.Parameter(torch.randn(1, config.num_queries, w))
    self.layer_adapters_visual = nn.ModuleList(
      FilmAdapter(*adapter) for _ in config.image_taps
    )
    self.layer_adapters_text = nn.ModuleList(
      FilmAdapter(*adapter) for _ in config.text_taps
    )
    self.agg_visual = nn.Linear(len(config.image_taps) * (w // 4), w)
    self.agg_text = nn.Linear(len(config.text_taps) * (w // 4), w)
    self.attn1 = CrossAttention(w, config.num_heads, with_text=True, gated=True)
    self.attn2 = CrossAttention(w, config.num_heads, with_text=False, gated=False)
    self.norm_ff = nn.RMSNorm(w)
    self.ff = _mlp(w, 4 * w, w, nn.GELU())
    self.head = nn.Linear(w, 1)

  def tokens(self, temb, image, text):
    """Adapted tokens of one noise level: image (b n w), text (b l w)."""
    adapted = [
      agg(torch.cat([a(x, temb) for a, x in zip(adapters, taps, strict=True)], -1))
      for agg, adapters, taps in (
        (self.agg_visual, self.layer_adapters_visual, image),
        (self.agg_text, self.layer_adapters_text, text),
      )
    ]
    return adapted[0], adapted[1]

  def score(self, image, text):
    """(b, 1), the mean over queries."""
    x = self.query_tokens.expand(image.shape[0], -1, -1)
    x = self.attn1(x, image, text)
    x = self.attn2(x, image)
    x = x + self.ff(self.norm_ff(x))
    return self.head(x).mean(dim=1)


class DinaReward(nn.Module):
  """DiNa-LRM: `model(noisy_latents, timesteps, context, pooled) -> (b, 1)`.

  Attributes `backbone` (wrapped by PEFT where `lora_rank` > 0) and `reward_head`.
  PEFT adds its adapters to the blocks of `transformer` in place: give it a fresh one.
  """

  def __init__(self, transformer, config: DinaConfig, *, seed: int = 0):
    super().__init__()
    self.config = config
    self.backbone = Backbone(transformer, config.num_blocks)
    if config.lora_rank:
      last = config.num_blocks - 1
      # Where nothing reads the last block's text tokens, its text side has no adapter.
      unused = config.num_blocks not in config.text_taps
      names = [f"transformer_blocks.{last}.attn.{n}" for n in LORA_TEXT]
      self.backbone = peft.get_peft_model(
        self.backbone,
        peft.LoraConfig(
          r=config.lora_rank,
          lora_alpha=config.lora_alpha,
          init_lora_weights="gaussian",
          target_modules=[*LORA_IMAGE, *LORA_TEXT],
          exclude_modules=names if unused else None,
        ),
      )
      for i, (name, p) in enumerate(sorted(self.backbone.named_parameters())):
        if "lora_" in name:
          g = torch.Generator().manual_seed(1000 * seed + i)
          std = 1 / config.lora_rank if "lora_A" in name else 0.1
          p.data = std * torch.randn(p.shape, generator=g)
    temb_dim = transformer.config.caption_projection_dim
    self.reward_head = QFormerHead(config, temb_dim, temb_dim)
    draw_weights(self.reward_head, seed)
    self.eval()

  def features(self, latents, timesteps, context, pooled):
    """temb, and the tapped image and text tokens: what the head receives."""
    temb, image, text = self.backbone(latents, timesteps, context, pooled)
    image = [image[i] for i in self.config.image_taps]
    return temb, image, [text[i] for i in self.config.text_taps]

  def forward(self, latents, timesteps, context, pooled):
    return self.ensemble([latents], [timesteps], context, pooled)

  def ensemble(self, latents, timesteps, context, pooled):
    """One score from one noisy latent and timestep per noise level."""
    levels = [
      self.reward_head.tokens(*self.features(x, t, context, pooled))
      for x, t in zip(latents, timesteps, strict=True)
    ]
    image, text = (torch.cat(tokens, dim=1) for tokens in zip(*levels, strict=True))
    return self.reward_head.score(image, text)


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


def read_dina_release(path: str | os.PathLike, transformer) -> DinaReward:
  """The inverse of `write_dina_release`; also reads the goldens."""
  path = pathlib.Path(path)
  c = json.loads((path / "config.json").read_text())["model"]
  config = DinaConfig(
    num_blocks=c["num_transformer_layers"],
    image_taps=tuple(c["visual_head_idx"]),
    text_taps=tuple(c["text_head_idx"]),
    width=c["reward_head"]["width"],
    use_proj_in=c["reward_head"]["use_proj_in"],
    num_queries=c["reward_head"]["num_queries"],
    num_heads=c["reward_head"]["num_attn_heads"],
    lora_rank=c["lora_config"]["r"] if c["use_lora"] else 0,
    lora_alpha=c["lora_config"]["lora_alpha"],
  )
  model = DinaReward(transformer, config)
  checkpoint = path / "checkpoint"
  if config.lora_rank:
    lora = safetensors.torch.load_file(
      checkpoint / "backbone_lora" / "adapter_model.safetensors"
    )
    wanted = set(peft.get_peft_model_state_dict(model.backbone))
    if set(lora) != wanted:
      raise ValueError(f"adapter keys differ: {sorted(set(lora) ^ wanted)}")
    peft.set_peft_model_state_dict(model.backbone, lora)
  head = torch.load(checkpoint / "rm_head.pt", weights_only=True)
  model.reward_head.load_state_dict(head)
  return model


# --- DRM ------------------------------------------------------------------------


class ConvHead(nn.Module):
  def __init__(self, base: int, num_groups: int):
    super().__init__()

    def down(d_in, d_out):
      conv = nn.Conv2d(d_in, d_out, 3, stride=2, padding=1)
      return nn.Sequential(conv, nn.GroupNorm(num_groups, d_out), nn.ReLU())

    self.down1 = down(16, base)
    self.down2 = down(base, 2 * base)
    self.down3 = down(2 * base, 2 * base)
    self.mlp = nn.Sequential(
      nn.Linear(2 * base, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 1)
    )

  def forward(self, x):
    x = self.down3(self.down2(self.down1(x)))
    return self.mlp(x.mean(dim=(2, 3)))


class DrmReward(nn.Module):
  """DRM: `model(noisy_latents, timesteps, context, pooled) -> (b, 1)`.

  `transformer` stays whole (the released files hold all of it); the last
  `skip_last_blocks` of its blocks are passed over.
  """

  def __init__(
    self,
    transformer,
    *,
    skip_last_blocks: int,
    base_channels: int = 32,
    num_groups: int = 32,
    seed: int = 0,
  ):
    super().__init__()
    self.skip_last_blocks = skip_last_blocks
    self.transformer = transformer
    self.reward_output = ConvHead(base_channels, num_groups)
    draw_weights(self.reward_output, seed)
    self.eval()

  def features(self, latents, timesteps, context, pooled):
    """The head's input (b, 16, H, W)."""
    t = self.transformer
    kept = len(t.transformer_blocks) - self.skip_last_blocks
    temb, image, _ = Backbone(t, kept)(latents, timesteps, context, pooled)
    y = t.proj_out(t.norm_out(image[-1], temb))
    p, h, w = 2, latents.shape[2] // 2, latents.shape[3] // 2
    y = y.unflatten(1, (h, w)).unflatten(-1, (p, p, -1))  # b h w p q c
    return y.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)

  def forward(self, latents, timesteps, context, pooled):
    return self.reward_output(self.features(latents, timesteps, context, pooled))


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
