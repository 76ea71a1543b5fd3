"""Where the weights of a CLIP text encoder go (config: models.clip.CLIPTextConfig)."""

from lrm_jax.keymaps.engine import LINEAR, Ignore, Keymap, Rule

_LOSS = "belongs to the contrastive loss"


def transformers(config) -> Keymap:
  """Names of transformers' `CLIPTextModelWithProjection`."""
  return _keymap(config, under="", prefix="")


def stability(config, encoder: str) -> Keymap:
  """The single files of SD3.5 "incl. clips"; `encoder` is "clip_l" or "clip_g".

  Such a file may lack CLIP-L's projection, which then is the identity: build the
  model with `projection_dim=None`.
  """
  if encoder not in ("clip_l", "clip_g"):
    raise ValueError(f"encoder={encoder!r} is neither 'clip_l' nor 'clip_g'")
  return _keymap(config, under=r"transformer\.", prefix=f"text_encoders.{encoder}.")


def _keymap(config, *, under: str, prefix: str) -> Keymap:
  model = under + r"text_model\."
  block = model + r"encoder\.layers\.(\d+)\."
  rules = [
    Rule(model + r"embeddings\.token_embedding\.weight", "token_embedding"),
    Rule(model + r"embeddings\.position_embedding\.weight", "position_embedding"),
    *_norm(block + "layer_norm1", "blocks[{0}]/attn_norm"),
    *_linear(block + r"self_attn\.out_proj", "blocks[{0}]/out"),
    *_norm(block + "layer_norm2", "blocks[{0}]/mlp_norm"),
    *_linear(block + r"mlp\.fc1", "blocks[{0}]/mlp/up"),
    *_linear(block + r"mlp\.fc2", "blocks[{0}]/mlp/down"),
    *_norm(model + "final_layer_norm", "norm"),
    Rule(under + r"text_projection\.weight", "projection/kernel", LINEAR),
  ]
  for i, name in enumerate("qkv"):
    rules += _linear(block + rf"self_attn\.{name}_proj", "blocks[{0}]/qkv", part=(i, 3))
  # The single files keep logit_scale beside the transformer, some older saves in it.
  ignores = [
    Ignore(model + r"embeddings\.position_ids", "a buffer: 0, 1, 2, ..."),
    *(Ignore(where + "logit_scale", _LOSS) for where in sorted({under, ""})),
  ]
  return Keymap(
    rules=tuple(rules),
    ignores=tuple(ignores),
    stacks={"blocks": (config.num_layers,)},
    prefix=prefix,
  )


def _norm(pattern: str, path: str) -> list[Rule]:
  return [
    Rule(pattern + r"\.weight", path + "/scale"),
    Rule(pattern + r"\.bias", path + "/bias"),
  ]


def _linear(pattern: str, path: str, part: tuple[int, int] = (0, 1)) -> list[Rule]:
  return [
    Rule(pattern + r"\.weight", path + "/kernel", LINEAR, part),
    Rule(pattern + r"\.bias", path + "/bias", part=part),
  ]
