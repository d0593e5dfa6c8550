"""Which coordinator the server has, and word of the next one to those whose calls broke with the last."""

import threading
from collections.abc import Callable

from ..errors import UnavailableError


class Succession:
    """Owner of the number of the coordinator in office. Any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = 1
        self._wait_until_up: Callable[[], None] = lambda: None
        self._is_over = False

    @property
    def number(self) -> int:
        """Of the coordinator in office, or on its way there; the first is 1."""
        return self._number

    @property
    def wait_until_up(self) -> Callable[[], None]:
        """Returns when that one answers, and raises UnavailableError if it never will."""
        return self._wait_until_up

    def follow(self, wait_until_up: Callable[[], None]) -> None:
        """Another coordinator takes office."""
        with self._changed:
            self._number += 1
            self._wait_until_up = wait_until_up
            self._changed.notify_all()

    def end(self) -> None:
        """None follows any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def await_next(self, number: int) -> None:
        """Until one behind that of `number` answers. Raises UnavailableError if none will."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._number > number)  # noqa: B023 (called at once)
                if self._is_over:
                    raise UnavailableError("the server is ending")
                number, wait_until_up = self._number, self._wait_until_up
            try:
                wait_until_up()
                return
            except UnavailableError:  # it has died, too
                continue
