"""What a training step carries: a plain pytree, donated and returned."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from lrm_jax import optim


@struct.dataclass
class TrainState:
  """All that changes from step to step.

  Attributes:
    step: () int32, updates done so far.
    params: trained parameters, path -> array.
    opt_state: of the optax chain.
    ema: exponential average of `params`, or None.
  """

  step: Any
  params: Any
  opt_state: Any
  ema: Any


def create(
  params: dict[str, Any], tx: optax.GradientTransformation, *, use_ema: bool
) -> TrainState:
  """The state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    # A copy: the state is donated, and one buffer cannot be given away twice.
    ema=jax.tree.map(jnp.copy, params) if use_ema else None,
  )


def apply_gradients(
  state: TrainState,
  grads: dict[str, Any],
  tx: optax.GradientTransformation,
  *,
  ema_decay: float | None,
) -> TrainState:
  """One optimizer step."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    ema = optim.ema_update(ema, params, ema_decay)
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
