"""The cost of ELMo's derivatives in units of its forward pass (F), and four ways to run its recurrence.

    python benchmarks/elmo.py --threads 1                               # the published size, 500 million parameters
    python benchmarks/elmo.py --threads 1 --vocabulary 50000 --reverse  # also backward passes
    python benchmarks/elmo.py --threads 1 --scans                       # the recurrence alone
    python benchmarks/elmo.py --check                                   # exit code 1 if the bar is missed

The model has the published configuration (4,096 cells, projections of 512, 2,048 character filters: 93.6 million
parameters, and a softmax over 793,471 words) with random weights; sentences are those of benchmarks/scoring.py. F is
one pass of the model as it was loaded, under `no_grad`, with the objective's losses: the exact softmax of both
directions, its logits in chunks. All tasks are measured in turn on every batch. A ratio is taken within a pass; the
table shows its median over the repeats, its smallest and its largest value. With `--threads 1` seconds are CPU seconds
of the process.

Bar: scoring one query costs at most 3.5 F.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
from scoring import Task, batches, direction, plain, sentences, table
from tabulate import tabulate
from torch import Tensor

from hf_msif import objectives
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.curvature.derivatives import Evaluation, directional_derivatives, gradient, hessian_product
from hf_msif.curvature.gauss_newton import gauss_newton_product
from hf_msif.models import ElmoConfig, ElmoForBidirectionalLM, ElmoTokenizer
from hf_msif.models.elmo.layers import LstmLayer
from hf_msif.vectors import column

BAR = {"scoring, 1 query": 3.5}
UNIT = "forward pass (F)"


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    settings = arguments(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.scans:
        print(scans(settings))
        return 0
    tasks, model = tasks_of(settings)
    seconds, reports = measure(tasks, settings), {}
    for task in tasks:
        ratios = [task_time / unit for task_time, unit in zip(seconds[task.name], seconds[UNIT], strict=True)]
        reports[task.name] = report = {
            "ratio": statistics.median(ratios),
            "smallest": min(ratios),
            "largest": max(ratios),
            "seconds_per_sentence": statistics.median(seconds[task.name]) / settings.sentences,
        }
        if task.name in BAR:
            report |= {"bar": BAR[task.name], "met": report["ratio"] <= BAR[task.name]}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in tasks[0].batches)
    sizes = f"{model.elmo.num_parameters() / 1e6:.1f} million parameters and {settings.vocabulary:,} words"
    if settings.json:
        print(
            json.dumps({"tasks": reports, "settings": vars(settings) | {"tokens": tokens, "torch": torch.__version__}})
        )
    else:
        print(table(reports))
        print(
            f"{sizes}; {settings.sentences} sentences of {tokens / settings.sentences:.1f} tokens in batches of "
            f"{settings.batch_size}, {settings.repeats} repeats; {settings.dtype} on {device_name(settings)}, "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
        )
    return 0 if all(report.get("met", True) for report in reports.values()) or not settings.check else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--threads", type=int, help="threads of the CPU; defaults to PyTorch's choice")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=793_471, help="number of words of the softmax")
    parser.add_argument("--cells", type=int, default=4096)
    parser.add_argument("--projection", type=int, default=512)
    parser.add_argument("--reverse", action="store_true", help="also gradient and products, which hold all logits")
    parser.add_argument("--scans", action="store_true", help="compare ways to run one bidirectional layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the bar is missed")
    return parser.parse_args(argv)


def device_name(settings: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if settings.device.startswith("cuda") else "CPU"


def tasks_of(settings: argparse.Namespace) -> tuple[list[Task], ElmoForBidirectionalLM]:
    """All tasks, the unit first, and the model."""
    words = [f"w{i}" for i in range(30_000)]
    tokenizer = ElmoTokenizer.train([" ".join(words)], size=min(settings.vocabulary, len(words)))
    objective = objectives.BidirectionalLM(tokenizer)
    task_batches = batches(sentences(words, settings.sentences, settings.seed), objective, settings)
    torch.manual_seed(settings.seed)
    config = ElmoConfig(vocab_size=settings.vocabulary, cell_size=settings.cells, projection_size=settings.projection)
    model = ElmoForBidirectionalLM(config).eval().to(settings.device, getattr(torch, settings.dtype))
    functional = FunctionalModel(model, settings.device)
    names = tuple(functional.parameters)
    v = direction(functional, names, 1, settings.seed)

    def derivative(function: Callable[[Evaluation], object]) -> Callable[[dict], object]:
        def run(batch: dict) -> object:
            with functional.evaluating():
                return function(Evaluation(functional, objective, batch))

        return run

    tasks = [Task(UNIT, UNIT, task_batches, lambda batch: plain(model, objective, batch))]
    tasks.append(
        Task("scoring, 1 query", UNIT, task_batches, derivative(lambda e: directional_derivatives(e, column(v, 0))))
    )
    if settings.reverse:
        for name, function in (
            ("gradient", lambda e: gradient(e, names)),
            ("Gauss-Newton product", lambda e: gauss_newton_product(e, v)),
            ("Hessian product", lambda e: hessian_product(e, v, names)),
        ):
            tasks.append(Task(name, UNIT, task_batches, derivative(function)))
    return tasks, model


def clock(settings: argparse.Namespace) -> float:
    """Seconds: CPU seconds of this process if one CPU thread does the work, so that other processes do not count."""
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if settings.device == "cpu" and settings.threads == 1 else time.perf_counter()


def measure(tasks: list[Task], settings: argparse.Namespace) -> dict[str, list[float]]:
    """Task → seconds of a whole pass, one number per repeat; the tasks take turns on every batch."""
    seconds = {task.name: [0.0] * settings.repeats for task in tasks}
    for repeat in range(-1, settings.repeats):  # the first round is a warm-up and is not counted
        for i in range(len(tasks[0].batches) if repeat >= 0 else 1):
            for task in tasks:
                started = clock(settings)
                task.run(task.batches[i])
                if repeat >= 0:
                    seconds[task.name][repeat] += clock(settings) - started
    return seconds


# --- one bidirectional layer. Each function takes the packed inputs (N, projection) of both directions and the number
# of sentences at every step, and returns the packed outputs of both directions.


def one_after_the_other(layers: list[LstmLayer], inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """As in the library: one product with W_x for all steps, then one product with W_h per step."""
    return [layer(x, sizes)[0] for layer, x in zip(layers, inputs, strict=True)]


def concatenated(layers: list[LstmLayer], inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """One product with [W_x, W_h] per step, the form of the published weights."""
    return [_loop(_concatenated_step(layer), layer, x.split(sizes)) for layer, x in zip(layers, inputs, strict=True)]


def compiled(layers: list[LstmLayer], inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """The library's step through `torch.compile`."""
    return [_loop(_compiled_step, layer, layer.input(x).split(sizes)) for layer, x in zip(layers, inputs, strict=True)]


def stacked(layers: list[LstmLayer], inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Both directions in one batched product per step."""
    state, projection = (torch.stack([getattr(la, n).weight.T for la in layers]) for n in ("state", "projection"))
    gates = torch.stack([layer.input(x) for layer, x in zip(layers, inputs, strict=True)])
    outputs, h, c = [], None, None
    for g in gates.split(sizes, 1):
        if h is not None:
            h, c = h[:, : g.shape[1]], c[:, : g.shape[1]]
            g = torch.baddbmm(g, h, state)
        h, c = _nonlinear(layers[0], g, c, lambda x: torch.bmm(x, projection))
        outputs.append(h)
    return list(torch.cat(outputs, 1))


def _nonlinear(layer: LstmLayer, gates: Tensor, c: Tensor | None, project: Callable) -> tuple[Tensor, Tensor]:
    """The new (h, c) of the gates, as in `LstmLayer.forward`."""
    i, j, f, o = gates.chunk(4, -1)
    written = torch.sigmoid(i) * torch.tanh(j)
    c = written if c is None else torch.sigmoid(f) * c + written
    c = c.clamp(-layer.cell_clip, layer.cell_clip)
    h = project(torch.sigmoid(o) * torch.tanh(c))
    return h.clamp(-layer.projection_clip, layer.projection_clip), c


def _concatenated_step(layer: LstmLayer) -> Callable:
    """A step that multiplies [x, h] by [W_x, W_h]."""
    weight = torch.cat([layer.input.weight, layer.state.weight], 1)

    def step(layer, x, h, c):
        gates = torch.nn.functional.linear(torch.cat([x, h], 1), weight, layer.input.bias)
        return _nonlinear(layer, gates, c, layer.projection)

    return step


def _plain_step(layer: LstmLayer, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return _nonlinear(layer, gates + layer.state(h), c, layer.projection)


_compiled_step = torch.compile(_plain_step, dynamic=True)


def _loop(step: Callable, layer: LstmLayer, inputs: tuple[Tensor, ...]) -> Tensor:
    h, c = inputs[0].new_zeros(len(inputs[0]), layer.projection.out_features), None
    c = inputs[0].new_zeros(len(inputs[0]), layer.projection.in_features)
    outputs = []
    for x in inputs:
        h, c = step(layer, x, h[: len(x)], c[: len(x)])
        outputs.append(h)
    return torch.cat(outputs)


def scans(settings: argparse.Namespace) -> str:
    """A table of milliseconds per sentence of one bidirectional layer, for each of the four ways to run it."""
    torch.manual_seed(settings.seed)
    config = ElmoConfig(cell_size=settings.cells, projection_size=settings.projection)
    dtype = getattr(torch, settings.dtype)
    layers = [LstmLayer(config).to(settings.device, dtype) for _ in range(2)]
    lengths = sorted((len(row["text"].split()) + 2 for row in sentences(["w"], settings.batch_size, 0)), reverse=True)
    sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
    x = [torch.randn(sum(sizes), settings.projection, device=settings.device, dtype=dtype) for _ in range(2)]
    names = [(layer, name) for layer in layers for name, _ in layer.named_parameters()]
    v = [torch.randn_like(layer.get_parameter(name)) for layer, name in names]

    def forward(scan):
        with torch.no_grad():
            return scan(layers, x, sizes)

    def scoring(scan):
        with torch.no_grad(), forward_ad.dual_level(), DualParameters(layers, names, v):
            return [forward_ad.unpack_dual(out).tangent for out in scan(layers, x, sizes)]

    def backward(scan):
        parameters = [layer.get_parameter(name) for layer, name in names]
        return torch.autograd.grad(sum((out**2).sum() for out in scan(layers, x, sizes)), parameters)

    def product(scan):
        parameters = [layer.get_parameter(name) for layer, name in names]
        total = sum((out**2).sum() for out in scan(layers, x, sizes))
        gradients = torch.autograd.grad(total, parameters, create_graph=True)
        return torch.autograd.grad(gradients, parameters, v)

    rows = []
    expected = forward(one_after_the_other)
    for scan in (one_after_the_other, concatenated, stacked, compiled):
        row = {"": scan.__name__.replace("_", " ")}
        for computation in (forward, scoring, backward, product):
            try:
                row[computation.__name__] = (
                    f"{1e3 * _seconds(lambda: computation(scan), settings) / settings.batch_size:.1f}"  # noqa: B023
                )
            except Exception as error:  # some derivatives of a compiled step are not supported
                row[computation.__name__] = type(error).__name__
        torch.testing.assert_close(forward(scan), expected, rtol=1e-3, atol=1e-4)
        rows.append(row)
    text = (
        f"ms per sentence; {settings.batch_size} sentences of {sum(sizes) / settings.batch_size:.1f} tokens, one layer"
    )
    text += f" of two directions, {settings.cells} cells, projection {settings.projection}, {settings.dtype} on"
    text += f" {device_name(settings)}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True) + "\n" + text


class DualParameters:
    """Inside, the named parameters are dual numbers with the given tangents."""

    def __init__(self, layers: list[LstmLayer], names: list, tangents: list[Tensor]):
        self.names, self.tangents = names, tangents

    def __enter__(self):
        self.before = [layer.get_parameter(name) for layer, name in self.names]
        for (layer, name), value, tangent in zip(self.names, self.before, self.tangents, strict=True):
            module, _, leaf = name.rpartition(".")
            owner = layer.get_submodule(module)
            del owner._parameters[leaf]
            setattr(owner, leaf, forward_ad.make_dual(value, tangent))

    def __exit__(self, *_):
        for (layer, name), value in zip(self.names, self.before, strict=True):
            module, _, leaf = name.rpartition(".")
            owner = layer.get_submodule(module)
            delattr(owner, leaf)
            owner.register_parameter(leaf, value)


def _seconds(run: Callable, settings: argparse.Namespace) -> float:
    """Median seconds over the repeats, after a warm-up."""
    seconds = []
    for repeat in range(settings.repeats + 1):
        started = clock(settings)
        run()
        seconds += [clock(settings) - started] if repeat else []
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
