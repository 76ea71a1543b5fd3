"""Keymaps of the MMDiT: diffusers' layout and Stability's single-file layout."""

from typing import Any

import numpy as np

from lrm_jax.keymaps.engine import (
  LINEAR,
  SAME,
  ConversionError,
  Keymap,
  Rule,
  Transform,
)


def _dense(torch: str, path: str, part: tuple[int, int] = (0, 1)) -> list[Rule]:
  return [
    Rule(rf"{torch}\.weight", f"{path}/kernel", LINEAR, part),
    Rule(rf"{torch}\.bias", f"{path}/bias", SAME, part),
  ]


def _qkv(names: tuple[str, str, str], path: str) -> list[Rule]:
  return [r for i, name in enumerate(names) for r in _dense(name, path, part=(i, 3))]


def _norm(torch: str, path: str) -> list[Rule]:
  return [Rule(rf"{torch}\.weight", f"{path}/scale")]


def _patch_embed(config: Any) -> Transform:
  """(d, C, p, p) convolution <-> (p*p*C, d) kernel on patches (row, column, C)."""
  p, ch = config.patch_size, config.in_channels
  return Transform(
    lambda a: a.transpose(2, 3, 1, 0).reshape(p * p * ch, -1),
    lambda a: a.reshape(p, p, ch, -1).transpose(3, 2, 0, 1),
  )


def _table_to_factors(table: np.ndarray) -> np.ndarray:
  """(1, size*size, d) position table -> its factors (2, size, d/2): columns, rows.

  The 906 MB table of SD3.5-Medium is separable, so 2.4 MB hold it exactly.
  """
  _, n, d = table.shape
  size = round(n**0.5)
  grid = table.reshape(size, size, d)
  cols, rows = grid[0, :, : d // 2], grid[:, 0, d // 2 :]
  for i in range(size):  # row by row: no second copy of the table in memory
    same_cols = np.array_equal(grid[i, :, : d // 2], cols)
    if not same_cols or not np.array_equal(
      grid[i, :, d // 2 :], np.broadcast_to(rows[i], (size, d - d // 2))
    ):
      raise ConversionError(
        f"position table of shape {table.shape} is not a 2-D sincos table: row {i} "
        "does not separate into a column part and a row part"
      )
  return np.stack([cols, rows])


def _factors_to_table(factors: np.ndarray) -> np.ndarray:
  _, size, half = factors.shape
  cols = np.broadcast_to(factors[0][None], (size, size, half))
  rows = np.broadcast_to(factors[1][:, None], (size, size, half))
  return np.concatenate([cols, rows], axis=-1).reshape(1, size * size, 2 * half)


POS_TABLE = Transform(
  _table_to_factors,
  _factors_to_table,
  shape=lambda shape: (1, shape[1] * shape[1], 2 * shape[2]),
)

# AdaLayerNormContinuous holds (scale, shift); Stability's files (shift, scale).
SWAP_HALVES = Transform(
  lambda a: np.concatenate(np.split(a, 2)[::-1]),
  lambda a: np.concatenate(np.split(a, 2)[::-1]),
)
SWAP_HALVES_LINEAR = Transform(
  lambda a: np.concatenate(np.split(a, 2)[::-1]).T,
  lambda a: np.concatenate(np.split(a.T, 2)[::-1]),
)


def _stacks(config: Any) -> dict[str, tuple[int, ...]]:
  return {"blocks": config.segments}


def diffusers(config: Any, prefix: str = "") -> Keymap:
  """SD3Transformer2DModel's state dict, for an `MMDiTConfig`."""
  block = r"transformer_blocks\.(\d+)"
  ours = "blocks[{0}]"
  rules = [
    Rule(r"pos_embed\.proj\.weight", "patch_embed/kernel", _patch_embed(config)),
    Rule(r"pos_embed\.proj\.bias", "patch_embed/bias"),
    Rule(r"pos_embed\.pos_embed", "pos_embed", POS_TABLE),
    *_dense(r"time_text_embed\.timestep_embedder\.linear_1", "time_embed/up"),
    *_dense(r"time_text_embed\.timestep_embedder\.linear_2", "time_embed/down"),
    *_dense(r"time_text_embed\.text_embedder\.linear_1", "text_embed/up"),
    *_dense(r"time_text_embed\.text_embedder\.linear_2", "text_embed/down"),
    *_dense("context_embedder", "context_embed"),
    *_dense(rf"{block}\.norm1\.linear", f"{ours}/modulation"),
    *_dense(rf"{block}\.norm1_context\.linear", f"{ours}/context_modulation"),
    *_qkv(
      tuple(rf"{block}\.attn\.to_{n}" for n in "qkv"),
      f"{ours}/attn/qkv",
    ),
    *_qkv(
      tuple(rf"{block}\.attn\.add_{n}_proj" for n in "qkv"),
      f"{ours}/attn/context_qkv",
    ),
    *_dense(rf"{block}\.attn\.to_out\.0", f"{ours}/attn/out"),
    *_dense(rf"{block}\.attn\.to_add_out", f"{ours}/attn/context_out"),
    *_norm(rf"{block}\.attn\.norm_q", f"{ours}/attn/q_norm"),
    *_norm(rf"{block}\.attn\.norm_k", f"{ours}/attn/k_norm"),
    *_norm(rf"{block}\.attn\.norm_added_q", f"{ours}/attn/context_q_norm"),
    *_norm(rf"{block}\.attn\.norm_added_k", f"{ours}/attn/context_k_norm"),
    *_qkv(
      tuple(rf"{block}\.attn2\.to_{n}" for n in "qkv"),
      f"{ours}/attn2/qkv",
    ),
    *_dense(rf"{block}\.attn2\.to_out\.0", f"{ours}/attn2/out"),
    *_norm(rf"{block}\.attn2\.norm_q", f"{ours}/attn2/q_norm"),
    *_norm(rf"{block}\.attn2\.norm_k", f"{ours}/attn2/k_norm"),
    *_dense(rf"{block}\.ff\.net\.0\.proj", f"{ours}/mlp/up"),
    *_dense(rf"{block}\.ff\.net\.2", f"{ours}/mlp/down"),
    *_dense(rf"{block}\.ff_context\.net\.0\.proj", f"{ours}/context_mlp/up"),
    *_dense(rf"{block}\.ff_context\.net\.2", f"{ours}/context_mlp/down"),
    *_dense(r"norm_out\.linear", "out_modulation"),
    *_dense("proj_out", "out"),
  ]
  return Keymap(tuple(rules), stacks=_stacks(config), prefix=prefix)


def stability(config: Any, prefix: str = "model.diffusion_model.") -> Keymap:
  """The transformer inside Stability's single-file SD3.5 checkpoints."""
  block = r"joint_blocks\.(\d+)"
  ours = "blocks[{0}]"
  last = config.num_layers - 1
  rules = [
    Rule(r"x_embedder\.proj\.weight", "patch_embed/kernel", _patch_embed(config)),
    Rule(r"x_embedder\.proj\.bias", "patch_embed/bias"),
    Rule("pos_embed", "pos_embed", POS_TABLE),
    *_dense(r"t_embedder\.mlp\.0", "time_embed/up"),
    *_dense(r"t_embedder\.mlp\.2", "time_embed/down"),
    *_dense(r"y_embedder\.mlp\.0", "text_embed/up"),
    *_dense(r"y_embedder\.mlp\.2", "text_embed/down"),
    *_dense("context_embedder", "context_embed"),
    *_dense(rf"{block}\.x_block\.adaLN_modulation\.1", f"{ours}/modulation"),
    Rule(
      r"final_layer\.adaLN_modulation\.1\.weight",
      "out_modulation/kernel",
      SWAP_HALVES_LINEAR,
    ),
    Rule(r"final_layer\.adaLN_modulation\.1\.bias", "out_modulation/bias", SWAP_HALVES),
    *_dense(r"final_layer\.linear", "out"),
    *_dense(rf"{block}\.x_block\.mlp\.fc1", f"{ours}/mlp/up"),
    *_dense(rf"{block}\.x_block\.mlp\.fc2", f"{ours}/mlp/down"),
    *_dense(rf"{block}\.context_block\.mlp\.fc1", f"{ours}/context_mlp/up"),
    *_dense(rf"{block}\.context_block\.mlp\.fc2", f"{ours}/context_mlp/down"),
  ]
  for stream, attn, name in (
    ("x_block", "attn", "attn/{}"),
    ("x_block", "attn2", "attn2/{}"),
    ("context_block", "attn", "attn/context_{}"),
  ):
    torch = rf"{block}\.{stream}\.{attn}"
    rules += [
      *_dense(rf"{torch}\.qkv", f"{ours}/" + name.format("qkv")),
      *_dense(rf"{torch}\.proj", f"{ours}/" + name.format("out")),
      *_norm(rf"{torch}\.ln_q", f"{ours}/" + name.format("q_norm")),
      *_norm(rf"{torch}\.ln_k", f"{ours}/" + name.format("k_norm")),
    ]
  # Only the last block's text modulation is a (shift, scale) pair, so its rows
  # differ from those of the blocks before it.
  context = f"{ours}/context_modulation"
  for i in range(config.num_layers):
    torch = rf"joint_blocks\.({i})\.context_block\.adaLN_modulation\.1"
    if i == last and config.last_context_pre_only:
      rules += [
        Rule(rf"{torch}\.weight", f"{context}/kernel", SWAP_HALVES_LINEAR),
        Rule(rf"{torch}\.bias", f"{context}/bias", SWAP_HALVES),
      ]
    else:
      rules += _dense(torch, context)
  return Keymap(tuple(rules), stacks=_stacks(config), prefix=prefix)
