"""Scoring a batch of noisy latents, beside PyTorch in the same run.

  drm          21 blocks with weights of their own, convolutional head
  dina         12 blocks under adapters, Q-Former head, adapters beside their layers
  dina-scan    the same with the blocks under lax.scan (a narrow model's always are)
  dina-merged  the same without adapters, as after merging them

PyTorch's side is diffusers' blocks, PEFT's adapters and the heads of
convert/torch_reference.py. A narrow model on a CPU, SD3.5-Medium at 512 and 1024 px on
a GPU (protocol.py; `--cases` and `--torch` split it into shorter commands):

  python benchmarks/scoring.py --out benchmarks/results/scoring_cpu.json
  python benchmarks/scoring.py --full --torch eager blocks --out scoring_gpu.json
"""

from collections.abc import Callable
import copy
import dataclasses
import functools
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import model_sizes
import numpy as np
import protocol
import side_by_side

from lrm_jax import build, flops, weights
from lrm_jax.models import features, mmdit, reward

SCORERS = {  # in Sizes.rewards
  "drm": "drm",
  "dina": "dina",
  "dina-scan": "dina",
  "dina-merged": "cheap",
}


@dataclasses.dataclass(frozen=True)
class Case:
  """Attributes: scorer, of SCORERS; latent, its side; batch."""

  scorer: str
  latent: int
  batch: int

  @property
  def name(self) -> str:
    return f"{self.scorer}-{8 * self.latent}px-{self.batch}"


def cases(sizes: model_sizes.Sizes) -> list[Case]:
  """A narrow model at one size only, and no large batches."""
  full = sizes == model_sizes.Sizes.full()
  if not full:
    some = [name for name in SCORERS if name != "dina-scan"]
    return [Case(s, sizes.latent, b) for s in some for b in (1, 8)]
  sides = (sizes.latent, 2 * sizes.latent)
  return [Case(s, side, b) for side in sides for s in SCORERS for b in (1, 8, 16, 32)]


def config_of(sizes: model_sizes.Sizes, case: Case) -> reward.RewardConfig:
  return sizes.rewards[SCORERS[case.scorer]]


def count(sizes: model_sizes.Sizes, case: Case) -> float:
  config = config_of(sizes, case)
  return case.batch * flops.reward(config, case.latent, case.latent, sizes.text_tokens)


def random_inputs(
  sizes: model_sizes.Sizes, latent: int, batch: int, seed: int = 1
) -> tuple[np.ndarray, ...]:
  """x (b H W C), sigma (b,), context (b l d), pooled (b e), all float32."""
  rng, config = np.random.default_rng(seed), sizes.generator
  return (
    rng.standard_normal((batch, latent, latent, config.in_channels), np.float32),
    np.linspace(0.1, 0.9, batch, dtype=np.float32),
    rng.standard_normal((batch, sizes.text_tokens, config.context_dim), np.float32),
    rng.standard_normal((batch, config.pooled_dim), np.float32),
  )


@functools.lru_cache(maxsize=1)
def random_reward(config: reward.RewardConfig, seed: int = 0) -> dict:
  """All parameters, stacked, float32 numpy: not to be changed."""
  _, like = weights.abstract(lambda: build.make_reward(config))
  return side_by_side.random_weights(like, seed)


class Ours(protocol.JaxSide):
  """`RewardModel` under jit."""

  def __init__(self, sizes: model_sizes.Sizes):
    super().__init__(sizes)
    self._models: dict[str, tuple[nnx.GraphDef, Any]] = {}  # by scorer

  def _model(self, case: Case) -> tuple[nnx.GraphDef, Any]:
    """Graph, and parameters on the device."""
    if case.scorer not in self._models:
      config, scan = config_of(self.sizes, case), self.sizes.scan
      scan |= case.scorer.endswith("-scan")
      dtype = build.dtype(self.sizes.dtype)
      graphdef, like = weights.abstract(
        lambda: build.make_reward(
          config,
          dtype=dtype,
          param_dtype=dtype,
          trained_dtype=dtype,
          scan_blocks=scan,
        )
      )
      params = random_reward(config)
      if not scan:
        backbone = mmdit.unstack_params(params["backbone"])
        params = {**params, "backbone": backbone}
      params = build.to_device(build.fit(params, like, name="random weights"))
      self._models[case.scorer] = graphdef, params
    return self._models[case.scorer]

  def make(self, case: Case) -> protocol.Program:
    sizes, dtype = self.sizes, build.dtype(self.sizes.dtype)
    graphdef, params = self._model(case)
    x, sigma, context, pooled = random_inputs(sizes, case.latent, case.batch)
    cond = features.Cond(jnp.asarray(context, dtype), jnp.asarray(pooled, dtype))
    score = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    return protocol.Program(score, (params, *jax.device_put((x, sigma, cond))))


class Theirs(protocol.TorchSide):
  """The published modules; eager, they also say what float32 would give."""

  def __init__(self, sizes: model_sizes.Sizes, how: str):
    super().__init__(sizes, how)
    self._models: dict[str, tuple[Any, Any]] = {}  # by name in Sizes.rewards

  def _model(self, case: Case) -> tuple[Any, Any]:
    """The model, and in float32 where that is something else and is asked for."""
    name = SCORERS[case.scorer]
    if name not in self._models:
      config = config_of(self.sizes, case)
      exact = side_by_side.torch_reward(config, random_reward(config), self.device)
      exact = exact.eval().requires_grad_(False)
      dtype = getattr(self.torch, self.sizes.dtype)
      keeps = self.how == "eager" and dtype != self.torch.float32
      model = (copy.deepcopy(exact) if keeps else exact).to(self.device, dtype)
      self._models[name] = self.fast(model), exact if keeps else None
    return self._models[name]

  def make(self, case: Case) -> Callable[[], dict[str, Any]]:
    torch, dtype = self.torch, self.sizes.dtype
    model, exact = self._model(case)
    x, sigma, context, pooled = random_inputs(self.sizes, case.latent, case.batch)
    x = self.tensor(x.transpose(0, 3, 1, 2), dtype)
    t = self.tensor(1000 * sigma)  # in bfloat16 it would be rounded to multiples of 4
    context, pooled = self.tensor(context, dtype), self.tensor(pooled, dtype)
    if exact is not None:
      some = slice(protocol.EXACT_ROWS)
      inputs = [a[some].float() for a in (x, t, context, pooled)]
      exact.to(self.device)
      torch.set_float32_matmul_precision("highest")
      with torch.inference_mode():
        self.exact[case] = {"output": exact(*inputs)[:, 0]}
      torch.set_float32_matmul_precision("high")
      exact.to("cpu")  # or it would be in the peak of what is timed

    @torch.inference_mode()
    def call():
      return {"output": model(x, t, context, pooled)[:, 0]}

    return call


TABLE = protocol.Table(
  description=__doc__,
  narrow=model_sizes.Sizes(),
  full=model_sizes.Sizes.full(),
  cases=cases,
  ours=Ours,
  theirs=Theirs,
  count=count,
)


if __name__ == "__main__":
  sys.exit(protocol.main(TABLE))
