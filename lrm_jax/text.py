"""Prompts to token ids, and three encoders' outputs to one `Cond`.

Axes: b batch, l tokens, d width, p pooled width.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any
import warnings

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from lrm_jax.models import features

CLIP_LENGTH = 77
T5_MAX_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The three tokenizers of an SD3.5 folder; `t5=None` where there is no T5."""

  clip_l: Any
  clip_g: Any
  t5: Any | None

  @classmethod
  def load(cls, folder: str | pathlib.Path, *, with_t5: bool = True) -> "Tokenizers":
    """Reads `tokenizer`, `tokenizer_2` and (with_t5) `tokenizer_3` below `folder`.

    Raises:
      FileNotFoundError: one of these folders does not exist.
    """
    import transformers  # seconds to import, and only needed here

    names = ["tokenizer", "tokenizer_2", "tokenizer_3"][: 3 if with_t5 else 2]
    paths = [pathlib.Path(folder) / name for name in names]
    if missing := [str(path) for path in paths if not path.is_dir()]:
      raise FileNotFoundError(
        f"no tokenizer folder {', '.join(missing)}; a diffusers SD3.5 folder has "
        "tokenizer, tokenizer_2 and, for T5, tokenizer_3"
      )
    loaded = [
      transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
      for path in paths
    ]
    return cls(*loaded, *([] if with_t5 else [None]))

  def tokenize(
    self, prompts: Sequence[str], t5_length: int = 256
  ) -> dict[str, np.ndarray]:
    """Token ids, padded to full length and int32.

    Longer prompts are cut, the end token kept, and a warning per encoder names the
    first one and where it was cut.

    Args:
      prompts: b strings.
      t5_length: tokens of T5, 1 to 512. The models were trained at up to 256.

    Returns: `clip_l` (b 77), `clip_g` (b 77) and, where there is a T5, `t5`
      (b t5_length).

    Raises:
      TypeError: prompts that are not a sequence of strings.
      ValueError: no prompts, or t5_length out of range.
    """
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
      raise TypeError(f"prompts must be a sequence of strings, not {prompts!r}")
    if not prompts:
      raise ValueError("prompts is empty")
    if not 1 <= t5_length <= T5_MAX_LENGTH:
      raise ValueError(f"t5_length={t5_length} is not in 1..{T5_MAX_LENGTH}")
    limits = {"clip_l": CLIP_LENGTH, "clip_g": CLIP_LENGTH, "t5": t5_length}
    tokens = {}
    for name, limit in limits.items():
      if (tokenizer := getattr(self, name)) is not None:
        tokens[name] = _tokenize(tokenizer, list(prompts), limit, name)
    return tokens


def embed(
  clip_l: tuple[Float[Array, "b l d1"], Float[Array, "b p1"]],
  clip_g: tuple[Float[Array, "b l d2"], Float[Array, "b p2"]],
  t5: Float[Array, "b l3 d3"],
) -> features.Cond:
  """What SD3.5 is conditioned on, from the outputs of its text encoders.

  The tokens of the two CLIPs side by side on channels, zero-padded to T5's width,
  then T5's tokens on the sequence axis (Esser et al. 2024, figure 2).

  Args:
    clip_l, clip_g: (tokens, pooled) as `models.clip.CLIPText` returns them.
    t5: tokens as `models.t5.T5Encoder` returns them, or `no_t5`.

  Returns: context (b l+l3 d3), pooled (b p1+p2).

  Raises:
    ValueError: the two CLIPs together are wider than T5.
  """
  tokens = jnp.concatenate([clip_l[0], clip_g[0]], axis=-1)
  pad = t5.shape[-1] - tokens.shape[-1]
  if pad < 0:
    raise ValueError(
      f"CLIP tokens of width {clip_l[0].shape[-1]} + {clip_g[0].shape[-1]} do not fit "
      f"the context width {t5.shape[-1]}; these encoders do not belong together"
    )
  tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, pad)))
  return features.Cond(
    context=jnp.concatenate([tokens, t5], axis=1),
    pooled=jnp.concatenate([clip_l[1], clip_g[1]], axis=-1),
  )


def no_t5(
  batch: int, length: int, context_dim: int, dtype: Any = jnp.float32
) -> Float[Array, "b l d"]:
  """What stands in for T5's tokens where there is no T5: zeros, as in diffusers."""
  return jnp.zeros((batch, length, context_dim), dtype)


def _tokenize(tokenizer: Any, prompts: list[str], length: int, name: str) -> np.ndarray:
  # verbose=False: the tokenizer's own complaint does not say which prompt is cut.
  full = tokenizer(prompts, verbose=False)["input_ids"]
  long = [i for i, ids in enumerate(full) if len(ids) > length]
  if long:
    ids = full[long[0]]
    # The last place is the end token's, which stays; so it does not count as cut.
    lost = tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True)
    others = f", and {len(long) - 1} more of these prompts" if len(long) > 1 else ""
    warnings.warn(
      f"{name} keeps {length} of the {len(ids)} tokens of the prompt "
      f"{_shorten(prompts[long[0]], 300)!r}; lost is {_shorten(lost, 100)!r}{others}",
      stacklevel=3,
    )
  ids = tokenizer(
    prompts,
    padding="max_length",
    max_length=length,
    truncation=True,
    add_special_tokens=True,
  )["input_ids"]
  return np.asarray(ids, np.int32)


def _shorten(text: str, length: int) -> str:
  return text if len(text) <= length else f"{text[: length - 4]} ..."
