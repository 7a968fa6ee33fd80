"""A model that ``fully_shard`` was applied to, for a while as it was before."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def states_of(module: nn.Module) -> Iterator[Any]:
    """What FSDP2 keeps of the modules that it was applied to, each once."""
    seen: set[int] = set()
    for one in module.modules():
        get = getattr(one, "_get_fsdp_state", None)
        state = None if get is None else get()
        if state is not None and id(state) not in seen:
            seen.add(id(state))
            yield state


_laid_bare: set[int] = set()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to it, or to a part of it, and it is not ``bare``."""
    return id(module) not in _laid_bare and any(True for _ in states_of(module))


def groups_of(module: nn.Module) -> Iterator[Any]:
    """Its groups of parameters: each is gathered and reduced in one collective."""
    for state in states_of(module):
        if hasattr(state, "_fsdp_param_groups"):
            yield from state._fsdp_param_groups
        elif state._fsdp_param_group is not None:  # PyTorch 2.11
            yield state._fsdp_param_group


def reshard(module: nn.Module) -> None:
    """Let the module hold its sharded parameters; a forward pass may have left whole ones there."""
    for group in groups_of(module):
        group.reshard()


@contextmanager
def bare(module: nn.Module) -> Generator[None]:
    """Inside, the module holds whole parameters of its own, and calls nothing of FSDP2.

    Every rank must enter: their values are gathered. Memory: all parameters, on every rank.
    """
    reshard(module)
    sharded: dict[int, Any] = {id(p): p for p in module.parameters()}
    whole = {
        key: nn.Parameter(p.detach().full_tensor().clone(), p.requires_grad)
        for key, p in sharded.items()
    }
    modules: list[Any] = [*module.modules()]
    holding: list[tuple[dict[str, Any], str, Any]] = []
    hooking: list[tuple[Any, dict[int, Any]]] = []
    states = [*states_of(module)]
    for one in modules:
        for key, p in one._parameters.items():
            if p is not None:
                holding.append((one._parameters, key, p))
        hooking += [(h, dict(h)) for h in (one._forward_pre_hooks, one._forward_hooks)]
    try:
        for held, key, p in holding:
            held[key] = whole[id(p)]
        for hooks, all_of_them in hooking:
            for key, hook in all_of_them.items():
                if _owner(hook) in states:
                    del hooks[key]
        for state in states:  # methods of register_fsdp_forward_method look them up
            state._pre_forward, state._post_forward = _pass_arguments, _pass_output
        _laid_bare.add(id(module))
        yield
    finally:
        _laid_bare.discard(id(module))
        for state in states:
            vars(state).pop("_pre_forward", None)
            vars(state).pop("_post_forward", None)
        for hooks, all_of_them in hooking:
            hooks.clear()
            hooks.update(all_of_them)
        for held, key, p in holding:
            held[key] = p


def _pass_arguments(_module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def _pass_output(_module: Any, _args: Any, output: Any) -> Any:
    return output


def _owner(hook: Any) -> Any:
    """The object whose method a hook is, or wraps."""
    while not hasattr(hook, "__self__") and hasattr(hook, "__wrapped__"):
        hook = hook.__wrapped__
    return getattr(hook, "__self__", None)
