"""A recorded run as one rank sees it that holds shards: what it reads, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from culpa.errors import OptionError, UnsupportedError
from culpa.trajectory.ranks.joined import holders
from culpa.trajectory.ranks.lent import pieces_of
from culpa.trajectory.ranks.shards import shard
from culpa.trajectory.schema import Reduction
from culpa.trajectory.state import on_cpu
from culpa.trajectory.tensors import Cut
from culpa.tree import Tree


def cut_of(shapes: Mapping[str, tuple[int, ...]]) -> Cut | None:
    """What this rank keeps of a state's tensors, by their paths; ``None``: all of them.

    Args:
        shapes: of all of them. An optimizer's slots of the shape of their parameter are cut as it
            is; numbers, and buffers, are every rank's.
    """
    group = holders()
    if group is None:
        return None

    def cut(path: str, value: Tensor) -> Tensor:
        kind, _, name = path.partition("/")
        owner = name if kind == "params" else name.partition("/")[2]
        if kind == "buffers" or not value.ndim or shapes[path] != shapes.get(f"params/{owner}"):
            return value
        return shard(value, group.rank, group.size).clone()

    return cut


def own(params: Tree) -> Tree:
    """This rank's shards of whole parameters, as copies; all of them where it holds all."""
    group = holders()
    if group is None:
        return params
    return {name: shard(value, group.rank, group.size).clone() for name, value in params.items()}


def require_shards(
    where: str,
    reductions: Iterable[Reduction | None],
    allow_drift: bool,
) -> None:
    """Raise unless the ranks of this job can walk a run with a shard each, where they are to.

    Args:
        where: the run, for messages.
        reductions: of its updates.
        allow_drift: what was asked for.

    Raises:
        UnsupportedError, OptionError: saying what is wrong.
    """
    group = holders()
    if group is None:
        return
    found = {None if r is None or not r.sharded else r.ranks for r in reductions}
    if found != {group.size}:
        made = ", ".join("without" if n is None else f"on {n} ranks" for n in found)
        raise UnsupportedError(
            f"across_ranks(shard=True) walks runs that were recorded with fully_shard, on as many"
            f" ranks as there are ({group.size}). That of {where} was recorded {made}."
            " culpa.across_ranks() walks any run, with the whole model on every rank."
        )
    if allow_drift:
        raise OptionError(
            "allow_drift=True cannot be combined with across_ranks(shard=True): a drift is not"
            " measured in shards. Leave out one of them."
        )


def refuse(wrong: Mapping[str, bool]) -> None:
    """Raise ``UnsupportedError`` for what was asked of ranks that hold shards, and they cannot do.

    Args:
        wrong: what, and whether it was.
    """
    asked = [what for what, is_so in wrong.items() if is_so]
    if asked and holders() is not None:
        raise UnsupportedError(
            f"{asked[0]} cannot be had inside of across_ranks(shard=True). culpa.across_ranks()"
            " can, with the whole model on every rank."
        )


def whole_on_first(params: Tree, model: nn.Module | None) -> Tree:
    """Parameters on the CPU, as the first rank writes them: whole, and nothing on the others.

    Where ranks hold shards this is collective, and takes one of them at a time.

    Raises:
        OptionError: if they do, and there is no model to tell the shapes.
    """
    group = holders()
    if model is not None:
        require_mine(params, model)
    if group is None:
        return on_cpu(params)
    if model is None:
        raise OptionError("shards are put together by the shapes of a problem's model; give one.")
    cut, found = pieces_of(group), dict[str, Tensor]()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, held in params.items():
        whole = cut(name, shapes[name]).whole(held)
        if group.first:
            found[name] = whole.cpu()
    return found


def require_mine(params: Tree, model: nn.Module) -> None:
    """Raise unless parameters are whole or, where ranks hold shards, this rank's.

    Raises:
        OptionError: for a result that was made inside of ``across_ranks(shard=True)`` and is used
            outside of it, or the other way round.
    """
    group = holders()
    for name, p in model.named_parameters():
        mine = p.shape if group is None else pieces_of(group)(name, p.shape).held
        if name in params and params[name].shape != mine:
            raise OptionError(
                f"{name} has shape {list(params[name].shape)}, expected {list(mine)}: it is whole"
                " or a shard. A result made inside of across_ranks(shard=True) holds this rank's"
                " shards, and is saved and evaluated inside, on every rank; any other outside."
            )


def first_writes(write: Callable[[], object]) -> None:
    """Let the first of the ranks that hold shards write for all of them.

    Raises:
        StoreError: on the others, if it fails.
    """
    group = holders()
    if group is None:
        write()
    else:
        group.on_first(write)


def mean(found: Tree) -> Tree:
    """Gradients that every rank made of the same numbers, and were summed over them, once."""
    group = holders()
    if group is None:
        return found
    return {name: value / group.size for name, value in found.items()}
