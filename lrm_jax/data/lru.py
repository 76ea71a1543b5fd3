"""A cache of the things asked for last, shared by threads."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class _Entry(Generic[T]):
  def __init__(self):
    self.lock = threading.Lock()
    self.value: T | None = None


class Cache(Generic[T]):
  """The last `size` results of `make(key)`, for many threads.

  Threads that ask for the same key at once wait for one of them to make it; different
  keys are made in parallel. An error is raised to whoever asked, and not kept.
  """

  def __init__(self, size: int, make: Callable[[Hashable], T]):
    self._size = size
    self._make = make
    self._lock = threading.Lock()
    self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()

  def __getitem__(self, key: Hashable) -> T:
    with self._lock:
      entry = self._entries.setdefault(key, _Entry())
      self._entries.move_to_end(key)
      while len(self._entries) > self._size:
        self._entries.popitem(last=False)
    with entry.lock:
      if entry.value is None:
        entry.value = self._make(key)
      return entry.value
