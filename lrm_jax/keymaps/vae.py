"""Where the weights of SD3's autoencoder go (config: models.vae.VAEConfig)."""

from lrm_jax.keymaps.engine import CONV, CONV_1X1, LINEAR, Keymap, Rule, Transform


def diffusers(config) -> Keymap:
  """Names of diffusers' `AutoencoderKL`."""
  del config  # this layout numbers its levels as the model does
  rules: list[Rule] = []
  for half, side, sample in (
    ("encoder", "down", r"downsamplers\.0\.conv"),
    ("decoder", "up", r"upsamplers\.0\.conv"),
  ):
    level = rf"{half}\.{side}_blocks\.(\d+)\."
    mid = rf"{half}\.mid_block\."
    attn = mid + r"attentions\.0\."
    rules += [
      *_conv(rf"{half}\.conv_in", f"{half}/conv_in"),
      *_resnet(
        level + r"resnets\.(\d+)\.", half + "/levels/{0}/resnets/{1}", "conv_shortcut"
      ),
      *_conv(level + sample, half + "/levels/{0}/resample"),
      *_resnet(mid + r"resnets\.(\d+)\.", half + "/mid/resnets/{0}", None),
      *_norm(attn + "group_norm", f"{half}/mid/attn/norm"),
      *_linear(attn + r"to_out\.0", f"{half}/mid/attn/out", LINEAR),
      *_norm(rf"{half}\.conv_norm_out", f"{half}/norm_out"),
      *_conv(rf"{half}\.conv_out", f"{half}/conv_out"),
    ]
    for i, name in enumerate("qkv"):
      rules += _linear(attn + f"to_{name}", f"{half}/mid/attn/qkv", LINEAR, (i, 3))
  return Keymap(tuple(rules))


def stability(config) -> Keymap:
  """The single files of SD3.5 (names of latent-diffusion's autoencoder).

  Their decoder counts its levels from the finest, ours from the coarsest; their
  attention projections are 1x1 convolutions.
  """
  rules: list[Rule] = []
  num = len(config.block_out_channels)
  for half, side, sample in (
    ("encoder", "down", r"downsample\.conv"),
    ("decoder", "up", r"upsample\.conv"),
  ):
    mid = rf"{half}\.mid\."
    attn = mid + r"attn_1\."
    rules += [
      *_conv(rf"{half}\.conv_in", f"{half}/conv_in"),
      *_resnet(mid + r"block_1\.", f"{half}/mid/resnets/0", None),
      *_norm(attn + "norm", f"{half}/mid/attn/norm"),
      *_linear(attn + "proj_out", f"{half}/mid/attn/out", CONV_1X1),
      *_resnet(mid + r"block_2\.", f"{half}/mid/resnets/1", None),
      *_norm(rf"{half}\.norm_out", f"{half}/norm_out"),
      *_conv(rf"{half}\.conv_out", f"{half}/conv_out"),
    ]
    for i, name in enumerate("qkv"):
      rules += _linear(attn + name, f"{half}/mid/attn/qkv", CONV_1X1, (i, 3))
    for i in range(num):
      level = rf"{half}\.{side}\.{i}\."
      path = f"{half}/levels/{i if half == 'encoder' else num - 1 - i}"
      rules += _resnet(level + r"block\.(\d+)\.", path + "/resnets/{0}", "nin_shortcut")
      rules += _conv(level + sample, path + "/resample")
  return Keymap(tuple(rules), prefix="first_stage_model.")


def _resnet(pattern: str, path: str, shortcut: str | None) -> list[Rule]:
  rules = [
    *_norm(pattern + "norm1", path + "/norm1"),
    *_conv(pattern + "conv1", path + "/conv1"),
    *_norm(pattern + "norm2", path + "/norm2"),
    *_conv(pattern + "conv2", path + "/conv2"),
  ]
  if shortcut is not None:
    rules += _linear(pattern + shortcut, path + "/shortcut", CONV_1X1)
  return rules


def _norm(pattern: str, path: str) -> list[Rule]:
  return [
    Rule(pattern + r"\.weight", path + "/scale"),
    Rule(pattern + r"\.bias", path + "/bias"),
  ]


def _conv(pattern: str, path: str) -> list[Rule]:
  return [
    Rule(pattern + r"\.weight", path + "/kernel", CONV),
    Rule(pattern + r"\.bias", path + "/bias"),
  ]


def _linear(
  pattern: str, path: str, transform: Transform, part: tuple[int, int] = (0, 1)
) -> list[Rule]:
  return [
    Rule(pattern + r"\.weight", path + "/kernel", transform, part),
    Rule(pattern + r"\.bias", path + "/bias", part=part),
  ]
