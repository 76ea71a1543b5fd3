"""Keymap of DiNa-LRM's reward head (`rm_head.pt`)."""

from typing import Any

from lrm_jax.keymaps.engine import LINEAR, Keymap, Rule, Transform

_VECTOR = Transform(lambda a: a[0, 0], lambda a: a[None, None])  # (1, 1, d) <-> (d,)
_ROWS = Transform(lambda a: a[0], lambda a: a[None])  # (1, q, d) <-> (q, d)


def _dense(torch: str, path: str) -> list[Rule]:
  return [
    Rule(rf"{torch}\.weight", f"{path}/kernel", LINEAR),
    Rule(rf"{torch}\.bias", f"{path}/bias"),
  ]


def dina(prefix: str = "") -> Keymap:
  """RewardHead's state dict. Rows without a counterpart in a given head are unused."""
  rules = [Rule("query_tokens", "queries", _ROWS)]
  for torch, ours in (("visual", "image"), ("text", "text")):
    tap = rf"layer_adapters_{torch}\.(\d+)"
    path = f"{ours}_taps/{{0}}"
    rules += [
      *_dense(rf"{tap}\.proj_in", f"{path}/project_in"),
      Rule(rf"{tap}\.layer_embed", f"{path}/layer_embed", _VECTOR),
      *_dense(rf"{tap}\.cond_mlp\.0", f"{path}/modulation/up"),
      *_dense(rf"{tap}\.cond_mlp\.2", f"{path}/modulation/down"),
      *_dense(rf"{tap}\.proj", f"{path}/out"),
      *_dense(f"agg_{torch}", f"{ours}_merge"),
    ]
  for attn in ("attn1", "attn2"):
    rules += [
      Rule(rf"{attn}\.norm_q\.weight", f"{attn}/q_norm/scale"),
      *_dense(rf"{attn}\.to_q", f"{attn}/q"),
      *_dense(rf"{attn}\.to_out\.0", f"{attn}/out"),
    ]
    for torch, ours, norm in (("vis", "image", "norm_v"), ("text", "text", "norm_t")):
      rules += [
        Rule(rf"{attn}\.{norm}\.weight", f"{attn}/{ours}/norm/scale"),
        *_dense(rf"{attn}\.to_k_{torch}", f"{attn}/{ours}/k"),
        *_dense(rf"{attn}\.to_v_{torch}", f"{attn}/{ours}/v"),
        *_dense(rf"{attn}\.gate_{torch}\.0", f"{attn}/{ours}/gate/up"),
        *_dense(rf"{attn}\.gate_{torch}\.2", f"{attn}/{ours}/gate/down"),
      ]
  rules += [
    Rule(r"norm_ff\.weight", "mlp_norm/scale"),
    *_dense(r"ff\.0", "mlp/up"),
    *_dense(r"ff\.2", "mlp/down"),
    *_dense("head", "out"),
  ]
  return Keymap(tuple(rules), prefix=prefix)


def config_kwargs(model: dict[str, Any], token_dim: int) -> dict[str, Any]:
  """QFormerHeadConfig's fields from a DiNa-LRM release's `config.json["model"]`.

  Raises:
    ValueError: a setting the head does not have.
    KeyError: a setting is missing.
  """
  head = dict(model["reward_head"])
  out_dim = head.pop("out_dim")
  if out_dim != 1:
    raise ValueError(f"reward_head.out_dim={out_dim}: only scalar rewards (1)")
  width = head.pop("width")
  kwargs = dict(
    token_dim=token_dim,
    width=token_dim if width == -1 else width,
    num_image_taps=len(model["visual_head_idx"]),
    num_text_taps=len(model["text_head_idx"]),
    num_queries=head.pop("num_queries"),
    num_heads=head.pop("num_attn_heads"),
    project_in=head.pop("use_proj_in"),
    dropout=head.pop("dropout"),
  )
  if head:
    raise ValueError(f"unknown reward_head settings {head}")
  return kwargs
