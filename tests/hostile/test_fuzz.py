"""Both readers, of tensors and of the log, given bytes that nobody wrote."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load as load_with_the_package
from safetensors.torch import save

import culpa
from culpa.trajectory import batches, rng, tensors
from culpa.trajectory.layout import Layout, row_bytes
from culpa.trajectory.schema import LOG, MANIFEST, state_name
from culpa.trajectory.state import State
from hostile import forge

Edits = list[tuple[float, int, bytes]]
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4
)
"""Where, how many bytes go, which come instead."""


def mutated(data: bytes, changes: Edits) -> bytes:
    found = bytearray(data)
    for where, gone, come in changes:
        at = int(where * len(found))
        found[at : at + gone] = come
    return bytes(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forge.record(tmp_path_factory.mktemp("fuzz") / "run").path


@settings(max_examples=400)
@given(changes=edits, k=st.sampled_from([0, 2]))
def test_states(run: Path, changes: Edits, k: int) -> None:
    data = mutated((run / state_name(k)).read_bytes(), changes)
    try:
        state = State.decode(data)
    except culpa.CulpaError:
        return
    # What is read as a state is exactly that file, as the package reads and writes it.
    assert save(state.flat()) == save(load_with_the_package(data))


@settings(max_examples=300)
@given(data=st.binary(max_size=200))
def test_noise_is_no_state(data: bytes) -> None:
    with suppress(culpa.CulpaError):
        assert State.decode(data).flat() == {}


DTYPES = sorted(tensors.DTYPES.values(), key=str)
names = st.text(min_size=1, max_size=12).filter(
    lambda name: not any("\ud800" <= letter <= "\udfff" for letter in name)
)


@settings(max_examples=200)
@given(
    st.dictionaries(
        names,
        st.tuples(
            st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 255)
        ),
        max_size=5,
    )
)
def test_what_the_package_writes_is_read_as_it_reads_it(described: dict[str, Any]) -> None:
    tree = {}
    for name, (dtype, shape, byte) in described.items():
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = torch.full((count,), byte % 2 if dtype is torch.bool else byte, dtype=torch.uint8)
        tree[name] = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    data = save(tree)
    found, expected = tensors.load(memoryview(data)), load_with_the_package(data)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        assert value.reshape(-1).view(torch.uint8).tolist() == (
            expected[name].reshape(-1).view(torch.uint8).tolist()
        )


@settings(max_examples=300)
@given(changes=edits)
def test_manifests(run: Path, changes: Edits) -> None:
    original = (run / MANIFEST).read_bytes()
    data = mutated(original, changes)
    try:
        (run / MANIFEST).write_bytes(data)
        forge.examine(run)
        assert data == original
    except culpa.CulpaError:
        assert data != original
    finally:
        (run / MANIFEST).write_bytes(original)


@settings(max_examples=80)
@given(changes=edits)
def test_logs(run: Path, changes: Edits) -> None:
    original = (run / LOG).read_bytes()
    honest = forge.contents(run / LOG)
    try:
        (run / LOG).write_bytes(mutated(original, changes))
        try:
            forge.walk(run)
            forge.examine(run)
        except culpa.CulpaError:
            return
        assert forge.contents(run / LOG) == honest
    finally:
        (run / LOG).write_bytes(original)


@settings(max_examples=300)
@given(changes=edits)
def test_layouts(run: Path, changes: Edits) -> None:
    data = mutated(culpa.open_run(run).tables.layouts[0].encode(), changes)
    try:
        layout = Layout.decode(data)
        size = row_bytes(layout.root)
        if size < 2**16:
            batches.decode(layout, np.zeros((1, size), dtype=np.uint8))
    except culpa.CulpaError:
        pass


@settings(max_examples=300)
@given(changes=edits, k=st.integers(0, 5))
def test_micro_batches(run: Path, changes: Edits, k: int) -> None:
    opened = culpa.open_run(run)
    row = opened.tables.log.row("step", k)
    try:
        record = opened.tables.decode_step((*row[:3], mutated(row[3], changes), *row[4:]))
        for micro in record.micro_batches:
            opened._batch(k, micro)
    except culpa.CulpaError:
        pass


@settings(max_examples=200)
@given(changes=edits)
def test_random_states(run: Path, changes: Edits) -> None:
    opened = culpa.open_run(run)
    _, data = opened.tables.log.row("random", 1)
    opened.tables.log.row = lambda table, key: (key, mutated(data, changes))  # type: ignore[method-assign]
    with suppress(culpa.CulpaError), rng.preserved():
        rng.restore(opened.tables.random(1))
        torch.rand(700), np.random.rand(700), random.random()  # noqa: NPY002
