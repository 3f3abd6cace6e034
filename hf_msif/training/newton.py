"""Minimises a smooth function with exact Hessian products: L-BFGS, then trust-region Newton-CG.

Where the Hessian of a nearby function is known (before a retraining without one example), `nearby` goes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .. import vectors
from ..errors import InputError
from ..solvers.dense import written_out
from ..vectors import Block


@dataclass(frozen=True)
class State:
    """A point, F there and ∇F there; point and gradient are blocks of one column."""

    point: Block
    value: float
    gradient: Block

    @cached_property
    def norm(self) -> float:
        return float(vectors.norm(self.gradient))


class Target(Protocol):
    """A function F of `parameters` (plain tensors, moved in place) that is also a solvers' operator."""

    parameters: Block
    dtype: torch.dtype

    def at(self, point: Block | None = None) -> State:
        """F and ∇F at `point`, which becomes the present one; defaults to the present one."""
        ...

    def matvec(self, v: Block) -> Block:
        """∂²F v for every column, at the present point."""
        ...


def lbfgs(target: Target, tol: float, max_iter: int, bar) -> tuple[State, int]:
    """Minimises F by L-BFGS with a strong Wolfe line search, until ‖∇F‖ ≤ tol or for `max_iter` iterations.

    Returns:
        The state at the point of the smallest F, and the number of iterations.
    """
    tensors = list(target.parameters.values())
    best: State | None = None
    optimizer = torch.optim.LBFGS(
        tensors,
        max_iter=max_iter,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=tol / math.sqrt(sum(t.numel() for t in tensors)),
        tolerance_change=0.0,
    )

    def closure() -> float:
        nonlocal best
        state = target.at()
        if best is None or state.value < best.value:
            best = state
        for tensor, g in zip(tensors, state.gradient.values(), strict=True):
            tensor.grad = g[0].clone()
        bar.set_postfix(gradient=f"{state.norm:.1e}", refresh=False)
        bar.update()
        return state.value

    try:
        optimizer.step(closure)
    finally:
        for tensor in tensors:
            tensor.grad = None
    assert best is not None
    return target.at(best.point), optimizer.state[tensors[0]].get("n_iter", 0)


IDLE = 5  # steps below rounding that are tried without a smaller gradient


class Preconditioner:
    """M⁻¹ = V diag(1/|e|) Vᵀ of a dense Hessian V diag(e) Vᵀ: with it CG on a nearby Hessian takes few steps."""

    def __init__(self, target: Target):
        # Where the losses vanish (separable classes without a decay) the Hessian does too. What rounding leaves of its
        # terms, which cancel, is not symmetric.
        matrix = written_out(target)
        self.eigenvalues, self.basis = torch.linalg.eigh((matrix + matrix.T) / 2)
        size = self.eigenvalues.abs()
        # The softmax's common shift of all biases has no curvature at all, and no gradient either.
        self._inverse = 1 / size.clamp(min=float(size.max()) * 1e-8 or 1.0)

    def __call__(self, r: Block) -> Block:
        flat = vectors.flatten(r).double()
        if flat.shape[1] != len(self._inverse):
            raise InputError(
                f"the preconditioner is for {len(self._inverse)} trained parameters; this stage has {flat.shape[1]}."
            )
        return vectors.unflatten((flat @ self.basis * self._inverse) @ self.basis.T, r)


def nearby(target: Target, state: State, inverse: Preconditioner, tol: float, max_iter: int, bar) -> tuple[State, int]:
    """L-BFGS that starts from the inverse Hessian of a nearby function; every step is a full one and costs one pass.

    It starts near the minimum that the preconditioner was made at, and stops where a step does not halve the gradient
    in the preconditioner's norm: further away Newton's method is left to go on.

    Returns:
        The state reached, and the number of steps.
    """
    pairs: list[tuple[Block, Block, float]] = []
    steps = 0
    while state.norm > tol and steps < max_iter:
        step, weights = vectors.scale(state.gradient, -1.0), []
        for s, y, sy in reversed(pairs):
            weights.append(_dot(s, step) / sy)
            step = vectors.add(step, y, -weights[-1])
        step = inverse(step)
        for (s, y, sy), weight in zip(pairs, reversed(weights), strict=True):
            step = vectors.add(step, s, weight - _dot(y, step) / sy)
        trial = target.at(vectors.add(state.point, step))
        noise = 50 * torch.finfo(target.dtype).eps * max(1.0, abs(state.value))
        # Written so that NaN ends it too.
        if not (
            trial.value <= state.value + noise
            and 4 * _dot(trial.gradient, inverse(trial.gradient)) <= _dot(state.gradient, inverse(state.gradient))
        ):
            target.at(state.point)
            break
        change = vectors.add(trial.gradient, state.gradient, -1.0)
        if (product := _dot(step, change)) > 0:
            pairs.append((step, change, product))
        state, steps = trial, steps + 1
        bar.set_postfix(gradient=f"{state.norm:.1e}", refresh=False)
        bar.update()
    return state, steps


class Newton:
    """Trust-region Newton-CG (Steihaug, 1983) in the norm of the preconditioner."""

    def __init__(self, target: Target, state: State, preconditioner, cg_iter: int, dense_limit: int):
        self.target, self.state, self.preconditioner = target, state, preconditioner
        self.cg_iter, self.dense_limit = cg_iter, dense_limit
        self.size = vectors.numel(state.gradient)
        self.radius, self.since = 1.0, 0
        self.smallest: float | None = None
        self.negative = False
        # The best point has the smallest F, or the smallest gradient where F is rounded too coarsely to tell. `idle`
        # counts the steps that were tried there without a smaller gradient.
        self.best, self.idle = state, 0

    def factorise(self) -> None:
        """Writes the Hessian out at the present point, and preconditions all later CG with it."""
        self.preconditioner, self.since, self.radius, self.idle = Preconditioner(self.target), 0, 1.0, 0
        self.smallest = float(self.preconditioner.eigenvalues[0])

    def step(self) -> bool:
        """Takes one step; False when rounding leaves no step that is accepted, or none that improves the point."""
        while self.idle < IDLE and self.radius >= 1e-12:
            if self.since > self.size / 4 and self.size <= self.dense_limit:
                # P products in one block are cheaper than P products one by one: more CG would not pay.
                self.factorise()
            step, length, predicted = self._direction()
            trial = self.target.at(vectors.add(self.state.point, step))
            unit = 50 * torch.finfo(self.target.dtype).eps
            noise, floor = unit * max(1.0, abs(self.state.value)), unit * abs(self.state.value)
            if not math.isfinite(trial.value + trial.norm) or not predicted > 0:  # overflow, or no descent is left
                ratio = -math.inf
            elif predicted <= noise:  # F is rounded too coarsely; the gradients at both ends are not: trapezoidal rule
                ratio = -0.5 * (_dot(self.state.gradient, step) + _dot(trial.gradient, step)) / predicted
            else:
                ratio = (self.state.value - trial.value) / predicted
            on_boundary = length >= 0.99 * self.radius
            if ratio < 0.25:
                self.radius = 0.25 * length
            elif ratio > 0.75 and on_boundary:
                self.radius = 2 * self.radius
            accepted = ratio > 1e-4
            if accepted and (predicted > floor or trial.norm < self.best.norm):
                self.best, self.idle = trial, 0
            elif not predicted > floor:
                self.idle += 1
            if accepted:
                self.state = trial
                return True
            self.target.at(self.state.point)
        return False

    def finish(self) -> None:
        """Returns to the best point, where the last steps led away from it."""
        if self.state is not self.best:
            self.state = self.best
            self.target.at(self.state.point)

    def _direction(self) -> tuple[Block, float, float]:
        """The step, its length in the norm of M, and the decrease of F that the quadratic model predicts."""
        g = self.state.gradient
        inverse = self.preconditioner or vectors.clone
        z, r, y = vectors.zeros_like(g), vectors.clone(g), inverse(g)
        d = vectors.scale(y, -1.0)
        ry = _dot(r, y)
        goal = min(0.1, math.sqrt(self.state.norm)) * math.sqrt(ry)
        zz, zd, dd, model = 0.0, 0.0, ry, 0.0  # squares and products in the norm of M; model: m(z) − m(0)
        rows: list[list[float]] = []
        carry = 0.0
        unit = 10 * torch.finfo(self.target.dtype).eps
        largest = float(self.preconditioner.eigenvalues.abs().max()) if self.preconditioner else 0.0
        self.negative = False
        for _ in range(self.cg_iter):
            product = self.target.matvec(d)
            self.since += 1
            curvature = _dot(d, product)
            length = _dot(d, d)
            largest = max(largest, abs(curvature) / length)
            flat = abs(curvature) <= unit * largest * length
            if flat and zz > 0:  # rounding has no sign to follow: the softmax's common shift of biases, for one
                break
            alpha = ry / curvature if curvature > 0 else math.inf
            if curvature <= 0 or zz + 2 * alpha * zd + alpha**2 * dd >= self.radius**2:
                self.negative = curvature < 0 and not flat
                tau = (-zd + math.sqrt(max(zd**2 + dd * (self.radius**2 - zz), 0.0))) / dd
                model += -tau * ry + 0.5 * tau**2 * curvature
                self._note(rows, None if curvature > 0 else curvature / length)
                return vectors.add(z, d, tau), self.radius, -model
            z, r = vectors.add(z, d, alpha), vectors.add(r, product, alpha)
            model -= 0.5 * alpha * ry
            zz += 2 * alpha * zd + alpha**2 * dd
            y = inverse(r)
            new = _dot(r, y)
            beta = new / ry
            rows.append([1 / alpha + carry, math.sqrt(beta) / alpha])
            carry = beta / alpha
            d = vectors.add(vectors.scale(y, -1.0), d, beta)
            zd, dd, ry = beta * (zd + alpha * dd), new + beta**2 * dd, new
            if math.sqrt(new) <= goal:
                break
        self._note(rows, None)
        return z, math.sqrt(zz), -model

    def _note(self, rows: list[list[float]], rayleigh: float | None) -> None:
        """The smallest Ritz value of unpreconditioned CG, from the tridiagonal of its Lanczos process."""
        if self.preconditioner is not None:
            return
        values = [] if rayleigh is None else [rayleigh]
        if rows:
            diagonal, off = torch.tensor(rows, dtype=torch.float64).T
            matrix = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
            values.append(float(torch.linalg.eigvalsh(matrix)[0]))
        if values:
            self.smallest = min(values)


def _dot(x: Block, y: Block) -> float:
    return float(vectors.dot(x, y))
