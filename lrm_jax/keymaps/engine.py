"""One engine that moves weights between PyTorch state dicts and our parameters.

A `Keymap` is a table of anchored regexes, one row per kind of torch tensor. The
engine is total in both directions: every torch key must match exactly one row, every
parameter must be filled exactly once, shapes must agree; one error lists everything
that does not. It knows numpy only, and holds one torch tensor at a time.

Parameters are addressed by path, e.g. `blocks/1/attn/qkv/kernel`. In a row's path,
`blocks[{0}]` stands for layer number `{0}` (the regex's first group) of a stacked
module: `Keymap.stacks["blocks"]` lists the lengths of its homogeneous segments, so
with (13, 10, 1) the torch block 14 is index 1 of `blocks/1/...`.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np


class ConversionError(ValueError):
  """A checkpoint that does not fit; the message lists every problem found."""


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one torch tensor is laid out here, and the exact way back.

  `to_flax(array)` and `to_torch(array)` are inverse rearrangements of the elements
  (never arithmetic, so that round trips are bit-exact). `shape` maps a parameter's
  shape to the torch tensor's; None derives it from `to_torch`.
  """

  to_flax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]
  shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    if self.shape is not None:
      return self.shape(shape)
    # A zero-strided stand-in costs no memory, whatever the shape.
    return self.to_torch(np.broadcast_to(np.zeros((), np.uint8), shape)).shape


SAME = Transform(lambda a: a, lambda a: a)
LINEAR = Transform(lambda a: a.T, lambda a: a.T)  # (out, in) <-> (in, out)
CONV = Transform(  # OIHW <-> HWIO
  lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)
)
CONV_1X1 = Transform(  # (out, in, 1, 1) <-> (in, out)
  lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One row: torch keys matching `pattern` (anchored) fill `path`.

  `part=(i, n)`: the tensor is the i-th of n equal slices of the parameter's last
  axis (fused projections: torch's to_q, to_k, to_v are one kernel here).
  """

  pattern: str
  path: str
  transform: Transform = SAME
  part: tuple[int, int] = (0, 1)

  def __post_init__(self):
    re.compile(self.pattern)


@dataclasses.dataclass(frozen=True)
class Ignore:
  """Torch keys that carry no weight (buffers, duplicates), with the reason.

  They are not written on the way back.
  """

  pattern: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Keymap:
  """A model's table.

  `prefix` stands before every torch key of this layout. `zeros` are patterns (after
  the prefix) of keys that this layout leaves out although a row names them, e.g. the
  adapters that a release does not have in one of its layers: their slots hold zeros.
  """

  rules: tuple[Rule, ...]
  ignores: tuple[Ignore, ...] = ()
  stacks: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  prefix: str = ""
  zeros: tuple[str, ...] = ()

  def leaves_out(self, key: str) -> bool:
    tail = key[len(self.prefix) :]
    return any(re.fullmatch(pattern, tail) for pattern in self.zeros)


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where one torch tensor lives: a slice of one parameter."""

  path: str
  index: int | None  # position on the leading layer axis, None if not stacked
  transform: Transform
  part: tuple[int, int]

  def view(self, leaf: np.ndarray) -> np.ndarray:
    """The slice of `leaf` that the tensor fills (a view, so it can be written)."""
    if self.index is not None:
      leaf = leaf[self.index]
    i, n = self.part
    if n > 1:
      width = leaf.shape[-1] // n
      leaf = leaf[..., i * width : (i + 1) * width]
    return leaf

  def shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of that slice."""
    shape = leaf_shape if self.index is None else leaf_shape[1:]
    return (*shape[:-1], shape[-1] // self.part[1]) if self.part[1] > 1 else shape


_STACKED = re.compile(r"(\w+)\[(\d+)\]")


def _resolve(keymap: Keymap, rule: Rule, groups: tuple[str, ...]) -> Slot | None:
  """The slot of one match; None if its layer number is past the model's depth."""
  path = rule.path.format(*groups)
  m = _STACKED.search(path)
  if m is None:
    return Slot(path, None, rule.transform, rule.part)
  layer = int(m[2])
  for segment, length in enumerate(keymap.stacks[m[1]]):
    if layer < length:
      path = path[: m.start()] + f"{m[1]}/{segment}" + path[m.end() :]
      return Slot(path, layer, rule.transform, rule.part)
    layer -= length
  return None


def locate(keymap: Keymap, key: str) -> Slot | Ignore | None:
  """The slot (or the reason to skip) of one torch key; None if no row knows it.

  Raises:
    ConversionError: two rows match, i.e. the table itself is wrong.
  """
  if not key.startswith(keymap.prefix):
    return None
  tail = key[len(keymap.prefix) :]
  for ignore in keymap.ignores:
    if re.fullmatch(ignore.pattern, tail):
      return ignore
  found = [(r, m) for r in keymap.rules if (m := re.fullmatch(r.pattern, tail))]
  if len(found) > 1:
    raise ConversionError(f"key {key!r} matches {[r.pattern for r, _ in found]}")
  if not found:
    return None
  rule, match = found[0]
  return _resolve(keymap, rule, match.groups())


def torch_keys(
  keymap: Keymap, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Slot]:
  """Every torch key that the parameters `shapes` (path -> shape) correspond to."""
  keys: dict[str, Slot] = {}
  for rule in keymap.rules:
    path_regex = _path_regex(rule.path)
    stack = re.search(r"(\w+)\[\{0\}\]", rule.path)
    for path in shapes:
      if not (m := path_regex.fullmatch(path)):
        continue
      # In the pattern's order, which the path need not keep.
      numbers = tuple(value for _, value in sorted(m.groupdict().items()))
      if stack is None:
        layers = [numbers]
      else:
        runs = keymap.stacks[stack[1]]
        segment = int(numbers[0])
        first = sum(runs[:segment])
        layers = [
          (str(layer), *numbers[1:]) for layer in range(first, first + runs[segment])
        ]
      for groups in layers:
        tail = _unmatch(rule.pattern, groups)
        if not re.fullmatch(rule.pattern, tail):
          continue  # a row for particular layers, e.g. `blocks\.(23)\.`
        key = keymap.prefix + tail
        slot = _resolve(keymap, rule, groups)
        if slot is None or key in keys:
          raise ConversionError(f"table is not one to one at {key!r} ({rule.path})")
        keys[key] = slot
  _check_coverage(keys, shapes)
  return keys


def _check_coverage(keys: Mapping[str, Slot], shapes: Mapping[str, tuple[int, ...]]):
  """Every element of a parameter that the table knows has exactly one torch tensor."""
  parts: dict[str, dict[int | None, list[tuple[int, int]]]] = {}
  for slot in keys.values():
    layers = parts.setdefault(slot.path, {})
    layers.setdefault(slot.index, []).append(slot.part)
  for path, layers in parts.items():
    for layer, found in layers.items():
      n = found[0][1]
      if sorted(found) != [(i, n) for i in range(n)]:
        where = path if layer is None else f"{path}, layer {layer}"
        raise ConversionError(f"table does not cover {where} once: parts {found}")
      if n > 1 and shapes[path][-1] % n:
        raise ConversionError(f"{path} of shape {shapes[path]} has no {n} equal parts")
    if None not in layers and sorted(layers) != list(range(shapes[path][0])):
      raise ConversionError(
        f"table fills layers {sorted(layers)} of {path}, which has {shapes[path][0]}"
      )


def _path_regex(path: str) -> re.Pattern:
  """`blocks[{0}]/{1}` -> `blocks/(?P<g0>\\d+)/(?P<g1>\\d+)`, g0 being the segment."""
  path = re.sub(r"\[\{0\}\]", "/{0}", path)
  return re.compile(re.sub(r"\{(\d)\}", r"(?P<g\1>\\d+)", path))


def _unmatch(pattern: str, groups: tuple[str, ...]) -> str:
  """The one string that `pattern` matches with these groups.

  Rows are written so that this is possible: literals, `\\.`, and groups that are
  either `(\\d+)` or one number such as `(23)`.
  """
  for group in groups:
    pattern = re.sub(r"\((?:\\d\+|\d+)\)", group, pattern, count=1)
  text = pattern.replace("\\.", ".")
  if re.search(r"[\\()\[\]*+?|^$]", text):
    raise ConversionError(f"pattern {pattern!r} cannot be inverted")
  return text


def fill(
  keymap: Keymap,
  source: Mapping[str, tuple[tuple[int, ...], Any]],
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  *,
  dtype: Any = None,
  name: str = "checkpoint",
  on_tensor: Callable[[str, np.ndarray], None] = lambda key, array: None,
) -> dict[str, np.ndarray]:
  """Torch state dict -> parameters.

  Args:
    source: torch key -> (shape, numpy dtype), of this component only.
    shapes: parameter path -> shape, from the abstract model.
    read: returns one torch tensor as numpy; called once per key, in order.
    dtype: dtype of every parameter; None keeps each parameter's source dtype (the
      widest one, where fused tensors differ).
    name: what to call the source in errors.
    on_tensor: called after each tensor (progress).

  Returns: path -> array. Nothing is read until keys and shapes are known to fit.

  Raises:
    ConversionError: unknown, missing or doubly filled keys, wrong shapes, and values
      that the model cannot hold; all in one message.
  """
  slots, problems = match(keymap, source, shapes)
  if problems:
    raise ConversionError(report(name, problems))

  dtypes: dict[str, Any] = {}
  for key, slot in slots.items():
    found = source[key][1] if dtype is None else dtype
    try:
      dtypes[slot.path] = np.promote_types(dtypes.get(slot.path, found), found)
    except TypeError as e:  # bfloat16 with float16
      raise ConversionError(
        f"{name}: {key} is {found}, but the tensors fused with it are "
        f"{dtypes[slot.path]}; give the dtype to convert to"
      ) from e
  # Zeros, not empty: slots that the layout leaves out stay zero. A parameter of which
  # the layout has nothing takes the dtype of the first one that it has.
  other = next(iter(dtypes.values()), np.dtype(np.float32))
  leaves = {
    path: np.zeros(shape, dtypes.get(path, other)) for path, shape in shapes.items()
  }
  for key, slot in slots.items():
    array = read(key)
    view = slot.view(leaves[slot.path])
    try:
      with np.errstate(over="ignore"):  # reported below, with the key
        view[...] = slot.transform.to_flax(array)
    except ConversionError as e:
      raise ConversionError(f"{name}: {key}: {e}") from e
    if view.dtype == np.float16 != array.dtype and not np.all(np.isfinite(view)):
      raise ConversionError(
        f"{name}: {key} holds values beyond float16's range: choose bfloat16"
      )
    on_tensor(key, array)
  return leaves


def report(name: str, problems: list[str], most: int = 20) -> str:
  """One message for all problems; a wrong checkpoint has thousands, so it is cut."""
  shown = problems[:most]
  if len(problems) > most:
    shown.append(f"... and {len(problems) - most} more")
  return f"{name}: {len(problems)} problem(s)\n  " + "\n  ".join(shown)


def match(
  keymap: Keymap,
  source: Mapping[str, tuple[tuple[int, ...], Any]],
  shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Slot], list[str]]:
  """Pairs torch keys with slots. Returns (slots in source order, problems)."""
  slots: dict[str, Slot] = {}
  problems: list[str] = []
  expected = torch_keys(keymap, shapes)
  for key, (shape, _) in source.items():
    slot = locate(keymap, key)
    if isinstance(slot, Ignore):
      continue
    if slot is None or slot.path not in shapes or keymap.leaves_out(key):
      problems.append(f"unexpected key {key} of shape {tuple(shape)}")
      continue
    want = slot.transform.torch_shape(slot.shape(shapes[slot.path]))
    if tuple(shape) != tuple(want):
      problems.append(f"{key} has shape {tuple(shape)}, the model needs {tuple(want)}")
      continue
    slots[key] = slot
  for key, slot in expected.items():
    if key not in source and not keymap.leaves_out(key):
      want = slot.transform.torch_shape(slot.shape(shapes[slot.path]))
      problems.append(f"missing key {key} of shape {tuple(want)}")
  filled = {slot.path for slot in expected.values()}
  problems += [f"no row of the table fills {p}" for p in shapes if p not in filled]
  return slots, problems


def export(
  keymap: Keymap,
  leaves: Mapping[str, np.ndarray],
  *,
  name: str = "parameters",
  contiguous: bool = True,
) -> Iterable[tuple[str, np.ndarray]]:
  """Parameters -> torch state dict, one tensor at a time.

  Args:
    contiguous: as files need them; else views of the parameters, which is faster.

  Raises:
    ConversionError: a parameter that no row of the table writes.
  """
  keys = _written_keys(keymap, leaves, name)
  for key, slot in keys.items():
    view = slot.view(np.asarray(leaves[slot.path]))
    if keymap.leaves_out(key):
      if np.any(view):
        raise ConversionError(f"{name}: {key} is not 0, but not in this layout")
      continue
    tensor = slot.transform.to_torch(view)
    yield key, np.ascontiguousarray(tensor) if contiguous else tensor


def layout(
  keymap: Keymap, leaves: Mapping[str, np.ndarray], *, name: str = "parameters"
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """key -> (shape, dtype) of what `export` yields, without making it.

  Raises:
    ConversionError: a parameter that no row of the table writes.
  """
  return {
    key: (
      tuple(slot.transform.torch_shape(slot.shape(leaves[slot.path].shape))),
      leaves[slot.path].dtype,
    )
    for key, slot in _written_keys(keymap, leaves, name).items()
    if not keymap.leaves_out(key)
  }


def _written_keys(keymap: Keymap, leaves: Mapping, name: str) -> dict[str, Slot]:
  keys = torch_keys(keymap, {path: np.shape(leaf) for path, leaf in leaves.items()})
  written = {slot.path for slot in keys.values()}
  if left := sorted(set(leaves) - written):
    raise ConversionError(f"{name}: no torch key for {', '.join(left)}")
  return keys
