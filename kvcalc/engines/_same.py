"""A key for caches: an object as itself."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Same(Generic[T]):
    """Compares a value by its identity, so that a cache need not compare every layer of it."""

    __slots__ = ("it",)

    def __init__(self, it: T) -> None:
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it
