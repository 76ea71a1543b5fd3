"""Where the weights of a T5 v1.1 encoder go (config: models.t5.T5Config)."""

from lrm_jax.keymaps.engine import LINEAR, Ignore, Keymap, Rule

_DUPLICATE = "the same tensor as shared.weight"


def transformers(config) -> Keymap:
  """Names of transformers' `T5EncoderModel`."""
  return _keymap(config, under="", ignores=(), prefix="")


def stability(config) -> Keymap:
  """The single files of SD3.5 that include T5-XXL."""
  return _keymap(
    config,
    under=r"transformer\.",
    ignores=(Ignore("logit_scale", "a leftover of the CLIP wrapper, unused"),),
    prefix="text_encoders.t5xxl.",
  )


def _keymap(config, *, under: str, ignores: tuple[Ignore, ...], prefix: str) -> Keymap:
  block = under + r"encoder\.block\.(\d+)\.layer\."
  attn, mlp = block + r"0\.SelfAttention\.", block + r"1\.DenseReluDense\."
  rules = [
    Rule(under + r"shared\.weight", "token_embedding"),
    # Every torch block could own a bias; only the first does, for all of them.
    Rule(
      under
      + r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
      "position_bias",
    ),
    Rule(block + r"0\.layer_norm\.weight", "blocks[{0}]/attn_norm/scale"),
    Rule(attn + r"o\.weight", "blocks[{0}]/out/kernel", LINEAR),
    Rule(block + r"1\.layer_norm\.weight", "blocks[{0}]/mlp_norm/scale"),
    Rule(mlp + r"wi_0\.weight", "blocks[{0}]/gate/kernel", LINEAR),
    Rule(mlp + r"wi_1\.weight", "blocks[{0}]/up/kernel", LINEAR),
    Rule(mlp + r"wo\.weight", "blocks[{0}]/down/kernel", LINEAR),
    Rule(under + r"encoder\.final_layer_norm\.weight", "norm/scale"),
  ]
  for i, name in enumerate("qkv"):
    path = "blocks[{0}]/qkv/kernel"
    rules.append(Rule(attn + rf"{name}\.weight", path, LINEAR, (i, 3)))
  return Keymap(
    rules=tuple(rules),
    ignores=(Ignore(under + r"encoder\.embed_tokens\.weight", _DUPLICATE), *ignores),
    stacks={"blocks": (config.num_layers,)},
    prefix=prefix,
  )
