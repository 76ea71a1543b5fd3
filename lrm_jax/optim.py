"""Which parameters are trained, and how: regex tables and an optax chain."""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lrm_jax import weights

TRAIN, FREEZE = "train", "freeze"
SCHEDULES = ("constant", "cosine")


def partition(
  params: Mapping, table: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into (trained, frozen), both flat: path -> leaf.

  Args:
    table: ordered (regex, "train" or "freeze"); the first regex found in a path
      decides.

  Raises:
    ValueError: a parameter that no row covers, an unknown word, nothing to train.
  """
  for pattern, word in table:
    if word not in (TRAIN, FREEZE):
      raise ValueError(f"trainable[{pattern!r}]={word!r}: use {TRAIN!r} or {FREEZE!r}")
  parts: dict[str, dict[str, Any]] = {TRAIN: {}, FREEZE: {}}
  for path, leaf in weights.flatten(params).items():
    word = next((w for pattern, w in table if re.search(pattern, path)), None)
    if word is None:
      raise ValueError(f"no row of the trainable table covers {path}")
    parts[word][path] = leaf
  if not parts[TRAIN]:
    raise ValueError("the trainable table trains nothing")
  return parts[TRAIN], parts[FREEZE]


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
  """The inverse of `partition`: nested parameters, in canonical order."""
  return weights.unflatten({**trained, **frozen})


def make_schedule(
  name: str, *, learning_rate: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
  """Linear warm-up, then constant or cosine to zero at `num_steps`.

  Raises:
    ValueError: an unknown name, or a warm-up longer than the run.
  """
  if name not in SCHEDULES:
    raise ValueError(f"schedule {name!r}: use one of {SCHEDULES}")
  if not 0 <= warmup_steps <= num_steps:
    raise ValueError(f"warmup_steps={warmup_steps} must lie within 0..{num_steps}")
  if name == "constant":
    after = optax.constant_schedule(learning_rate)
  else:
    after = optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps))
  if warmup_steps == 0:
    return after
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def make_tx(
  schedule: optax.Schedule, *, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW with torch's defaults.

  Decay applies to every trained parameter, biases and norms included, as torch's
  AdamW does in the originals (optax's own default of 1e-4 is not torch's 1e-2).
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay),
  )


def mean_gradients(
  loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, items: Any
) -> tuple[jax.Array, Any, Any]:
  """Gradient of the mean loss over micro-batches, one after another, in float32.

  Args:
    loss_fn: `(params, item) -> (loss, aux)`.
    items: pytree whose leading axis counts micro-batches.

  Returns: mean loss, aux of all micro-batches (stacked), mean gradients.
  """
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

  def micro(total, item):
    (loss, aux), grads = value_and_grad(params, item)
    return jax.tree.map(jnp.add, total, (loss, grads)), aux

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  total, aux = jax.lax.scan(micro, (jnp.float32(0), zeros), items)
  count = len(jax.tree.leaves(items)[0])
  loss, grads = jax.tree.map(lambda t: t / count, total)
  return loss, aux, grads


def ema_update(ema: Any, params: Any, decay: float) -> Any:
  """`decay * ema + (1 - decay) * params`, in the average's dtype."""
  return jax.tree.map(
    lambda e, p: decay * e + (1 - decay) * p.astype(e.dtype), ema, params
  )
