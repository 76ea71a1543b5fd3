"""What the text of a compiled XLA module says: collectives, loops, estimated cycles.

Reads `compiled.as_text()` of any backend. Byte counts are per chip: an all-gather
counts what it leaves on a chip (its output), a reduce-scatter what it takes from one
(its input), every other collective its output.
"""

from collections.abc import Mapping
import dataclasses
import math
import re

COLLECTIVES = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)

# libtpu's bookkeeping in the guise of custom calls.
_INTERNAL_CALLS = (
  "AllocateBuffer",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
  "ConcatBitcast",
  "Sharding",
)

_ITEM_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Program:
  """One run of a module on one chip.

  Loop bodies count as often as they run; of a conditional, every branch counts.

  Attributes:
    collective_bytes: kind -> bytes.
    collective_count: kind -> number of collectives.
    wire_bytes: bytes that must leave the chip for them, at least: (g - 1) / g of what
      a gather, scatter or exchange among g chips counts, twice that of an all-reduce.
    cycles: sum of the compiler's `estimated_cycles`; None if it gives none.
    custom_calls: target, or name of a Pallas kernel -> number of calls.
    unknown_loops: loops whose length is not in the text; their bodies count once.
  """

  collective_bytes: dict[str, int]
  collective_count: dict[str, int]
  wire_bytes: float
  cycles: int | None
  custom_calls: dict[str, int]
  unknown_loops: tuple[str, ...]


def parse(text: str) -> Program:
  """Reads a module.

  Raises:
    ValueError: not the text of an HLO module.
  """
  computations, entry = _computations(text)
  sizes = dict.fromkeys(COLLECTIVES, 0)
  counts = dict.fromkeys(COLLECTIVES, 0)
  calls: dict[str, int] = {}
  unknown: list[str] = []
  chains: set[tuple[str, str]] = set()
  wire, cycles = 0.0, None

  def walk(name: str, times: int, fused: bool) -> None:
    nonlocal wire, cycles
    body = computations[name]
    shapes = {i.name: i.shape for i in body}
    for i in body:
      kind = next((c for c in COLLECTIVES if i.opcode in (c, f"{c}-start")), None)
      if kind is not None and _is_first_of_chain(i, chains):
        group = _group_size(i)
        if group != 1:
          size = _collective_bytes(i, kind, shapes)
          sizes[kind] += times * size
          counts[kind] += times
          wire += times * size * _wire_share(kind, group)
      if i.opcode == "custom-call":
        call = _call_name(i)
        if call not in _INTERNAL_CALLS:
          calls[call] = calls.get(call, 0) + times
      # The cycles of a fusion are those of all that it fuses.
      if not fused and (m := re.search(r'"estimated_cycles":"(\d+)"', i.attributes)):
        cycles = (cycles or 0) + times * int(m[1])

      if i.opcode.endswith(("-done", "-update")):
        continue  # it names the computation of its start once more
      turns = 1
      if i.opcode == "while":
        found = _trip_count(i, body, computations)
        turns = 1 if found is None else found
        unknown.extend([i.name] * (found is None))
      for callee in _called(i):
        walk(callee, times * turns, fused or i.opcode == "fusion")

  walk(entry, 1, False)
  return Program(
    collective_bytes={kind: size for kind, size in sizes.items() if counts[kind]},
    collective_count={kind: count for kind, count in counts.items() if count},
    wire_bytes=wire,
    cycles=cycles,
    custom_calls=dict(sorted(calls.items())),
    unknown_loops=tuple(unknown),
  )


def shape_bytes(shape: str) -> int:
  """Bytes of a shape such as `(f32[8,16]{1,0}, s32[])`; layouts do not count.

  Raises:
    ValueError: an element type that we do not know.
  """
  total = 0
  for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", _without_layouts(shape)):
    bits = _ITEM_BITS.get(kind)
    if bits is None:  # f32, s8, u4, f8e4m3fn, ...
      m = re.match(r"[fsu](\d+)", kind)
      if m is None:
        raise ValueError(f"unknown element type {kind!r} in the HLO shape {shape}")
      bits = int(m[1])
    items = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
    total += -(-bits * items // 8)
  return total


# --- the text's structure ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """`name = shape opcode(operands), attributes`; the operand of a constant is it."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_START = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """(computation -> its instructions, the entry's name)."""
  found: dict[str, list[_Instruction]] = {}
  entry = name = None
  lines: list[str] = []
  for line in text.splitlines():
    if name is None:
      if m := _HEADER.match(line):
        name, lines = m[2], []
        entry = name if m[1] else entry
    elif line == "}":
      found[name] = [_instruction(one) for one in lines]
      name = None
    elif _START.match(line):
      lines.append(line)
    elif lines:
      lines[-1] += line  # attributes may hold line breaks (metadata of Pallas kernels)
  if entry is None or entry not in found:
    raise ValueError("this is not the text of an HLO module: it has no ENTRY")
  return found, entry


def _instruction(line: str) -> _Instruction:
  start = _START.match(line)
  rest = line[start.end() :]
  shape, rest = _balanced(rest) if rest[0] == "(" else rest.split(" ", 1)
  at = rest.index("(")
  opcode = rest[:at].strip()
  inside, attributes = _balanced(rest[at:])
  if opcode in ("constant", "parameter"):
    operands = [inside[1:-1]]
  else:
    operands = re.findall(r"%([\w.-]+)", inside)
  return _Instruction(start[1], shape, opcode, tuple(operands), attributes)


def _balanced(text: str) -> tuple[str, str]:
  """Splits `(a (b) c) rest` after the parenthesis that closes the first."""
  depth = 0
  for m in re.finditer(r"[()]", text):
    depth += 1 if m[0] == "(" else -1
    if depth == 0:
      return text[: m.end()], text[m.end() :]
  raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _without_layouts(shape: str) -> str:
  return re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", shape)


def _members(shape: str) -> list[str]:
  """Members of a tuple shape, nested tuples whole."""
  members, depth, last = [], 0, 0
  inside = _without_layouts(shape)[1:-1]
  for at, c in enumerate(inside):
    depth += (c in "([") - (c in ")]")
    if c == "," and depth == 0:
      members.append(inside[last:at])
      last = at + 1
  return [*members, inside[last:]]


def _called(i: _Instruction) -> list[str]:
  """Computations that run when this instruction does (not reductions' operators)."""
  roles = "to_apply" if i.opcode == "call" else "calls|body|true_computation"
  roles += "|false_computation"
  found = re.findall(rf"\b(?:{roles})=%?([\w.-]+)", i.attributes)
  if m := re.search(r"\bbranch_computations=\{([^}]*)\}", i.attributes):
    found += [name.strip().lstrip("%") for name in m[1].split(",")]
  return found


# --- collectives -------------------------------------------------------------------


def _is_first_of_chain(i: _Instruction, chains: set[tuple[str, str]]) -> bool:
  """False for later pieces of an asynchronous collective whose start was seen.

  libtpu spreads one collective over several fusions (start, steps, done); each repeats
  the instruction, with the same channel and chain.
  """
  channel = re.search(r"channel_id=(\d+)", i.attributes)
  chain = re.search(r'chain_id="(\d+)"', i.attributes)
  if channel is None or chain is None:
    return True
  key = (channel[1], chain[1])
  is_first = key not in chains
  chains.add(key)
  return is_first


def _group_size(i: _Instruction) -> int | None:
  """Chips that take part together; None where the text does not say (all)."""
  if m := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.attributes):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", m[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", m[2]))
  if m := re.search(r"replica_groups=\[\d+,(\d+)\]", i.attributes):
    return int(m[1])
  if m := re.search(r"replica_groups=\{\{([\d, ]+)\}", i.attributes):
    return len(m[1].split(","))
  return None


def _wire_share(kind: str, group: int | None) -> float:
  if kind in ("collective-permute", "collective-broadcast"):
    return 1.0
  share = 1.0 if group is None else (group - 1) / group
  return 2 * share if kind == "all-reduce" else share


def _collective_bytes(i: _Instruction, kind: str, shapes: Mapping[str, str]) -> int:
  if kind == "reduce-scatter":
    return sum(shape_bytes(shapes[name]) for name in i.operands)
  if i.opcode.endswith("-start") and kind != "all-reduce":
    # (inputs, outputs, and perhaps semaphores); that of an all-reduce is its output.
    return shape_bytes(_members(i.shape)[1])
  return shape_bytes(i.shape)


def _call_name(i: _Instruction) -> str:
  m = re.search(r'custom_call_target="([^"]*)"', i.attributes)
  if m is None or m[1] == "tpu_custom_call":
    return re.sub(r"[.\d]+$", "", i.name)  # Pallas kernels differ by name only
  return m[1]


# --- loops -------------------------------------------------------------------------


def _trip_count(
  loop: _Instruction,
  caller: list[_Instruction],
  computations: Mapping[str, list[_Instruction]],
) -> int | None:
  """How often a `while` runs: as annotated, or from `counter < constant`.

  The counter is taken to go up in ones, as jax's scan and fori_loop write it.
  """
  m = re.search(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)', loop.attributes)
  if m:
    return int(m[1])
  condition = re.search(r"\bcondition=%?([\w.-]+)", loop.attributes)
  body = computations.get(condition[1], []) if condition else []
  limits = [
    int(i.operands[0])
    for i in body
    if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.operands[0])
  ]
  if len(limits) != 1:
    return None
  return max(0, limits[0] - _first_counter(loop, caller, body))


def _first_counter(
  loop: _Instruction, caller: list[_Instruction], condition: list[_Instruction]
) -> int:
  """The counter before the first turn; 0 where the text hides it."""
  by_name = {i.name: i for i in caller}
  start = by_name.get(loop.operands[0]) if loop.operands else None
  counters = [
    int(re.search(r"index=(\d+)", i.attributes)[1])
    for i in condition
    if i.opcode == "get-tuple-element"
  ]
  if start is None or start.opcode != "tuple" or len(counters) != 1:
    return 0
  value = by_name.get(start.operands[counters[0]])
  while value is not None and value.opcode in ("copy", "bitcast"):
    value = by_name.get(value.operands[0])
  is_constant = value is not None and value.opcode == "constant"
  return int(value.operands[0]) if is_constant else 0
