"""DiNa-LRM and DRM in PyTorch, to compare with.

Written from the papers and from the key names of the released files, and held against
golden vectors by the tests; `torch_to_flax.py --verify` and the parity tests use them
as the other side. Slow and plain on purpose; needs the `convert` extra.

Tensors are NCHW, as PyTorch has them. Axes: b batch, n tokens, q queries, d width.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

import peft
import safetensors.torch
import torch
from torch import nn

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
  """`width=-1`: the backbone's; `lora_rank=0`: no adapters.

  `logistic_eta`: (eta3, eta4) of the squashing to (-2, 2), None for none.
  """

  num_blocks: int = 2
  image_taps: tuple[int, ...] = (1, 2)
  text_taps: tuple[int, ...] = (1, 2)
  width: int = -1
  use_proj_in: bool = False
  num_queries: int = 4
  num_heads: int = 8
  lora_rank: int = 4
  lora_alpha: int = 8
  logistic_eta: tuple[float, float] | None = None

  @classmethod
  def from_release(cls, release: Mapping[str, Any]) -> "DinaConfig":
    """From a released config.json."""
    c = release["model"]
    adapted = c["use_lora"] and not c["freeze_backbone"]
    squashed = c.get("use_logistic", False)
    return cls(
      num_blocks=c["num_transformer_layers"],
      image_taps=tuple(c["visual_head_idx"]),
      text_taps=tuple(c["text_head_idx"]),
      width=c["reward_head"]["width"],
      use_proj_in=c["reward_head"]["use_proj_in"],
      num_queries=c["reward_head"]["num_queries"],
      num_heads=c["reward_head"]["num_attn_heads"],
      lora_rank=c["lora_config"]["r"] if adapted else 0,
      lora_alpha=c["lora_config"]["lora_alpha"] if adapted else 0,
      logistic_eta=tuple(c.get("logistic_eta", (0.0, 0.15))) if squashed else None,
    )

  def release(self) -> dict:
    """The released config.json with these values."""
    return {
      "model": {
        "model_type": "thurstone",
        "num_transformer_layers": self.num_blocks,
        "freeze_backbone": self.lora_rank == 0,
        "use_lora": self.lora_rank > 0,
        "use_text_features": True,
        "lora_config": {
          "r": self.lora_rank,
          "lora_alpha": self.lora_alpha,
          "init_lora_weights": "gaussian",
        },
        "use_logistic": self.logistic_eta is not None,
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
  The adapters are PEFT's own reading of the folder `adapter`, or random without one.
  """

  def __init__(
    self,
    transformer,
    config: DinaConfig,
    *,
    seed: int = 0,
    adapter: str | os.PathLike | None = None,
  ):
    super().__init__()
    self.config = config
    self.backbone = Backbone(transformer, config.num_blocks)
    if config.lora_rank and adapter is not None:
      self.backbone = peft.PeftModel.from_pretrained(
        self.backbone, os.fspath(adapter), is_trainable=True
      )
    elif config.lora_rank:
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
    score = self.reward_head.score(image, text)
    if self.config.logistic_eta is None:
      return score
    eta3, eta4 = self.config.logistic_eta
    return 4 / (1 + torch.exp(-(score - eta3) / (abs(eta4) + 1e-6))) - 2


def read_dina_release(path: str | os.PathLike, transformer) -> DinaReward:
  """A release folder (config.json, checkpoint/) on a fresh full `transformer`.

  Raises:
    ValueError: the adapter's keys are not those that its config asks for.
  """
  path = pathlib.Path(path)
  config = DinaConfig.from_release(json.loads((path / "config.json").read_text()))
  checkpoint = path / "checkpoint"
  adapter = checkpoint / "backbone_lora"
  model = DinaReward(transformer, config, adapter=adapter)
  if config.lora_rank:  # PEFT only warns of keys that do not fit
    found = set(safetensors.torch.load_file(adapter / "adapter_model.safetensors"))
    wanted = set(peft.get_peft_model_state_dict(model.backbone))
    if found != wanted:
      raise ValueError(f"adapter keys differ: {sorted(found ^ wanted)}")
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
