"""Orders to a rank to fail: a file named for its process, with one of ORDERS in it.

The rank removes the file when it obeys, so that whoever gave the order sees when.
"""

from pathlib import Path

ORDERS_VARIABLE = "OCTAVO_CHAOS_ORDERS"  # in the environment of a faulty server: the orders' directory
RAISE, DROP_REPLY, REPEAT_REPLY = ORDERS = ("raise", "drop-reply", "repeat-reply")


class Orders:
    """The orders to one process."""

    def __init__(self, directory: Path, process_id: int) -> None:
        self._path = directory / str(process_id)

    def give(self, order: str) -> None:
        written = self._path.with_suffix(".new")
        written.write_text(order)
        written.rename(self._path)

    @property
    def is_given(self) -> bool:
        """And not obeyed yet."""
        return self._path.exists()

    def withdraw(self) -> None:
        self._path.unlink(missing_ok=True)

    def take(self, *wanted: str) -> str | None:
        """The order, once, if it is one of those wanted. Several threads may ask."""
        if not self._path.exists():
            return None
        try:
            if (order := self._path.read_text()) not in wanted:
                return None
            self._path.unlink()
        except FileNotFoundError:  # another took it
            return None
        return order
