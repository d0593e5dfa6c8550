"""Launches that a step makes again for each layer, on other memory: what Triton finds out about one is found out once.

Triton's own launch takes the host some 15 us, and a checked wrapper as much again: most of it goes into what the
arguments are, which is the same for all layers of a step. A step with prompt chunks has 64 or 96 such launches, and
several GPUs take it less time than they all take the host.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from triton import knobs
from triton.compiler import CompiledKernel

_ALIGNMENT = 16  # bytes: all that a variant of a kernel may know of an address


class Launch:
    """One kernel with its grid and its arguments, for one stream, which is the current one when it is run first.

    It keeps its tensors alive. That the stream and the device are the current ones is for its owner to see to.
    """

    always_anew: ClassVar[bool] = False  # while launches go another way than to the GPU (workers/kernel_compile.py)

    def __init__(
        self,
        kernel: Any,  # noqa: ANN401 (of the compiler, or of the interpreter)
        grid: tuple[int, int, int],
        arguments: Mapping[str, object],
        options: Mapping[str, object],
    ) -> None:
        """`arguments`: of all the kernel's parameters, by name; `options`: num_warps and the like."""
        self._kernel, self._grid, self._options = kernel, grid, options
        self.arguments: dict[str, Any] = dict(arguments)
        # What the compiled kernel takes, in the order of its parameters; None until it has been run.
        self._compiled: CompiledKernel | None = None
        self._stream = 0
        self._places: dict[str, int] = {}
        self._values: list[object] = []

    def run(self, **tensors: torch.Tensor) -> None:
        """Launches, on `tensors` in the place of those arguments, like which they are: of the same type, shape and
        strides, and as well aligned."""
        if self._compiled is None or self.always_anew or _is_watched():
            self.run_anew(**tensors)
        else:
            self.run_again(**tensors)

    def run_anew(self, **tensors: torch.Tensor) -> None:
        """Launches as Triton does: finds the kernel's variant, and compiles it if need be."""
        self.arguments.update(tensors)
        compiled = self._kernel[self._grid](**self.arguments, **self._options)
        # The interpreter gives nothing, and a compiler that works beside us the promise of a kernel.
        if isinstance(compiled, CompiledKernel):
            self._remember(compiled)

    def run_again(self, **tensors: torch.Tensor) -> None:
        """Launches the variant that ran before."""
        compiled, values = self._compiled, self._values
        assert compiled is not None, "it has been run"
        for name, tensor in tensors.items():
            place, address = self._places[name], tensor.data_ptr()
            before = values[place]
            assert isinstance(before, int)
            assert not (address ^ before) % _ALIGNMENT, f"{name} is aligned otherwise"
            values[place] = address
        compiled.run(*self._grid, self._stream, compiled.function, compiled.packed_metadata, None, None, None, *values)

    def _remember(self, compiled: CompiledKernel) -> None:
        names = self._kernel.arg_names
        arguments = self.arguments
        # Triton takes an address for a pointer, and asks nothing about it.
        self._values = [
            value.data_ptr() if isinstance(value, torch.Tensor) else value for value in (arguments[n] for n in names)
        ]
        self._places = {name: place for place, name in enumerate(names) if isinstance(arguments[name], torch.Tensor)}
        self._stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
        self._compiled = compiled


def _is_watched() -> bool:
    """Whether somebody, as a profiler, wants to hear of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
