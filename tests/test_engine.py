"""The conversion engine on made-up tables: exact round trips, complete errors."""

import ml_dtypes
import numpy as np
import pytest

from lrm_jax.keymaps import engine
from lrm_jax.keymaps.engine import CONV, CONV_1X1, LINEAR, ConversionError, Rule

# A model of 5 blocks in stacks of 3 and 2, a fused kv, and unstacked nested lists.
KEYMAP = engine.Keymap(
  rules=(
    Rule(r"embed\.weight", "embed/kernel", CONV),
    Rule(r"blocks\.(\d+)\.to_k\.weight", "blocks[{0}]/kv/kernel", LINEAR, part=(0, 2)),
    Rule(r"blocks\.(\d+)\.to_v\.weight", "blocks[{0}]/kv/kernel", LINEAR, part=(1, 2)),
    Rule(r"blocks\.(\d+)\.to_k\.bias", "blocks[{0}]/kv/bias", part=(0, 2)),
    Rule(r"blocks\.(\d+)\.to_v\.bias", "blocks[{0}]/kv/bias", part=(1, 2)),
    Rule(r"blocks\.(\d+)\.ff\.(\d+)\.bias", "blocks[{0}]/ff/{1}/bias"),
    Rule(
      r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv\.weight",
      "down/{0}/resnets/{1}/conv/kernel",
      CONV,
    ),
    Rule(r"mid\.attn\.q\.weight", "mid/q/kernel", CONV_1X1),
  ),
  ignores=(engine.Ignore(r"blocks\.\d+\.position_ids", "a buffer"),),
  stacks={"blocks": (3, 2)},
  prefix="model.",
)
SHAPES = {
  "embed/kernel": (2, 2, 3, 6),
  "blocks/0/kv/kernel": (3, 6, 8),
  "blocks/1/kv/kernel": (2, 6, 8),
  "blocks/0/kv/bias": (3, 8),
  "blocks/1/kv/bias": (2, 8),
  "blocks/0/ff/0/bias": (3, 5),
  "blocks/0/ff/1/bias": (3, 7),
  "blocks/1/ff/0/bias": (2, 5),
  "down/0/resnets/0/conv/kernel": (3, 3, 4, 5),
  "down/0/resnets/1/conv/kernel": (3, 3, 5, 5),
  "down/11/resnets/0/conv/kernel": (3, 3, 5, 6),
  "mid/q/kernel": (6, 4),
}


def state_dict(dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "embed.weight": (6, 3, 2, 2),
    "down_blocks.0.resnets.0.conv.weight": (5, 4, 3, 3),
    "down_blocks.0.resnets.1.conv.weight": (5, 5, 3, 3),
    "down_blocks.11.resnets.0.conv.weight": (6, 5, 3, 3),
    "mid.attn.q.weight": (4, 6, 1, 1),
  }
  for i in range(5):
    shapes[f"blocks.{i}.to_k.weight"] = (4, 6)
    shapes[f"blocks.{i}.to_v.weight"] = (4, 6)
    shapes[f"blocks.{i}.to_k.bias"] = (4,)
    shapes[f"blocks.{i}.to_v.bias"] = (4,)
    shapes[f"blocks.{i}.ff.0.bias"] = (5,)
    if i < 3:
      shapes[f"blocks.{i}.ff.1.bias"] = (7,)
  return {
    "model." + key: rng.standard_normal(shape).astype(dtype)
    for key, shape in shapes.items()
  }


def fill(keymap, state, shapes, **kw):
  source = {key: (array.shape, array.dtype) for key, array in state.items()}
  return engine.fill(keymap, source, shapes, state.__getitem__, **kw)


def never_read(key):
  raise AssertionError(f"{key} was read before the checkpoint was known to fit")


def assert_same(a, b):
  assert set(a) == set(b)
  for key in a:
    assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
    assert a[key].tobytes() == b[key].tobytes(), key


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip_is_bit_exact(dtype):
  state = state_dict(dtype)
  state["model.embed.weight"][0, 0] = np.array([[np.nan, -0.0], [np.inf, 0.0]])
  leaves = fill(KEYMAP, state, SHAPES)
  assert {path: leaf.shape for path, leaf in leaves.items()} == SHAPES
  assert all(leaf.dtype == dtype for leaf in leaves.values())
  back = dict(engine.export(KEYMAP, leaves))
  assert all(array.flags.c_contiguous for array in back.values())
  assert_same(back, state)


def test_tensors_land_where_the_table_says():
  state = state_dict()
  leaves = fill(KEYMAP, state, SHAPES)
  # Block 4 is the second layer of the second stack; v is the second half.
  np.testing.assert_array_equal(
    leaves["blocks/1/kv/kernel"][1, :, 4:], state["model.blocks.4.to_v.weight"].T
  )
  np.testing.assert_array_equal(
    leaves["blocks/0/ff/1/bias"][2], state["model.blocks.2.ff.1.bias"]
  )
  np.testing.assert_array_equal(
    leaves["down/11/resnets/0/conv/kernel"][1, 2, 3, 4],
    state["model.down_blocks.11.resnets.0.conv.weight"][4, 3, 1, 2],
  )
  np.testing.assert_array_equal(
    leaves["mid/q/kernel"], state["model.mid.attn.q.weight"][:, :, 0, 0].T
  )


def test_groups_may_change_their_order():
  keymap = engine.Keymap((Rule(r"a\.(\d+)\.(\d+)", "x/{1}/y/{0}"),))
  state = {"a.1.2": np.ones(3, np.float32), "a.3.2": np.zeros(3, np.float32)}
  shapes = {"x/2/y/1": (3,), "x/2/y/3": (3,)}
  leaves = fill(keymap, state, shapes)
  assert leaves["x/2/y/1"].all() and not leaves["x/2/y/3"].any()
  assert_same(dict(engine.export(keymap, leaves)), state)


def test_one_error_lists_everything_before_anything_is_read():
  state = state_dict()
  extra = np.zeros((2, 3), np.float32)
  state["model.blocks.5.to_k.weight"] = extra  # past the depth
  state["model.blocks.3.ff.1.bias"] = extra  # a layer that has no such part
  state["model.surprise"] = extra
  state["no_prefix"] = extra
  state["model.embed.weight"] = np.zeros((6, 3, 2, 1), np.float32)
  state["model.blocks.1.to_k.bias"] = np.zeros(8, np.float32)
  del state["model.blocks.4.to_v.weight"]
  del state["model.down_blocks.0.resnets.1.conv.weight"]
  source = {key: (array.shape, array.dtype) for key, array in state.items()}
  shapes = SHAPES | {"head/kernel": (1, 2)}
  with pytest.raises(ConversionError) as e:
    engine.fill(KEYMAP, source, shapes, never_read, name="tiny.safetensors")
  assert str(e.value).splitlines() == [
    "tiny.safetensors: 9 problem(s)",
    "  model.embed.weight has shape (6, 3, 2, 1), the model needs (6, 3, 2, 2)",
    "  model.blocks.1.to_k.bias has shape (8,), the model needs (4,)",
    "  unexpected key model.blocks.5.to_k.weight of shape (2, 3)",
    "  unexpected key model.blocks.3.ff.1.bias of shape (2, 3)",
    "  unexpected key model.surprise of shape (2, 3)",
    "  unexpected key no_prefix of shape (2, 3)",
    "  missing key model.blocks.4.to_v.weight of shape (4, 6)",
    "  missing key model.down_blocks.0.resnets.1.conv.weight of shape (5, 5, 3, 3)",
    "  no row of the table fills head/kernel",
  ]


def test_ignored_keys_are_not_read_and_not_written():
  state = state_dict()
  source = {key: (array.shape, array.dtype) for key, array in state.items()}
  source["model.blocks.0.position_ids"] = ((1, 77), np.dtype(np.int64))
  leaves = engine.fill(KEYMAP, source, SHAPES, state.__getitem__)
  assert all(leaf.dtype == np.float32 for leaf in leaves.values())
  assert set(dict(engine.export(KEYMAP, leaves))) == set(state)


def test_tensors_are_read_one_at_a_time_in_source_order():
  state = state_dict()
  log = []

  def read(key):
    log.append(("read", key))
    return state[key]

  source = {key: (array.shape, array.dtype) for key, array in state.items()}
  engine.fill(
    KEYMAP,
    source,
    SHAPES,
    read,
    on_tensor=lambda key, array: log.append(("done", key)),
  )
  assert log == [(what, key) for key in state for what in ("read", "done")]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtype_casts_every_parameter(dtype):
  state = state_dict(ml_dtypes.bfloat16 if dtype == np.float32 else np.float32)
  leaves = fill(KEYMAP, state, SHAPES, dtype=dtype)
  assert all(leaf.dtype == dtype for leaf in leaves.values())
  np.testing.assert_array_equal(
    leaves["mid/q/kernel"],
    state["model.mid.attn.q.weight"][:, :, 0, 0].T.astype(dtype),
  )


def test_mixed_dtypes_stay_mixed_and_fused_tensors_take_the_widest():
  state = state_dict(ml_dtypes.bfloat16)
  for key in ("model.blocks.1.to_k.weight", "model.mid.attn.q.weight"):
    state[key] = state[key].astype(np.float32) * np.float32(1.001)
  leaves = fill(KEYMAP, state, SHAPES)
  wide = {path for path, leaf in leaves.items() if leaf.dtype == np.float32}
  assert wide == {"blocks/0/kv/kernel", "mid/q/kernel"}
  np.testing.assert_array_equal(
    leaves["blocks/0/kv/kernel"][1, :, :4], state["model.blocks.1.to_k.weight"].T
  )

  state["model.blocks.4.to_k.weight"] = np.zeros((4, 6), np.float16)
  with pytest.raises(
    ConversionError, match=r"4\.to_k\.weight is float16, but .* bfloat16"
  ):
    fill(KEYMAP, state, SHAPES)
  assert fill(KEYMAP, state, SHAPES, dtype=np.float32)


def test_two_rows_for_one_key():
  state = state_dict()
  again = Rule(r"mid\.attn\.(\d+|q)\.weight", "mid/q/kernel", CONV_1X1)
  keymap = engine.Keymap((*KEYMAP.rules, again), (), KEYMAP.stacks, KEYMAP.prefix)
  with pytest.raises(ConversionError, match=r"'model.mid.attn.q.weight' matches"):
    engine.locate(keymap, "model.mid.attn.q.weight")
  with pytest.raises(ConversionError):
    fill(keymap, state, SHAPES)


TABLES = {
  "two keys, one parameter": (
    (Rule(r"a\.weight", "w"), Rule(r"b\.weight", "w")),
    r"does not cover w once",
  ),
  "a third is missing": (
    (Rule(r"q", "w", part=(0, 3)), Rule(r"k", "w", part=(1, 3))),
    r"does not cover w once",
  ),
  "no equal parts": (
    (Rule(r"q", "w", part=(0, 4)), Rule(r"k", "w", part=(1, 4)))
    + (Rule(r"v", "w", part=(2, 4)), Rule(r"g", "w", part=(3, 4))),
    r"w of shape \(6,\) has no 4 equal parts",
  ),
  "one key, two parameters": (
    (Rule(r"a\.weight", "w"), Rule(r"a\.weight", "u")),
    r"not one to one at 'a.weight'",
  ),
  "not invertible": ((Rule(r"a\.\w+", "w"),), r"cannot be inverted"),
  "a group that the path drops": ((Rule(r"a\.(\d+)", "w"),), r"cannot be inverted"),
}


@pytest.mark.parametrize("rules, message", TABLES.values(), ids=TABLES)
def test_wrong_tables(rules, message):
  with pytest.raises(ConversionError, match=message):
    engine.torch_keys(engine.Keymap(rules), {"w": (6,), "u": (6,)})


def test_stacks_that_do_not_fit_the_model():
  with pytest.raises(ConversionError, match=r"fills layers \[0, 1\] of blocks/1/ff"):
    engine.torch_keys(KEYMAP, SHAPES | {"blocks/1/ff/0/bias": (4, 5)})


def test_export_needs_a_key_for_every_parameter():
  leaves = fill(KEYMAP, state_dict(), SHAPES)
  leaves["head/kernel"] = np.zeros((1, 2), np.float32)
  with pytest.raises(ConversionError, match=r"weights: no torch key for head/kernel"):
    dict(engine.export(KEYMAP, leaves, name="weights"))


def test_rows_for_particular_layers():
  """The last layer may have a row of its own, with another layout."""
  flip = engine.Transform(lambda a: a[::-1], lambda a: a[::-1])
  keymap = engine.Keymap(
    (
      Rule(r"blocks\.(0)\.b", "blocks[{0}]/b"),
      Rule(r"blocks\.(1)\.b", "blocks[{0}]/b", flip),
    ),
    stacks={"blocks": (2,)},
  )
  state = {f"blocks.{i}.b": np.arange(3, dtype=np.float32) + i for i in range(2)}
  leaves = fill(keymap, state, {"blocks/0/b": (2, 3)})
  np.testing.assert_array_equal(leaves["blocks/0/b"], [[0, 1, 2], [3, 2, 1]])
  assert_same(dict(engine.export(keymap, leaves)), state)


def test_keys_that_a_layout_leaves_out_are_zero():
  keymap = engine.Keymap(
    (Rule(r"blocks\.(\d+)\.a", "blocks[{0}]/a"),),
    stacks={"blocks": (2, 1)},
    zeros=(r"blocks\.2\.a",),
  )
  shapes = {"blocks/0/a": (2, 3), "blocks/1/a": (1, 3)}
  state = {f"blocks.{i}.a": np.ones(3, ml_dtypes.bfloat16) for i in range(2)}
  leaves = fill(keymap, state, shapes)
  assert leaves["blocks/0/a"].all() and not leaves["blocks/1/a"].any()
  assert leaves["blocks/1/a"].dtype == ml_dtypes.bfloat16
  assert_same(dict(engine.export(keymap, leaves)), state)

  with pytest.raises(ConversionError, match=r"unexpected key blocks.2.a"):
    fill(keymap, state | {"blocks.2.a": np.ones(3, np.float32)}, shapes)
  leaves["blocks/1/a"][0, 0] = 1
  with pytest.raises(ConversionError, match=r"blocks.2.a is not 0"):
    dict(engine.export(keymap, leaves))


def test_values_that_a_transform_rejects():
  def reject(array):
    raise ConversionError("not a table of positions")

  rule = Rule(r"pos", "pos", engine.Transform(reject, lambda a: a))
  with pytest.raises(ConversionError, match=r"vae: pos: not a table of positions"):
    fill(engine.Keymap((rule,)), {"pos": np.ones(2)}, {"pos": (2,)}, name="vae")
