"""Keymap of PEFT adapters on the MMDiT's attentions (DiNa-LRM, diffusers)."""

from collections.abc import Iterable
import re
from typing import Any

from lrm_jax.keymaps.engine import LINEAR, Keymap, Rule

# torch module inside a block -> (our layer, which of its fused projections)
MODULES: dict[str, tuple[str, tuple[int, int]]] = {
  "attn.to_q": ("attn/qkv", (0, 3)),
  "attn.to_k": ("attn/qkv", (1, 3)),
  "attn.to_v": ("attn/qkv", (2, 3)),
  "attn.to_out.0": ("attn/out", (0, 1)),
  "attn.add_q_proj": ("attn/context_qkv", (0, 3)),
  "attn.add_k_proj": ("attn/context_qkv", (1, 3)),
  "attn.add_v_proj": ("attn/context_qkv", (2, 3)),
  "attn.to_add_out": ("attn/context_out", (0, 1)),
  "attn2.to_q": ("attn2/qkv", (0, 3)),
  "attn2.to_k": ("attn2/qkv", (1, 3)),
  "attn2.to_v": ("attn2/qkv", (2, 3)),
  "attn2.to_out.0": ("attn2/out", (0, 1)),
}


def named_by(module: str, names: Iterable[str]) -> bool:
  """PEFT's rule: a name means the module itself or any that ends in `.name`."""
  return any(module == n or module.endswith(f".{n}") for n in names)


def modules(config: Any, targets: Iterable[str], exclude: Iterable[str]) -> list[str]:
  """Full torch names of the adapted modules of an `MMDiTConfig`'s blocks."""
  names = []
  for i in range(config.num_layers):
    pre_only = config.last_context_pre_only and i == config.num_layers - 1
    for module in MODULES:
      if module.startswith("attn2.") and i not in config.dual_layers:
        continue
      if module == "attn.to_add_out" and pre_only:
        continue
      name = f"transformer_blocks.{i}.{module}"
      if named_by(name, targets) and not named_by(name, exclude):
        names.append(name)
  return names


def targets_of(torch_modules: Iterable[str]) -> tuple[str, ...]:
  """Our LoRA target patterns that hold these torch modules."""
  paths = {
    MODULES[m][0] for m in MODULES if any(t.endswith("." + m) for t in torch_modules)
  }
  return tuple(sorted(paths))


def peft_names(config: Any, adapters: Any) -> tuple[list[str], list[str]]:
  """PEFT's (target_modules, exclude_modules) for a `LoRAConfig` of ours.

  The inverse of `targets_of` for adapters that PEFT can name: the modules that some
  target pattern hits, less the last block's text side where that has none.
  """
  hit = {
    module
    for module, (path, _) in MODULES.items()
    if any(re.search(rf"(^|/)(?:{t})$", f"blocks/{path}") for t in adapters.targets)
  }
  suffixes = {m.split(".", 1)[1] for m in hit}
  everything = modules(config, suffixes, ())
  last = f"transformer_blocks.{config.num_layers - 1}."
  exclude = [
    name
    for name in everything
    if name.split(".", 2)[2] not in hit
    or (not adapters.last_context and name.startswith(last) and "add_" in name)
  ]
  return sorted(suffixes), sorted(exclude)


def peft(
  config: Any,
  targets: Iterable[str],
  exclude: Iterable[str] = (),
  *,
  prefix: str = "base_model.model.",
) -> Keymap:
  """PEFT's adapter state dict on a diffusers SD3 transformer.

  Args:
    config: the `MMDiTConfig` of the adapted model.
    targets, exclude: PEFT's `target_modules` and `exclude_modules`.
    prefix: `base_model.model.` in PEFT's own files, `transformer.` in the files of
      diffusers' `load_lora_weights`.
  """
  rules = []
  for module, (path, part) in MODULES.items():
    torch = rf"transformer_blocks\.(\d+)\.{re.escape(module)}"
    ours = f"blocks[{{0}}]/{path}"
    rules += [
      Rule(rf"{torch}\.lora_A\.weight", f"{ours}/lora_a", LINEAR, part),
      Rule(rf"{torch}\.lora_B\.weight", f"{ours}/lora_b", LINEAR, part),
    ]
  everything = modules(config, [m.split(".", 1)[1] for m in MODULES], ())
  kept = set(modules(config, targets, exclude))
  zeros = tuple(
    rf"{re.escape(m)}\.lora_[AB]\.weight" for m in everything if m not in kept
  )
  return Keymap(
    tuple(rules), stacks={"blocks": config.segments}, prefix=prefix, zeros=zeros
  )
