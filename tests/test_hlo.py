"""Byte counts, loop lengths and cycles read from HLO, hand-written and compiled."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from lrm_jax import hlo


@pytest.mark.parametrize(
  "shape, size",
  [
    ("f32[8,16]{1,0:T(8,128)}", 8 * 16 * 4),
    ("bf16[2,1024]{1,0:T(8,128)(2,1)S(1)}", 2 * 1024 * 2),
    ("(f32[3]{0}, /*index=1*/s8[5], pred[])", 12 + 5 + 1),
    ("((f32[2], bf16[2]), u32[]{:S(2)})", 8 + 4 + 4),
    ("f8e4m3fn[16]", 16),
    ("u4[16]", 8),
    ("f32[<=4]", 16),
    ("token[]", 0),
  ],
)
def test_shape_bytes(shape, size):
  assert hlo.shape_bytes(shape) == size


def test_unknown_element_type():
  with pytest.raises(ValueError, match="'quux'"):
    hlo.shape_bytes("quux[4]")


def test_other_text_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("hello\n")


def module(entry: str, *computations: str) -> hlo.Program:
  blocks = [*computations, "ENTRY %main (p: f32[8]) -> f32[8] {\n" + entry + "\n}"]
  text = "HloModule m\n\n" + "\n\n".join(blocks) + "\n"
  return hlo.parse(text.replace("CYCLES", 'backend_config={"estimated_cycles":"10"}'))


COMPARE = """\
%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %p.1 = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}"""
BODY = """\
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p.2), index=1
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%a
  %f = f32[8]{0} fusion(%r), kind=kLoop, calls=%fused, CYCLES
  ROOT %t = (s32[], f32[8]) tuple(%i.2, %f)
}"""
FUSED = """\
%fused (q: f32[8]) -> f32[8] {
  %q = f32[8] parameter(0)
  ROOT %y = f32[8] add(%q, %q), CYCLES
}"""


@pytest.mark.parametrize("start, turns", [(0, 7), (2, 5)])
def test_loop_length_from_its_condition(start, turns):
  entry = f"""\
  %p = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %init = (s32[], f32[8]) tuple(%copied, %p)
  %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%w), index=1"""
  program = module(entry, COMPARE, BODY, FUSED)
  assert program.collective_bytes == {"all-reduce": turns * 32}
  assert program.collective_count == {"all-reduce": turns}
  assert program.wire_bytes == turns * 32 * 2 * 3 / 4
  assert program.cycles == turns * 10  # a fusion's, not also its parts'
  assert program.unknown_loops == ()


def test_annotated_loop_length_wins():
  entry = """\
  %p = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%p), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}"""
  assert module(entry, COMPARE, BODY, FUSED).cycles == 30


def test_loop_of_unknown_length_counts_once_and_is_named():
  entry = """\
  %p = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%p), condition=%other, body=%body"""
  other = "%other (p: s32[]) -> pred[] {\n  ROOT %q = pred[] parameter(0)\n}"
  program = module(entry, other, BODY, FUSED)
  assert program.unknown_loops == ("w",)
  assert program.cycles == 10


def test_asynchronous_pairs_and_chains_count_once():
  entry = """\
  %p = f32[8]{0} parameter(0)
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[32]{0} all-gather-done(%s)
  %c = (f32[8], f32[8], u32[]{:S(2)}, u32[]) collective-permute-start(%p), \
source_target_pairs={{0,1},{1,0}}
  %e = f32[8] collective-permute-done(%c)
  %f1 = f32[16] fusion(%p), kind=kCustom, calls=%piece1
  %f2 = f32[16] fusion(%f1), kind=kCustom, calls=%piece2
  %one = f32[8] all-reduce(%p), channel_id=4, \
replica_groups=mesh['a'=4,'b'=1] {'b'}, to_apply=%sum
  ROOT %out = f32[8]{0} copy(%e)"""
  piece = """\
%piece{0} (p: f32[8]) -> f32[16] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %g = f32[16] all-gather(%q), channel_id=9, replica_groups=mesh['a'=2,'b'=4] \
{{'a'}}, dimensions={{0}}, frontend_attributes={{chain_id="3"}}
}}"""
  program = module(entry, piece.format(1), piece.format(2))
  assert program.collective_bytes == {"all-gather": 128 + 64, "collective-permute": 32}
  assert program.collective_count == {"all-gather": 2, "collective-permute": 1}
  assert program.wire_bytes == 128 * 3 / 4 + 64 / 2 + 32


def test_custom_calls_and_line_breaks_in_attributes():
  entry = """\
  %p = f32[8]{0} parameter(0)
  %splash.12 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof": "(unbalanced"
}}, backend_config={"body":"x"}
  %a = f32[8] custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"
  %b = f32[8] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = f32[8]{0} copy(%splash.12)"""
  assert module(entry).custom_calls == {"__cudnn$fmhaSoftmax": 1, "splash": 1}


# --- compiled for 8 fake devices ---------------------------------------------------


def compiled(function, *shapes) -> hlo.Program:
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
  )
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return hlo.parse(jax.jit(mapped).lower(*args).compile().as_text())


def test_all_gather_in_a_scan():
  def layers(w):  # (1 512): a shard of each of 5 layers' weights, of 512 * 8 floats
    def body(carry, scale):
      return carry + lax.all_gather(w * scale + carry[:1, :512], "x").sum(), None

    carry, _ = lax.scan(body, w, jnp.arange(5.0))
    return carry

  program = compiled(layers, (8, 512))
  assert program.collective_bytes == {"all-gather": 5 * 8 * 512 * 4}
  assert program.collective_count == {"all-gather": 5}
  assert program.wire_bytes == 5 * 7 * 512 * 4
  assert program.unknown_loops == ()
  assert program.cycles is None


@pytest.mark.parametrize(
  "function, kind, size, wire",
  [
    (functools.partial(lax.psum, axis_name="x"), "all-reduce", 4096, 2 * 7 / 8),
    (
      lambda a: jnp.tile(lax.psum_scatter(a[0], "x", tiled=True), 8)[None],
      "reduce-scatter",
      4096,
      7 / 8,
    ),
    (
      lambda a: lax.ppermute(a, "x", [(i, (i + 1) % 8) for i in range(8)]),
      "collective-permute",
      4096,
      1,
    ),
    (
      lambda a: lax.all_to_all(a.reshape(8, 128), "x", 0, 0).reshape(1, -1),
      "all-to-all",
      4096,
      7 / 8,
    ),
  ],
  ids=["all-reduce", "reduce-scatter", "permute", "all-to-all"],
)
def test_each_kind(function, kind, size, wire):
  program = compiled(function, (8, 1024))
  assert program.collective_bytes == {kind: size}
  assert program.wire_bytes == size * wire


def test_nested_scans_multiply():
  def nested(w):
    def inner(c, _):
      return lax.psum(jnp.sin(c), "x"), None

    def outer(c, _):
      return jnp.cos(lax.scan(inner, c, None, length=3)[0]), None

    return lax.scan(outer, w, None, length=4)[0]

  assert compiled(nested, (8, 64)).collective_bytes == {"all-reduce": 12 * 64 * 4}
