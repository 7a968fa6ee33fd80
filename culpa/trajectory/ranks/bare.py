"""A model that ``fully_shard`` was applied to, for a while as it was before."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from culpa.trajectory.ranks.group import ranks
from culpa.trajectory.ranks.lent import held_in_shards, pieces_of


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
    whole = {
        id(p): nn.Parameter(p.detach().full_tensor().clone(), p.requires_grad)
        for p in _sharded(module).values()
    }
    holding: list[tuple[dict[str, Any], str, Any]] = [
        (one.__dict__["_parameters"], key, p)
        for one in module.modules()
        for key, p in one.named_parameters(recurse=False, remove_duplicate=False)
    ]
    try:
        for held, key, p in holding:
            held[key] = whole[id(p)]
        with _unhooked(module):
            yield
    finally:
        for held, key, p in holding:
            held[key] = p


@contextmanager
def in_pieces(module: nn.Module) -> Generator[None]:
    """Inside, the module computes with this rank's shards, and calls nothing of FSDP2.

    They are the very shards that it holds, so that whoever writes there puts back what was there.
    For use where parameters are gathered one at a time (lent.py).
    """
    reshard(module)
    own = {name: p.detach().to_local() for name, p in _sharded(module).items()}
    with held_in_shards(module, pieces_of(ranks()), own), _unhooked(module):
        yield


def _sharded(module: nn.Module) -> dict[str, Any]:
    return dict(module.named_parameters())


@contextmanager
def _unhooked(module: nn.Module) -> Generator[None]:
    """Inside, FSDP2 does nothing before and after forward passes."""
    hooking: list[tuple[Any, dict[int, Any]]] = [
        (hooks, dict(hooks))
        for one in module.modules()
        for hooks in (one.__dict__["_forward_pre_hooks"], one.__dict__["_forward_hooks"])
    ]
    states = [*states_of(module)]
    try:
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


def _pass_arguments(_module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def _pass_output(_module: Any, _args: Any, output: Any) -> Any:
    return output


def _owner(hook: Any) -> Any:
    """The object whose method a hook is, or wraps."""
    while not hasattr(hook, "__self__") and hasattr(hook, "__wrapped__"):
        hook = hook.__wrapped__
    return getattr(hook, "__self__", None)
