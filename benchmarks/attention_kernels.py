"""One attention of SD3.5-Medium, by every kernel that is here, beside PyTorch's.

  forward   softmax(q k^T / sqrt(64)) v, 24 heads
  gradient  of its inputs, which runs it forward as well

Lengths are those of SD3.5: image and 333 text tokens (odd: 1357 at 512 px, 4429 at
1024 px), and the image alone. PyTorch's side is scaled_dot_product_attention with the
backend that is fastest for the case: flash, cuDNN, or memory-efficient. On a CPU, a
small one by XLA.

  python benchmarks/attention_kernels.py
  python benchmarks/attention_kernels.py --full --out attention_gpu.json
"""

from collections.abc import Callable
import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import protocol

from lrm_jax import build
from lrm_jax.models import attention


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Attributes: shapes, (batch, tokens); kernels: of attention.IMPLEMENTATIONS."""

  heads: int
  head_dim: int
  shapes: tuple[tuple[int, int], ...]
  kernels: tuple[str, ...]
  dtype: str


FULL = Sizes(
  heads=24,
  head_dim=64,
  shapes=((16, 1357), (16, 1024), (2, 1357), (4, 4429)),
  kernels=("cudnn", "xla"),
  dtype="bfloat16",
)
NARROW = Sizes(4, 32, ((2, 77), (2, 128)), ("xla",), "float32")


@dataclasses.dataclass(frozen=True)
class Case:
  """Attributes: kernel; direction, `forward` or `gradient`."""

  kernel: str
  direction: str
  batch: int
  tokens: int

  @property
  def name(self) -> str:
    return f"{self.kernel}-{self.direction}-{self.batch}x{self.tokens}"


def cases(sizes: Sizes) -> list[Case]:
  return [
    Case(kernel, direction, *shape)
    for direction in ("forward", "gradient")
    for shape in sizes.shapes
    for kernel in sizes.kernels
  ]


def count(sizes: Sizes, case: Case) -> float:
  """Two products forward, twice as many backward (a recomputed one is not counted)."""
  width = sizes.heads * sizes.head_dim
  forward = 4.0 * case.batch * case.tokens**2 * width
  return forward * (3 if case.direction == "gradient" else 1)


def make_inputs(sizes: Sizes, case: Case) -> np.ndarray:
  """q, k, v and the gradient of the output: (4 b n h k) float32."""
  shape = (4, case.batch, case.tokens, sizes.heads, sizes.head_dim)
  return np.random.default_rng(case.tokens).standard_normal(shape, np.float32)


class Ours(protocol.JaxSide):
  """`attention.attention`."""

  def make(self, case: Case) -> protocol.Program:
    def forward(q, k, v):
      return attention.attention(q, k, v, case.kernel)

    def run(q, k, v, g):
      if case.direction == "forward":
        return {"output": forward(q, k, v)}
      found = jax.vjp(forward, q, k, v)[1](g)
      return dict(zip("qkv", found, strict=True))

    dtype = build.dtype(self.sizes.dtype)
    inputs = [jnp.asarray(a, dtype) for a in make_inputs(self.sizes, case)]
    return protocol.Program(jax.jit(run), tuple(inputs))

  def outputs(self, case: Case, result: Any) -> dict[str, Any]:
    """Of the first sample."""
    return {name: a[:1] for name, a in result.items()}


class Theirs(protocol.TorchSide):
  """scaled_dot_product_attention."""

  def make(self, case: Case) -> Callable[[], dict[str, Any]]:
    from torch.nn import attention as kernels

    torch = self.torch
    inputs = make_inputs(self.sizes, case).swapaxes(2, 3)  # b h n k
    tensors = [self.tensor(a, self.sizes.dtype) for a in inputs]
    if self.device == "cpu":
      return lambda: self._run(case, tensors)
    some = [a[:1].float() for a in tensors]
    with kernels.sdpa_kernel(kernels.SDPBackend.MATH):
      torch.set_float32_matmul_precision("highest")
      self.exact[case] = self._run(case, some)
      torch.set_float32_matmul_precision("high")
    backends = [
      kernels.SDPBackend.FLASH_ATTENTION,
      kernels.SDPBackend.CUDNN_ATTENTION,
      kernels.SDPBackend.EFFICIENT_ATTENTION,
    ]

    def call(backend):
      with kernels.sdpa_kernel(backend):
        return self._run(case, tensors)

    def seconds(backend):
      for repeats in (3, 10):  # the first ones only warm up
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
          call(backend)
        self._wait()
      return time.perf_counter() - start

    best = min(backends, key=seconds)
    print(f"{case.name}: PyTorch is fastest with {best.name}", flush=True)
    return lambda: call(best)

  def _run(self, case: Case, tensors: list[Any]) -> dict[str, Any]:
    torch = self.torch
    q, k, v, g = tensors
    if case.direction == "gradient":
      q, k, v = (a.detach().requires_grad_() for a in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    found = {"output": out}
    if case.direction == "gradient":
      found = dict(zip("qkv", torch.autograd.grad(out, (q, k, v), g), strict=True))
    return {name: a[:1].transpose(1, 2) for name, a in found.items()}


TABLE = protocol.Table(
  description=__doc__,
  narrow=NARROW,
  full=FULL,
  cases=cases,
  ours=Ours,
  theirs=Theirs,
  count=count,
  together=False,
)


if __name__ == "__main__":
  sys.exit(protocol.main(TABLE))
