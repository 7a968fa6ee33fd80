"""Runs on S3, served by moto on this machine: the same numbers, and only what is needed fetched."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

import culpa
from hostile import forge

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs", reason="needs `pip install s3fs 'moto[s3,server]'` (300 MB)")
server = pytest.importorskip(
    "moto.server", reason="needs `pip install s3fs 'moto[s3,server]'` (300 MB)"
)

ADDRESS = "s3://bucket/run"
# The packages of the store warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def store() -> Generator[Any]:
    """An S3 that lives as long as this module's tests."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "nobody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield fsspec.filesystem("s3")
    running.stop()


@pytest.fixture
def uploaded(store: Any, tmp_path: Path) -> culpa.Run:
    """A run of whose bytes most are examples, here and there."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4000, 2)
    problem = culpa.Problem(model, squared)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for name in ("first", "second"):
            with recorder.stage(name):
                for batch in recorder.batches([torch.randn(6, 4000) for _ in range(8)]):
                    optimizer.zero_grad()
                    problem.loss(model, batch).backward()
                    optimizer.step()
    if store.exists("bucket"):
        store.rm("bucket", recursive=True)
    store.mkdir("bucket")
    store.put(str(tmp_path / "run"), "bucket/run", recursive=True)
    store.invalidate_cache()
    return culpa.open_run(tmp_path / "run")


def squared(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def test_what_is_needed_is_fetched_and_no_more(uploaded: culpa.Run) -> None:
    run = culpa.open_run(ADDRESS)
    fetched: dict[str, int] = run.source.fetched  # type: ignore[attr-defined]
    assert set(fetched) == {"culpa.json", "log.sqlite"}
    for name, value in uploaded.final_state().items():
        assert torch.equal(run.final_state()[name], value)
    assert sum(size for name, size in fetched.items() if name.startswith("states/")) < 10**5
    problem = culpa.Problem(torch.nn.Linear(4000, 2), squared)
    there = culpa.replay(run, problem, without=[15])
    here = culpa.replay(uploaded, problem, without=[15])
    assert there.claim == "bitwise"
    assert all(torch.equal(there.state[n], here.state[n]) for n in here.state)
    # Those of update 15, which is replaced, and of the updates back to the nearest kept state.
    rows = sum(len(set(uploaded.example_ids(k))) for k in range(uploaded.kept_before(15), 16))
    assert fetched["examples.pack"] <= rows * 4000 * 4
    assert sum(fetched.values()) < 0.5 * run.bytes_on_disk


def test_it_verifies_as_the_folder_does(uploaded: culpa.Run, store: Any) -> None:
    assert culpa.open_run(ADDRESS).verify() == uploaded.verify()
    data = bytearray(store.cat_file("bucket/run/examples.pack"))
    data[100] ^= 1
    store.pipe_file("bucket/run/examples.pack", bytes(data))
    with pytest.raises(culpa.IntegrityError, match=r"s3://bucket/run/examples.pack: .*example 0"):
        culpa.open_run(ADDRESS).verify()


def test_what_is_not_there_is_an_error_of_ours(
    uploaded: culpa.Run, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("s3://bucket/nothing", "s3://nobody/run"):
        with pytest.raises(culpa.IntegrityError, match=r"culpa\.json is missing"):
            culpa.open_run(address)
    store.rm("bucket/run/states/000000000.safetensors")
    with pytest.raises(culpa.IntegrityError, match=r"000000000\.safetensors is missing"):
        culpa.open_run(ADDRESS).initial_state()

    def unreachable(*args: Any, **options: Any) -> None:
        raise RuntimeError("gone")  # botocore's errors are no OSErrors

    monkeypatch.setattr(store, "cat_file", unreachable)
    with pytest.raises(culpa.StoreError, match="cannot be fetched: gone"):
        culpa.open_run(ADDRESS)


def test_an_unfinished_run_opens(store: Any, tmp_path: Path) -> None:
    forge.record_in_part(tmp_path / "part")
    if not store.exists("bucket"):
        store.mkdir("bucket")
    store.put(str(tmp_path / "part"), "bucket/part", recursive=True)
    store.invalidate_cache()
    run = culpa.open_run("s3://bucket/part")
    assert run.verify() == culpa.open_run(tmp_path / "part").verify()
