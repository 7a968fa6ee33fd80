"""``culpa.replay_many``: several counterfactuals at once, by ``vmap`` where that costs less."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from culpa.dynamics.lanes import Lanes
from culpa.dynamics.updates import CLOSED
from culpa.errors import OptionError, UnsupportedError
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.ahead import ahead
from culpa.trajectory.compared import Randomness
from culpa.trajectory.engine import Engine
from culpa.trajectory.fidelity import Fidelity
from culpa.trajectory.replay import Counterfactual, check_counterfactual, replay, updates_of
from culpa.trajectory.run import Run
from culpa.trajectory.state import State, on_cpu
from culpa.trajectory.walk import checked, session

WORTH = 0.9
"""``"auto"`` goes side by side where that takes less than this share of one after the other."""


class Replays(tuple[Counterfactual, ...]):
    """The counterfactuals, in the order asked for. ``how``: how they were made, and why so."""

    how: str = ""

    @classmethod
    def made(cls, found: Iterable[Counterfactual], how: str) -> Replays:
        """With the reason."""
        replays = cls(found)
        replays.how = how
        return replays


def replay_many(
    run: Run,
    problem: Problem,
    without: Sequence[str | Iterable[int | str]],
    *,
    counterfactual: str = "skip",
    side_by_side: bool | str = "auto",
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> Replays:
    """Several counterfactuals of one run: as ``culpa.replay`` of each, but for rounding.

    Side by side, all of them advance together through the recorded batches, each a lane of stacked
    parameters; a lane begins where its first removed update is. One more lane removes nothing: how
    far it ends from the recorded final state is the ``claim`` of all of them, such as ``"drift
    3.1e-7"``. It is never ``"bitwise"``, since ``vmap`` adds up in another order.

    Args:
        run, problem: as for ``culpa.replay``.
        without: what each leaves out: a stage's name, or names and update indices.
        counterfactual: see ``culpa.replay``.
        side_by_side: ``True``, ``False`` (one ``culpa.replay`` after the other, bit for bit), or
            ``"auto"``: where the run allows it, and where it is faster here, which is measured on
            one update: small models, whose time is overhead, and GPUs.
        allow_drift: see ``culpa.replay``.
        progress: see ``culpa.progress``.

    Returns:
        A tuple of ``culpa.Counterfactual``; its ``how`` says which way was taken, and why.
        Memory, side by side: parameters, moments and activations once for each lane.

    Raises:
        UnsupportedError: with ``side_by_side=True``, for an update that drew random numbers, was
            made by another optimizer than SGD, Adam or AdamW, by a loss scale or by several
            processes, and for a loss that ``vmap`` cannot take (data-dependent control flow).
        OptionError: for another ``side_by_side``.
        IntegrityError: as ``culpa.replay`` does; side by side only the first update is compared.
    """
    check_counterfactual(counterfactual)
    if side_by_side not in (True, False, "auto"):
        raise OptionError(f'side_by_side is True, False or "auto", got {side_by_side!r}.')
    if isinstance(without, str):
        raise OptionError(
            f"replay_many(without=...) is a list with an entry for each, got {without!r}: for one"
            " use culpa.replay."
        )
    removed = [updates_of(run, one) for one in without]
    watch = progress or Silent()
    reason = "asked for" if side_by_side is False else _against(run, removed)
    if not reason:
        try:
            with session(run, problem, allow_drift) as engine:
                found = _Sweep(run, problem, engine, removed, counterfactual)
                if side_by_side == "auto":
                    reason = found.slower()
                if not reason:
                    return Replays.made(found.outcomes(watch), f"side by side{found.why}")
        except (RuntimeError, UnsupportedError) as error:
            reason = f"vmap cannot take the loss: {' '.join(str(error).split())[:200]}"
    if side_by_side is True:
        raise UnsupportedError(
            f"these counterfactuals cannot be replayed side by side: {reason}. Leave side_by_side"
            ' out ("auto": one after the other where it must be).'
        )
    alone = (
        replay(
            run,
            problem,
            without=one,
            counterfactual=counterfactual,
            allow_drift=allow_drift,
            progress=progress,
        )
        for one in removed
    )
    return Replays.made(alone, f"one after the other: {reason}")


def _against(run: Run, removed: Sequence[frozenset[int]]) -> str:
    """What in the record speaks against going side by side; empty: nothing does."""
    if sum(1 for one in removed if one) < 2:
        return "fewer than two remove anything"
    for k in range(run.kept_before(min(min(one) for one in removed if one)), run.num_steps):
        record = run.step(k)
        other = [name for name in record.optimizer.classes if name not in CLOSED]
        if record.drew_randomness:
            return f"update {k} drew random numbers"
        if other:
            return f"update {k} was made by {other[0]}, not by one of {', '.join(CLOSED)}"
        if record.loss_scale is not None or record.discarded:
            return f"update {k} was made with a loss scale"
        if record.optimizer.reduction is not None:
            return f"update {k} was made by several processes"
    dtypes = {value.dtype for value in run.state(run.num_steps).params.values()}
    odd = [str(dtype) for dtype in dtypes if not dtype.is_floating_point]
    return f"a parameter is {odd[0]}" if odd else ""


class _Sweep:
    """One pass over the updates, all lanes together."""

    def __init__(
        self,
        run: Run,
        problem: Problem,
        engine: Engine,
        removed: Sequence[frozenset[int]],
        counterfactual: str,
    ) -> None:
        self.run, self.problem, self.engine = run, problem, engine
        self.removed, self.counterfactual = removed, counterfactual
        self.start = run.kept_before(min(min(one) for one in removed if one))
        self.why = ""

    def slower(self) -> str:
        """Why one after the other is the better way here, measured on the first update."""
        lanes = self._lanes()
        stop = self.run.num_steps
        total = stop - self.start
        work = sum(stop - min(one) - len(one) for one in self.removed if one)
        for _ in range(max(1, round(work / total))):
            lanes.join()
        record, batches = self.run.step(self.start), self.run.batches_of(self.start)
        randoms, everyone = self.run.randoms_of(self.start), range(lanes.count)
        self._prove()
        together, alone = list[float](), list[float]()
        for _ in range(4):  # the first is for whatever is set up once
            together.append(_seconds(lambda: lanes.advance(record, batches, everyone)))
            alone.append(
                _seconds(lambda: self.engine.execute(record, batches, randoms, keep=False))
            )
        share = min(together) / min(alone) / max(1.0, work / total)
        if share > WORTH:
            return f"{share:.2f} of the time by vmap here, measured on one update"
        self.why = f": {share:.2f} of the time of one after the other, measured on one update"
        return ""

    def outcomes(self, watch: Progress) -> list[Counterfactual]:
        """Walk, and tell how far the lane that removes nothing has drifted."""
        run, stop = self.run, self.run.num_steps
        self._prove()
        lanes, at = self._lanes(), dict[int, int]()
        watch.start("replay side by side", stop - self.start)
        try:
            for record, batches, _ in ahead(run, range(self.start, stop)):
                k = record.index
                for i, one in enumerate(self.removed):
                    if one and min(one) == k:
                        at[i] = lanes.join()
                out = {lane for i, lane in at.items() if k in self.removed[i]}
                after = [lane for i, lane in at.items() if k - 1 in self.removed[i]]
                if record.reset:
                    lanes.reset(range(lanes.count))
                if self.counterfactual == "restart":
                    lanes.reset([lane for lane in after if lane not in out])
                lanes.advance(record, batches, [i for i in range(lanes.count) if i not in out])
                if out and self.counterfactual == "zero-gradient":
                    lanes.tick(record, sorted(out))
                watch.advance()
        finally:
            watch.finish()
        fidelity = Fidelity(allow_drift=True, exact=False)
        fidelity.measure(lanes.state(0), run.state(stop))
        ends = [lanes.state(at.get(i, 0)) for i in range(len(self.removed))]
        return [self._outcome(*pair, fidelity) for pair in zip(self.removed, ends, strict=True)]

    def _outcome(self, one: frozenset[int], end: State, fidelity: Fidelity) -> Counterfactual:
        return Counterfactual(
            self.run.frozen_parameters() | on_cpu(end.params),
            on_cpu(end.buffers),
            tuple(sorted(one)),
            self.counterfactual,
            self.run.num_steps - self.start - len(one),
            fidelity.claim,
            self.run,
            self.problem,
        )

    def _lanes(self) -> Lanes:
        engine = self.engine
        state = self.run.state(self.start).placed(engine.params, engine.buffers)
        return Lanes(self.problem, state, 1 + sum(1 for one in self.removed if one))

    def _prove(self) -> None:
        """Execute the first update as it was, bit for bit: the loss is the recorded one."""
        first = range(self.start, self.start + 1)
        state = self.run.state(self.start)
        next(checked(self.run, self.engine, state, first, Randomness()))


def _seconds(update: Callable[[], object]) -> float:
    began = time.perf_counter()
    update()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
