"""T5's encoder against transformers and the golden vectors."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrm_jax import weights
from lrm_jax.keymaps import engine
from lrm_jax.keymaps import t5 as keymap
from lrm_jax.models import t5
from tests import helpers

SMALL = dict(
  vocab_size=50,
  d_model=24,
  d_kv=8,
  d_ff=40,
  num_layers=3,
  num_heads=2,  # 2 x 8 differs from d_model
  relative_attention_num_buckets=32,
  relative_attention_max_distance=128,
  layer_norm_epsilon=1e-6,
  feed_forward_proj="gated-gelu",
)
# (changes, tokens)
VARIANTS = [
  ({}, 7),
  ({"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}, 64),
  ({"num_layers": 1, "num_heads": 6, "layer_norm_epsilon": 1e-3}, 200),
]


def make(config, **kw):
  return lambda: t5.T5Encoder(config, rngs=nnx.Rngs(0), **kw)


def run(graphdef, params, ids):
  return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, ids)


def torch_model(fields):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  config = transformers.T5Config(**fields, dropout_rate=0.0, is_encoder_decoder=False)
  return transformers.T5EncoderModel(config)


@pytest.mark.parametrize("changes, length", VARIANTS)
def test_parity(changes, length):
  torch = pytest.importorskip("torch")
  from tests import torch_models

  theirs = torch_model({**SMALL, **changes})
  theirs = torch_models.draw_weights(theirs, seed=0).eval()
  state = helpers.numpy_state(theirs)
  config = t5.T5Config.from_transformers(theirs.config.to_dict())
  loaded = helpers.load(make(config), keymap.transformers(config), state)

  ids = np.random.default_rng(0).integers(0, 50, (2, length)).astype(np.int32)
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids).long())[0]
  assert helpers.rel_err(run(*loaded, ids), want) <= 1e-4


def test_golden():
  config = t5.T5Config.from_transformers(
    helpers.golden_config("dina/sd35/text_encoder_3/config")
  )
  state = helpers.golden("dina/sd35/text_encoder_3/model")
  loaded = helpers.load(make(config), keymap.transformers(config), state)
  want = helpers.golden("dina/expected")
  got = run(*loaded, want["tokens_3"].astype(np.int32))
  assert helpers.rel_err(got, want["prompt_embeds"][:, 77:]) <= 1e-4


def test_layouts():
  config = t5.T5Config.from_transformers(
    helpers.golden_config("dina/sd35/text_encoder_3/config")
  )
  state = helpers.golden("dina/sd35/text_encoder_3/model")
  state = {key: array.astype(np.float16) for key, array in state.items()}
  helpers.assert_round_trip(make(config), keymap.transformers(config), state)
  prefix = "text_encoders.t5xxl."
  single = {f"{prefix}transformer.{key}": array for key, array in state.items()}
  helpers.assert_round_trip(make(config), keymap.stability(config), single)

  # Duplicates and leftovers are skipped; both layouts fill the same model.
  _, a = helpers.load(
    make(config),
    keymap.transformers(config),
    {**state, "encoder.embed_tokens.weight": state["shared.weight"]},
  )
  _, b = helpers.load(
    make(config),
    keymap.stability(config),
    {
      **single,
      prefix + "logit_scale": np.zeros(()),
      prefix + "transformer.encoder.embed_tokens.weight": state["shared.weight"],
    },
  )
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_other_checkpoints_are_refused():
  config = t5.T5Config.from_transformers(
    helpers.golden_config("dina/sd35/text_encoder_3/config")
  )
  state = helpers.golden("dina/sd35/text_encoder_3/model")
  decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((64, 64))}
  with pytest.raises(engine.ConversionError, match="unexpected key decoder"):
    helpers.load(make(config), keymap.transformers(config), {**state, **decoder})


def test_full_size():
  config = t5.T5Config.xxl()
  _, params = weights.abstract(make(config))
  d, inner, mlp = 4096, 64 * 64, 10240
  layer = 4 * d * inner + 3 * d * mlp + 2 * d
  assert weights.count(params) == 24 * layer + 32128 * d + 32 * 64 + d
  assert weights.count(params) == 4_762_310_656

  torch = pytest.importorskip("torch")
  fields = dict(SMALL, vocab_size=32128, d_model=d, d_kv=64, d_ff=mlp)
  with torch.device("meta"):
    theirs = torch_model(dict(fields, num_layers=24, num_heads=64))
  assert t5.T5Config.from_transformers(theirs.config.to_dict()) == config
  source = {k: (tuple(v.shape), np.float32) for k, v in theirs.state_dict().items()}
  _, problems = engine.match(
    keymap.transformers(config), source, weights.shapes(params)
  )
  assert not problems


@pytest.mark.parametrize("num, distance", [(32, 128), (8, 32), (16, 20), (64, 256)])
def test_relative_buckets(num, distance):
  torch = pytest.importorskip("torch")
  from transformers.models.t5.modeling_t5 import T5Attention

  position = torch.arange(512)
  want = T5Attention._relative_position_bucket(
    position[None, :] - position[:, None], True, num, distance
  )
  np.testing.assert_array_equal(t5.relative_buckets(512, num, distance), want)


def test_relative_buckets_by_hand():
  got = t5.relative_buckets(129, 32, 128)
  # Keys before the query: one bucket per distance up to 8, then 16 ways to 128.
  assert list(got[:9, 0]) == list(range(9))
  assert got[15, 0] == 9 and got[16, 0] == 10 and got[128, 0] == 15
  assert got[0, 0] == 0 and got[0, 1] == 17 and got[0, 128] == 31


def test_bfloat16_stays_close():
  config = t5.T5Config.from_transformers(SMALL)
  graphdef, params = weights.split(make(config)())
  graphdef16, _ = weights.abstract(make(config, dtype=jnp.bfloat16))
  params16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  ids = np.arange(2 * 9, dtype=np.int32).reshape(2, 9)
  got, want = run(graphdef16, params16, ids), run(graphdef, params, ids)
  assert got.dtype == jnp.bfloat16
  assert helpers.rel_err(got, want) < 3e-2


@pytest.mark.parametrize(
  "change, message",
  [
    ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
    ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
    ({"d_ff": None}, "d_ff is missing"),
    ({"is_decoder": True}, "only the encoder"),
  ],
)
def test_unsupported_config(change, message):
  with pytest.raises(ValueError, match=message):
    t5.T5Config.from_transformers({**SMALL, **change})
