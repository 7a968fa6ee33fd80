"""A module with other tensors in place of its own, for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from culpa.errors import ProblemError

Place = tuple[dict[str, Any], str, Tensor | None]
"""Where a module holds a tensor: its dictionary, the key there, and the tensor itself."""
Lending = Callable[[nn.Module], AbstractContextManager[Any]]
"""What is done to a module for as long as it has other tensors."""
_lending: ContextVar[Lending] = ContextVar("lending", default=lambda _: nullcontext())


@contextmanager
def lending(how: Lending) -> Generator[None]:
    """Inside, every module that is swapped is lent in this way besides."""
    token = _lending.set(how)
    try:
        yield
    finally:
        _lending.reset(token)


class Places:
    """Everywhere a model holds each tensor, by the first name, which ``named_parameters`` gives.

    Looked for again only if the model has changed since: that takes a twentieth of looking for
    them, which ``functional_call`` does at every call. For a small network that was a tenth of a
    gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._sizes: list[tuple[nn.Module, dict[str, Any], dict[str, Any], int]] = []
        self._all: list[Place] = []
        self._named: dict[str, list[Place]] = {}
        self._look()

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Generator[None]:
        """The model with these tensors, wherever one is shared.

        Raises:
            ProblemError: for a name that the model does not have.
        """
        with _lending.get()(self._model):
            if not self._still_there():
                self._look()
            before = list[Place]()
            try:
                for name, tensor in tensors.items():
                    if name not in self._named:
                        raise ProblemError(
                            f"the model has no parameter or buffer {name!r}, which it had when this"
                            " was recorded. Build it as the training script did."
                        )
                    for place in self._named[name]:
                        held, key, _ = place
                        before.append(place)
                        held[key] = tensor
                yield
            finally:
                for held, key, own in before:
                    held[key] = own

    def _still_there(self) -> bool:
        """Whether every module has the same children, and holds the same tensors."""
        return (
            all(now == then for now, then in self._children)
            and all(
                module._parameters is params  # pyright: ignore[reportPrivateUsage]
                and len(params) + len(buffers) == size
                for module, params, buffers, size in self._sizes
            )
            and all(held.get(key, self) is tensor for held, key, tensor in self._all)
        )

    def _look(self) -> None:
        self._children, self._sizes, self._all, self._named = [], [], [], {}
        first: dict[int, str] = {}
        seen: set[int] = set()

        def walk(module: nn.Module, prefix: str) -> None:
            seen.add(id(module))
            params, buffers = module._parameters, module._buffers  # pyright: ignore[reportPrivateUsage]
            self._sizes.append((module, params, buffers, len(params) + len(buffers)))
            for held in (params, buffers):
                for key, tensor in held.items():
                    self._all.append((held, key, tensor))
                    if tensor is not None:
                        name = first.setdefault(id(tensor), prefix + key)
                        self._named.setdefault(name, []).append((held, key, tensor))
            children = module._modules  # pyright: ignore[reportPrivateUsage]
            self._children.append((children, dict(children)))
            for key, child in children.items():
                if child is not None and id(child) not in seen:
                    walk(child, f"{prefix}{key}.")

        walk(self._model, "")
