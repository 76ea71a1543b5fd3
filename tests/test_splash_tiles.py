"""The cycles of TPU attention: what is counted, and that the chosen tiles are there."""

import importlib.util

import pytest

from benchmarks import splash_tiles
from lrm_jax.models import attention

LISTING = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[2,1024,64]] /* 0x5 : { */ }
   0x1   :  { %14 = sst [smem:[#allocation3]] %s1 }
   0x2 LB: > { %s42 = sadd.s32 1, %s24 }
   0xa   : > {}
"""


def test_bundles_of_a_listing():
  assert splash_tiles.count_bundles(LISTING) == 4


def test_chosen_tiles_are_measured():
  for tokens, tiles in splash_tiles.TILES.items():
    assert attention.splash_tile(tokens) in tiles
    assert not any(tile % attention.LANES for tile in tiles)


def test_cycles_are_those_of_all_tiles(monkeypatch):
  """Two tiles a side make four; of the peak is counted what is not padding."""
  seen = []

  def bundles(device, tokens, tile, layout, grad):
    seen.append((device, tokens, tile, layout, grad))
    return {"fwd": 1000, "dq": 2000, "dkv": 3000} if grad else {"fwd": 900}

  monkeypatch.setattr(splash_tiles, "bundles", bundles)
  row = splash_tiles.measure("v5p:2x2x1", 1357, 768, "SEQ_MINOR")
  assert [case[-1] for case in seen] == [False, True]
  assert (row["padded"], row["forward"], row["gradient"]) == (1536, 3600, 24000)
  assert row["chosen"]
  cores, clock, peak = 2, 1.75e9, 459e12
  rate = cores * 4 * 1357**2 * 64 * clock / 3600
  assert row["forward_share"] == pytest.approx(rate / peak)
  assert row["gradient_share"] == pytest.approx(3.5 * rate * 3600 / 24000 / peak)

  def too_large(*case, **kw):
    raise splash_tiles.TooLargeError("RESOURCE_EXHAUSTED")

  monkeypatch.setattr(splash_tiles, "bundles", too_large)
  failed = splash_tiles.measure("v5e:2x2", 1613, 1664, "SEQ_MINOR")
  assert failed["error"] == "RESOURCE_EXHAUSTED" and not failed["chosen"]
  head, _, *lines = splash_tiles.table([row, failed]).splitlines()
  assert "does not fit" in lines[1]
  assert {line.count("|") for line in lines} == {head.count("|")}


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_large_tiles_take_fewer_cycles(monkeypatch):
  # The suite's "highest" asks the kernel for float32 products of bfloat16 tiles.
  monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "default")
  one, four = (
    splash_tiles.measure("v5e:2x2", 1229, tile, "SEQ_MINOR") for tile in (1280, 640)
  )
  assert one["chosen"] and one["forward"] < 0.8 * four["forward"]
  assert one["gradient"] < 0.9 * four["gradient"]
