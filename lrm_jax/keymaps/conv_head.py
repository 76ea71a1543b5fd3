"""Keymap of DRM's reward head (`reward_output.*`)."""

from lrm_jax.keymaps.engine import CONV, LINEAR, Keymap, Rule


def drm(prefix: str = "reward_output.") -> Keymap:
  """The head inside a DRM checkpoint."""
  rules = []
  for i in range(3):
    torch, ours = f"down{i + 1}", f"down/{i}"
    rules += [
      Rule(rf"{torch}\.0\.weight", f"{ours}/conv/kernel", CONV),
      Rule(rf"{torch}\.0\.bias", f"{ours}/conv/bias"),
      Rule(rf"{torch}\.1\.weight", f"{ours}/norm/scale"),
      Rule(rf"{torch}\.1\.bias", f"{ours}/norm/bias"),
    ]
  for torch, ours in ((r"mlp\.0", "up"), (r"mlp\.3", "out")):
    rules += [
      Rule(rf"{torch}\.weight", f"{ours}/kernel", LINEAR),
      Rule(rf"{torch}\.bias", f"{ours}/bias"),
    ]
  return Keymap(tuple(rules), prefix=prefix)
