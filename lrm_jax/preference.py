"""Training and evaluating on preference pairs: the two programs that run on devices.

Both are pure functions of plain pytrees. A batch is a dict of `chosen`, `rejected`
(b h w c), `context` (b l d), `pooled` (b e), and `preference`, `kind`, `index` and
`weight` (b).

Axes: b pairs, h w c latent, s noise levels, a micro-batches.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from lrm_jax import flow, optim, train_state
from lrm_jax.models import features

INPUTS = ("chosen", "rejected", "preference", "kind", "index", "weight")

Constrain = Callable[[Any], Any]


def _same(tree: Any) -> Any:
  return tree


def noisy_pairs(
  batch: Mapping[str, jax.Array], eps: jax.Array, sigma: jax.Array
) -> jax.Array:
  """Both latents of each pair at its noise level: (b 2 h w c) float32.

  Args:
    eps: (b 1 h w c) for one noise per pair, (b 2 h w c) for independent ones.
    sigma: (b).
  """
  x0 = jnp.stack([batch["chosen"], batch["rejected"]], axis=1).astype(jnp.float32)
  return flow.add_noise(x0, jnp.broadcast_to(eps, x0.shape), sigma)


def pair_scores(
  model: Callable[..., jax.Array],
  x: jax.Array,
  sigma: jax.Array,
  cond: features.Cond,
  *,
  constrain: Constrain = _same,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(r_chosen, r_rejected), each (b,), of noisy pairs x (b 2 h w c).

  `model(x, sigma, cond, key=)` gives one score per latent, as models.reward does.
  Both sides run as one batch of 2b, the two of a pair next to each other: a batch
  split over devices then stays where it is. `constrain` pins that split.
  """
  x = x.reshape(-1, *x.shape[2:])
  sigma, cond = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), (sigma, cond))
  scores = model(*constrain((x, sigma, cond)), key=dropout_key)
  return tuple(scores.reshape(-1, 2).T)


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  *,
  sigma_fn: Callable[[jax.Array, int], jax.Array],
  loss_fn: Callable[..., jax.Array],
  learning_rate: optax.Schedule,
  shared_noise: bool,
  ema_decay: float | None,
  accumulate: int = 1,
  constrain: Constrain = _same,
) -> Callable:
  """`step(state, frozen, batch, key) -> (state, metrics)`, pure.

  Every random draw comes from `key` folded with the step number, so a resumed run
  repeats the uninterrupted one; noise is drawn for the whole batch, so the number of
  micro-batches does not change it.

  Args:
    accumulate: micro-batches per step, one after another; gradients are averaged in
      float32.
    constrain: pins arrays whose first axis is the batch to their devices.
  """

  def train_step(state, frozen, batch, key):
    keys = jax.random.split(jax.random.fold_in(key, state.step), 3)
    b, *latent = batch["chosen"].shape
    sigma = sigma_fn(keys[0], b)
    eps = jax.random.normal(keys[1], (b, 1 if shared_noise else 2, *latent))
    x = noisy_pairs(batch, eps, sigma)
    cond = features.Cond(batch["context"], batch["pooled"])

    def objective(params, x, sigma, cond, preference, dropout_key):
      model = nnx.merge(graphdef, optim.join(params, frozen))
      scores = pair_scores(
        model, x, sigma, cond, constrain=constrain, dropout_key=dropout_key
      )
      return jnp.mean(loss_fn(*scores, sigma, preference)), scores

    rows = (x, sigma, cond, batch["preference"])
    if accumulate == 1:
      value_and_grad = jax.value_and_grad(objective, has_aux=True)
      (loss, scores), grads = value_and_grad(state.params, *rows, keys[2])
    else:

      def split(a):  # row i goes to micro-batch i % accumulate: no data moves
        a = a.reshape(-1, accumulate, *a.shape[1:])
        return jnp.moveaxis(constrain(a), 1, 0)

      def micro(params, item):
        *rows, dropout_key = item
        return objective(params, *constrain(tuple(rows)), dropout_key)

      items = (*jax.tree.map(split, rows), jax.random.split(keys[2], accumulate))
      loss, scores, grads = optim.mean_gradients(micro, state.params, items)

    r_chosen, r_rejected = scores
    metrics = {
      "train/loss": loss,
      "train/acc": jnp.mean(r_chosen > r_rejected),
      "train/score_gap": jnp.mean(r_chosen - r_rejected),
      "train/score_mean": jnp.mean(jnp.stack(scores)),
      "train/grad_norm": optax.tree.norm(grads),
      "train/learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
    }
    state = train_state.apply_gradients(state, grads, tx, ema_decay=ema_decay)
    return state, metrics

  return train_step


def make_eval_step(
  graphdef: nnx.GraphDef, *, shared_noise: bool, constrain: Constrain = _same
) -> Callable:
  """`step(params, frozen, batch, sigmas (s), key) -> dict`, pure.

  Returns `r_chosen`, `r_rejected` (s b), and of the batch `preference`, `kind` and
  `weight` (b; 0 for rows that only fill a batch up).
  The noise of a pair depends on the key, its `index` and the place of the noise level
  in `sigmas`: not on the batch it is in, nor on the step.
  """

  def eval_step(params, frozen, batch, sigmas, key):
    model = nnx.merge(graphdef, optim.join(params, frozen))
    b, *latent = batch["chosen"].shape
    cond = features.Cond(batch["context"], batch["pooled"])

    def level(inputs):
      number, sigma = inputs
      level_key = jax.random.fold_in(key, number)

      def draw(index):
        shape = (1 if shared_noise else 2, *latent)
        return jax.random.normal(jax.random.fold_in(level_key, index), shape)

      sigma = jnp.broadcast_to(sigma, (b,))
      x = noisy_pairs(batch, jax.vmap(draw)(batch["index"]), sigma)
      return pair_scores(model, x, sigma, cond, constrain=constrain)

    r_chosen, r_rejected = jax.lax.map(level, (jnp.arange(len(sigmas)), sigmas))
    return {
      "r_chosen": r_chosen,
      "r_rejected": r_rejected,
      **{name: batch[name] for name in ("preference", "kind", "weight")},
    }

  return eval_step
