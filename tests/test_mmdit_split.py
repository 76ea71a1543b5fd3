"""The transformer in pieces: prompts embedded once, blocks cut into head and Tail."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import weights
from lrm_jax.models import features, lora, mmdit, qformer_head, reward
from tests import golden_models, helpers

FULL = mmdit.MMDiTConfig(
  num_layers=5,
  num_heads=2,
  head_dim=8,
  dual_layers=(0, 1, 2),
  in_channels=3,
  out_channels=3,
  context_dim=12,
  pooled_dim=10,
  pos_embed_size=9,
  pos_embed_base=9,
)


def make_tail(start, **kw):
  return lambda: mmdit.Tail(FULL, start, rngs=nnx.Rngs(0), **kw)


@pytest.fixture(scope="module")
def full():
  """The whole model, with taps on both sides of every cut; inputs; what it gives."""
  config = dataclasses.replace(FULL, image_taps=(1, 2, 4), text_taps=(1,))
  model = golden_models.random_model(golden_models.make_mmdit(config))
  x, sigma, cond = golden_models.random_inputs(FULL)
  inputs = x, 1000 * sigma, cond
  return model.params, inputs, model.run(*inputs)


@pytest.mark.parametrize("scan_blocks", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("start", [2, 3, 4])
def test_tail_of_head_is_the_full_model(full, start, scan_blocks):
  """Inside the dual segment, at its border, behind it."""
  params, inputs, (velocity, want) = full
  config = FULL.truncate(
    start, has_output=False, image_taps=(1, 2), text_taps=(1, start)
  )
  graphdefs, likes = zip(
    weights.abstract(golden_models.make_mmdit(config, scan_blocks=scan_blocks)),
    weights.abstract(make_tail(start, scan_blocks=scan_blocks)),
    strict=True,
  )
  parts = mmdit.split_params(params, FULL, start)
  if not scan_blocks:
    parts = tuple(map(mmdit.unstack_params, parts))
  assert [weights.shapes(p) for p in parts] == [weights.shapes(p) for p in likes]

  head, tail = map(golden_models.Loaded, (None, None), graphdefs, parts)
  tokens, feats = head.run(*inputs, method="run")
  assert tokens.grid == feats.grid == (3, 4)
  found = tail.run(tokens)
  assert found.dtype == np.float32
  assert helpers.rel_err(found, velocity) <= 1e-6
  for a, b in zip(feats.image, want.image[:2], strict=True):
    assert helpers.rel_err(a, b) <= 1e-6
  assert helpers.rel_err(feats.text[0], want.text[0]) <= 1e-6
  np.testing.assert_array_equal(feats.text[1], tokens.text)


@pytest.mark.parametrize("start", range(1, 5))
def test_split_params_shares_memory_and_loses_nothing(full, start):
  """Adapters are cut with their blocks."""

  def make():
    model = golden_models.make_mmdit(FULL)()
    lora.add_adapters(model, lora.LoRAConfig(2, 4), rngs=nnx.Rngs(0))
    return model

  params = golden_models.random_model(make).params
  head, tail = mmdit.split_params(params, FULL, start)
  whole = weights.flatten(params)
  size = 0
  for part in (head, tail):
    for path, leaf in weights.flatten(part).items():
      size += leaf.nbytes
      if not path.startswith("blocks/"):
        assert leaf is whole[path]
      else:
        assert any(np.shares_memory(leaf, a) for a in whole.values()), path
  assert size == sum(leaf.nbytes for leaf in whole.values())

  def layers(tree):
    return [
      jax.tree.map(lambda a, n=n: a[n], stack)
      for stack in tree["blocks"].values()
      for n in range(jax.tree.leaves(stack)[0].shape[0])
    ]

  assert len(layers(head)) == start
  jax.tree.map(
    np.testing.assert_array_equal, layers(head) + layers(tail), layers(params)
  )


def test_configs_of_the_pieces():
  medium = mmdit.MMDiTConfig.sd35_medium()
  assert medium.tail(12).segments == (1, 10, 1)
  assert medium.tail(13).segments == (10, 1)
  assert medium.tail(23).segments == (1,)
  assert medium.tail(23).last_context_pre_only


@pytest.mark.parametrize("start", [-1, 0, 5])
def test_cuts_outside_the_model(start):
  message = f"cannot split 5 blocks before block {start}: choose 1..4"
  with pytest.raises(ValueError, match=message):
    make_tail(start)()
  with pytest.raises(ValueError, match=message):
    mmdit.split_params({}, FULL, start)


def test_a_tail_needs_the_output():
  without = dataclasses.replace(FULL, has_output=False)
  with pytest.raises(ValueError, match="has_output=False: a tail ends in the output"):
    mmdit.Tail(without, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("flag", [dict(remat="some"), dict(unroll=True)], ids=str)
def test_unknown_flags(flag):
  with pytest.raises((ValueError, TypeError), match="remat='some'|'unroll'"):
    make_tail(2, **flag)()


# --- prompts ----------------------------------------------------------------------


def test_an_embedded_prompt_gives_the_same_bits(full):
  """Outside of jit, where nothing is fused with what comes before."""
  params, inputs, _ = full
  x, t, cond = jax.tree.map(jnp.asarray, inputs)
  graphdef, _ = weights.abstract(golden_models.make_mmdit(FULL))
  model = nnx.merge(graphdef, params)
  embedded = model.embed(cond)
  assert isinstance(embedded, features.Embedded)
  assert embedded.context.shape == (2, 5, 16) and embedded.pooled.shape == (2, 16)
  np.testing.assert_array_equal(model(x, t, embedded)[0], model(x, t, cond)[0])


def test_a_reward_of_an_embedded_prompt():
  backbone = FULL.truncate(2, has_output=False, image_taps=(2,), text_taps=(1,))
  head = qformer_head.QFormerHeadConfig(
    token_dim=16, width=16, num_image_taps=1, num_text_taps=1, num_heads=4
  )
  graphdef, like = weights.abstract(
    lambda: reward.RewardModel(
      reward.RewardConfig(backbone, head, logistic=True), rngs=nnx.Rngs(0)
    )
  )
  model = nnx.merge(graphdef, golden_models.random_params(like))
  inputs = golden_models.random_inputs(backbone)
  x, sigma, cond = jax.tree.map(jnp.asarray, inputs)
  embedded = model.backbone.embed(cond)
  want = model(x, sigma, cond)
  np.testing.assert_array_equal(model(x, sigma, embedded), want)
  np.testing.assert_array_equal(
    model.ensemble(x[None], sigma[None], embedded),
    model.ensemble(x[None], sigma[None], cond),
  )
  run = model.backbone.run(x, 1000 * sigma, embedded)
  np.testing.assert_array_equal(model.score(*run), want)
