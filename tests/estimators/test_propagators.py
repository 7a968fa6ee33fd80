"""Propagators against dense float64 matrices, and the choice that the library makes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import culpa
from culpa.dynamics.curvature import gauss_newton, hessian
from culpa.dynamics.local import LocalLoss
from culpa.estimators.smoothing import Smoothing
from culpa.trajectory.walk import forward, session

CLASSES, WIDTH, BATCH = 3, 4, 6


def batches(count: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def net(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 5), activation(), nn.Linear(5, CLASSES)]
    return nn.Sequential(*layers).double()


def recorded(
    folder: Path, model: nn.Module, *, rate: float = 0.1, count: int = 4, **options: float
) -> tuple[culpa.Run, culpa.Problem]:
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, **options)
    with culpa.record(folder, problem, optimizer) as recorder, recorder.stage("all"):
        for batch in recorder.batches(batches(count)):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    return culpa.open_run(folder), problem


def dense(model: nn.Module, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian of cross-entropy by torch's own dense routine."""
    names, shapes = list(params), [p.shape for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return cross_entropy(torch.func.functional_call(model, values, (batch[0],)), batch[1])

    return torch.autograd.functional.hessian(loss, flatten(params))  # type: ignore[no-any-return]


def flatten(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in tree.values()])


def directions(params: dict[str, Tensor], count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
        for _ in range(count)
    ]


@pytest.fixture
def local(tmp_path: Path) -> LocalLoss:
    run, problem = recorded(tmp_path / "run", net())
    with session(run, problem) as engine:
        (transition,) = list(forward(run, engine, 2, 3))
    return LocalLoss(problem, transition)


@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    [("reverse-over-reverse", 1e-12), ("forward-over-reverse", 1e-12), ("finite-difference", 1e-4)],
)
def test_hessian_products(local: LocalLoss, strategy: str, tolerance: float) -> None:
    matrix = dense(local.problem.model, local.params, batches()[2])
    vectors = directions(local.params)
    for v, found in zip(
        vectors, hessian.products(local, local.params, vectors, strategy), strict=True
    ):
        torch.testing.assert_close(
            flatten(found), matrix @ flatten(v), rtol=tolerance, atol=tolerance
        )


def test_gauss_newton_products(local: LocalLoss) -> None:
    inputs, _ = batches()[2]
    model, names = local.problem.model, list(local.params)
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(
        local.params
    )
    rows = torch.cat([jacobian[n].reshape(BATCH, CLASSES, -1) for n in names], dim=2)
    shares = torch.softmax(model_outputs(model, local.params, inputs), dim=1)
    matrix = torch.zeros(rows.shape[2], rows.shape[2], dtype=torch.float64)
    for j, p in zip(rows, shares, strict=True):  # mean over the batch of J^T (diag p - p p^T) J
        matrix += j.T @ (torch.diag(p) - torch.outer(p, p)) @ j / BATCH
    vectors = directions(local.params)
    for v, found in zip(vectors, gauss_newton.products(local, local.params, vectors), strict=True):
        torch.testing.assert_close(flatten(found), matrix @ flatten(v), rtol=1e-10, atol=1e-12)


def model_outputs(model: nn.Module, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(model, params, (inputs,))  # type: ignore[no-any-return]


def blocks_of(matrix: Tensor, params: dict[str, Tensor], groups: list[list[str]]) -> Tensor:
    """The matrix with everything outside of the diagonal blocks set to zero."""
    label = torch.cat(
        [
            torch.full((p.numel(),), next((i for i, g in enumerate(groups) if n in g), -1))
            for n, p in params.items()
        ]
    )
    same = (label.unsqueeze(0) == label.unsqueeze(1)) & (label.unsqueeze(0) >= 0)
    return torch.where(same, matrix, torch.zeros_like(matrix))


@pytest.mark.parametrize(
    ("propagator", "groups"),
    [
        (culpa.LayerWise(), [["0.weight", "0.bias"], ["2.weight", "2.bias"]]),
        (culpa.BlockWise(1), [["0.weight"], ["0.bias"], ["2.weight"], ["2.bias"]]),
        (culpa.BlockWise(20), [["0.weight"], ["0.bias", "2.weight"], ["2.bias"]]),
        (culpa.BlockWise(10_000), [["0.weight", "0.bias", "2.weight", "2.bias"]]),
        (culpa.Subset(("2.*",)), [["2.weight", "2.bias"]]),
        (culpa.Identity(), []),
    ],
)
def test_structured_products(
    local: LocalLoss, propagator: culpa.LayerWise, groups: list[list[str]]
) -> None:
    whole = dense(local.problem.model, local.params, batches()[2])
    matrix = blocks_of(whole, local.params, groups)
    (vector,) = directions(local.params, 1)
    (found,) = propagator.products(local, [vector])
    torch.testing.assert_close(flatten(found), matrix @ flatten(vector), rtol=1e-10, atol=1e-12)
    # Along a displacement the matrix is taken in its middle.
    middle = {n: p - 0.5 * vector[n] for n, p in local.params.items()}
    there = blocks_of(dense(local.problem.model, middle, batches()[2]), local.params, groups)
    bent = propagator.gradient_difference(local, vector)
    torch.testing.assert_close(flatten(bent), there @ flatten(vector), rtol=1e-10, atol=1e-12)


def test_two_gauss_points_are_the_mean_of_two_hessians(local: LocalLoss) -> None:
    (vector,) = directions(local.params, 1)
    expected = torch.zeros_like(flatten(vector))
    for x in (0.21132486540518712, 0.7886751345948129):
        at = {n: p - x * vector[n] for n, p in local.params.items()}
        expected += dense(local.problem.model, at, batches()[2]) @ flatten(vector) / 2
    bent = culpa.Exact(at="gauss").gradient_difference(local, vector)
    torch.testing.assert_close(flatten(bent), expected, rtol=1e-10, atol=1e-12)


def test_two_gauss_points_are_exact_for_a_loss_of_degree_five(tmp_path: Path) -> None:
    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + (x @ self.w) ** 5 / 20

    model = Powers()
    problem = culpa.Problem(model, lambda m, b: m(b).mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    data = [x for x, _ in ((torch.randn(3, 2, dtype=torch.float64), 0) for _ in range(8))]
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for name, part in (("early", data[:3]), ("late", data[3:])):
            with recorder.stage(name):
                for batch in recorder.batches(part):
                    optimizer.zero_grad()
                    problem.loss(model, batch).backward()
                    optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    truth = run.final_state()["w"] - culpa.replay(run, problem, without="early").state["w"]
    found = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss"))["early"]["w"]
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    coarse = culpa.embed(run, problem, propagator=culpa.Exact(at="observed"))["early"]["w"]
    assert float((coarse - truth).norm()) > 1e-4 * float(truth.norm())


def test_identity_scores_are_each_updates_own_step(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path / "run", net(), momentum=0.9)
    inputs, targets = batches(1, seed=9)[0]
    behaviour = culpa.log_likelihood("right", (inputs, targets))
    scores = culpa.attribute(run, problem, [behaviour], propagator=culpa.Identity())
    model = net()
    model.load_state_dict(run.final_state())
    loss = -cross_entropy(model(inputs), targets)
    slope = torch.autograd.grad(loss, list(model.parameters()))
    states = [culpa.replay(run, problem, without=range(k, 4)).state for k in range(5)]
    for k in range(4):
        step = [states[k + 1][n] - states[k][n] for n, _ in model.named_parameters()]
        own = sum(float((g * s).sum()) for g, s in zip(slope, step, strict=True))
        assert float(scores.steps[k, 0]) == pytest.approx(own, rel=1e-9)


def test_on_a_quadratic_nothing_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1).double()
    problem = culpa.Problem(model, lambda m, b: mse_loss(m(b[0]).squeeze(1), b[1].double()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for name, part in (("a", batches(6)), ("b", batches(6, seed=1))):
            with recorder.stage(name):
                for batch in recorder.batches(part):
                    optimizer.zero_grad()
                    problem.loss(model, batch).backward()
                    optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    one = culpa.Behaviour("output", lambda m, b: m(b).squeeze(1), batches(1)[0][0], unit="1")
    # Not the Hessian of the same batch, so a sweep over them still has a residual of its own.
    scores = culpa.attribute(run, problem, [one])
    assert scores.fallback is None
    found = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss"))
    assert found.trust["a"].residual < 1e-10
    assert found.trust["a"].grade == "trusted"


def test_the_default_falls_back_where_training_is_unstable(tmp_path: Path) -> None:
    inputs, targets = batches(1, seed=9)[0]
    asked = [culpa.log_likelihood("right", (inputs, targets))]
    calm, problem = recorded(tmp_path / "calm", net(), rate=1e-3, count=20)
    scores = culpa.attribute(calm, problem, asked)
    assert scores.fallback is None
    assert {t.grade for t in scores.trust} == {"trusted"}
    wild, problem = recorded(tmp_path / "wild", net(), rate=5.0, count=20, momentum=0.9)
    scores = culpa.attribute(wild, problem, asked)
    assert scores.fallback is not None
    assert scores.trust[0].grade == "not identified"
    named = culpa.attribute(wild, problem, asked, propagator=culpa.Exact())
    assert named.fallback is None


def test_the_default_falls_back_where_only_the_residual_tells(tmp_path: Path) -> None:
    # A loss of degree four on its way down: the curvature falls from update to update while every
    # M_k contracts, so that the adjoint never grows.
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 0.9], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w) ** 2

    model = Square()
    problem = culpa.Problem(model, lambda m, b: (m(b) ** 2).sum(1).mean())
    rates = [0.05 * 1.5**k for k in range(6)]
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    ones = torch.ones(1, 2, dtype=torch.float64)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for rate, batch in zip(rates, recorder.batches([ones] * 6), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    asked = [culpa.Behaviour("output", lambda m, b: m(b).sum(1), ones, unit="1")]
    scores = culpa.attribute(run, problem, asked)
    assert max(t.growth for t in scores.trust) == 1.0
    # At the third probe from the end: one or two may be outliers.
    assert scores.fallback == 3
    # By hand: an update moves w by -rate * 4 w^3; the Hessian of w^4 is 12 w^2, and its
    # Gauss-Newton matrix, which passes the updates before, 8 w^2.
    w, path = torch.tensor([1.0, 0.9], dtype=torch.float64), []
    for rate in rates:
        path.append(w)
        w = w - rate * 4 * w**3
    p = 2 * w
    for k in reversed(range(6)):
        expected = float((p * -rates[k] * 4 * path[k] ** 3).sum())
        assert float(scores.steps[k, 0]) == pytest.approx(expected, rel=1e-9), k
        p = p * (1 - rates[k] * (12 if k >= 3 else 8) * path[k] ** 2)
    # Smoothed over the same trajectory twice, each sweep chooses for itself.
    again = culpa.attribute(run, problem, asked, smoothing=Smoothing(1, relative=0.0))
    assert torch.equal(again.steps, scores.steps)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: culpa.BlockWise(0), "0"),
        (lambda: culpa.Subset(()), "()"),
        (lambda: culpa.Exact(at="somewhere"), "somewhere"),
        (lambda: culpa.Exact(hvp="magic"), "magic"),
        (lambda: culpa.Secant(0.0), "0.0"),
        (lambda: culpa.Secant(1.5), "1.5"),
    ],
)
def test_bad_options_are_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(culpa.OptionError, match=said.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_patterns_that_match_nothing(local: LocalLoss) -> None:
    with pytest.raises(culpa.OptionError, match=r"head.*0\.weight"):
        culpa.Subset(("head.*",)).products(local, directions(local.params))


def test_a_loss_that_is_no_function_of_the_outputs(tmp_path: Path) -> None:
    model = net()
    problem = culpa.Problem(model, lambda m, b: sum((p**2).sum() for p in m.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for batch in recorder.batches(batches()):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    inputs, targets = batches(1)[0]
    asked = [culpa.log_likelihood("right", (inputs, targets))]
    with pytest.raises(culpa.UnsupportedError, match="Gauss-Newton"):
        culpa.attribute(run, problem, asked, propagator=culpa.GaussNewton())
