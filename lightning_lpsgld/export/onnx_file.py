"""ONNX: the network once, as a function that is called for every sample, whose codes are dequantized in it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.export.network import Inputs, Subject, named, prepared, traced
from lightning_lpsgld.export.outcome import Export, median_seconds
from lightning_lpsgld.export.weights import PackedTensor
from lightning_lpsgld.predictive.batches import default_logits
from lightning_lpsgld.predictive.members import evaluation_mode
from lightning_lpsgld.predictive.reading import TaskName
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.predictive.tasks import Task

__all__ = ["export_onnx"]

OPSET = 18
_DOMAIN = "lightning_lpsgld"
_LIMIT = 2**31 - 2**20
_TINY = float(np.finfo(np.float32).tiny)


def _packages() -> Any:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ModuleNotFoundError(
            'export_onnx needs onnx, onnxscript and onnxruntime: pip install "lightning_lpsgld[export]".'
        ) from error
    return onnx, onnxscript, onnxruntime


def _exported(module: nn.Module, subject: Subject, tensors: tuple[Tensor, ...]) -> Any:
    """ONNX model of a module whose inputs have a free first dim."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = traced(module, subject.inputs, tensors, subject.max_length)
        made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=True, verbose=False)
    assert made is not None
    return made.model_proto


def _dequantized(onnx: Any, number: int, name: str, packed: PackedTensor) -> tuple[list[str], list[Any]]:
    """Inputs of the function for one tensor, and the nodes that make the tensor called ``name`` of them."""
    if packed.scales is None:
        return [name], []
    node = onnx.helper.make_node
    code, scale, real = f"code_{number}", f"scale_{number}", f"real_{number}"
    cast = node("Cast", [code], [real], to=onnx.TensorProto.FLOAT)
    return [code, scale], [cast, node("Mul", [real, scale], [name])]


def _calls(onnx: Any, network: Any, names: list[str], packed: list[PackedTensor]) -> tuple[Any, list[Any], list[Any]]:
    """The network as a function; its calls, whose outputs become ``all_0`` ``(samples, n, ...)`` etc.; its tensors."""
    node, graph = onnx.helper.make_node, network.graph
    read = {name for one in graph.node for name in one.input} | {value.name for value in graph.output}
    inputs: list[str] = []
    steps: list[Any] = []
    tensors: list[list[Any]] = [[] for _ in packed[0].values]
    for number, (value, tensor) in enumerate(zip(list(graph.input)[len(names) :], packed)):
        if value.name not in read:
            continue  # num_batches_tracked and the like
        parts, made = _dequantized(onnx, number, value.name, tensor)
        inputs += parts
        steps += made
        for sample, kept in enumerate(tensors):
            for name, array in zip(parts, (tensor.values, tensor.scales)):
                assert array is not None
                kept.append(onnx.numpy_helper.from_array(array[sample].contiguous().numpy(), f"{name}_of_{sample}"))
    constants = [node("Constant", [], [value.name], value=value) for value in graph.initializer]
    firsts = [value.name for value in list(graph.input)[: len(names)]]
    function = onnx.helper.make_function(
        _DOMAIN, "OneSample", [*firsts, *inputs], [value.name for value in graph.output],
        [*constants, *steps, *graph.node], list(network.opset_import),
    )  # fmt: skip
    nodes = []
    for sample, kept in enumerate(tensors):
        answers = [f"output_{sample}_{part}" for part in range(len(graph.output))]
        nodes.append(node("OneSample", [*names, *(tensor.name for tensor in kept)], answers, domain=_DOMAIN))
        nodes += [node("Unsqueeze", [answer, "axis_0"], [f"row_{answer}"]) for answer in answers]
    for part in range(len(graph.output)):
        rows = [f"row_output_{sample}_{part}" for sample in range(len(tensors))]
        nodes.append(node("Concat", rows, [f"all_{part}"], axis=0))
    return function, nodes, [tensor for kept in tensors for tensor in kept]


def _moments(onnx: Any) -> tuple[list[Any], list[Any]]:
    """Nodes from ``all_0``, means, and ``all_1``, variances, to the outputs, and constants they need."""
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        node("ReduceMean", ["all_0", "axis_0"], ["mean"], keepdims=0),
        node("Sub", ["all_0", "mean"], ["apart"]),
        node("Mul", ["apart", "apart"], ["squared"]),
        node("ReduceMean", ["squared", "axis_0"], ["epistemic"], keepdims=0),
        node("ReduceMean", ["all_1", "axis_0"], ["aleatoric"], keepdims=0),
    ]
    return nodes, [array(np.array([0], np.int64), "axis_0")]


def _entropies(onnx: Any, kind: str) -> tuple[list[Any], list[Any]]:
    """Nodes from ``all_0``, probabilities, to the outputs, and constants they need."""
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    constants = [array(np.array([axis], np.int64), f"axis_{axis}") for axis in (0, 1, 2)]
    constants += [array(np.array(_TINY, np.float32), "tiny"), array(np.array(0.0, np.float32), "zero")]

    def entropy(p: str, axis: str, out: str) -> list[Any]:
        return [
            node("Max", [p, "tiny"], [f"{p}_kept"]),
            node("Log", [f"{p}_kept"], [f"{p}_log"]),
            node("Mul", [p, f"{p}_log"], [f"{p}_terms"]),
            node("ReduceSum", [f"{p}_terms", axis], [f"{p}_sum"], keepdims=0),
            node("Neg", [f"{p}_sum"], [out]),
        ]

    nodes = [
        node("ReduceMean", ["all_0", "axis_0"], ["average"], keepdims=0),
        *entropy("average", "axis_1", "predictive_entropy"),
        *entropy("all_0", "axis_2", "entropies"),
        node("ReduceMean", ["entropies", "axis_0"], ["expected"], keepdims=0),
        node("Sub", ["predictive_entropy", "expected"], ["apart"]),
        node("Max", ["apart", "zero"], ["mutual_information"]),
    ]
    if kind == "labels":
        constants.append(array(np.array(1, np.int64), "yes"))
        nodes.append(node("Gather", ["average", "yes"], ["mean"], axis=1))
    else:
        nodes.append(node("Identity", ["average"], ["mean"]))
    return nodes, constants


def _outputs(onnx: Any, network: Any, kind: str) -> list[Any]:
    """Names, types and shapes of the outputs."""
    dims = [d.dim_value or d.dim_param for d in network.graph.output[0].type.tensor_type.shape.dim]
    points = [dims[0], *dims[2:]]
    if kind == "numbers":
        shapes = {"mean": dims, "epistemic": dims, "aleatoric": dims}
    else:
        mean = points if kind == "labels" else dims
        shapes = {"mean": mean, "predictive_entropy": points, "mutual_information": points}
    return [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items()]


def _assemble(onnx: Any, network: Any, subject: Subject) -> Any:
    names, kind = list(subject.named), subject.head.kind
    function, calls, tensors = _calls(onnx, network, names, subject.packed)
    nodes, constants = _moments(onnx) if kind == "numbers" else _entropies(onnx, kind)
    firsts = [copy.deepcopy(value) for value in list(network.graph.input)[: len(names)]]
    for value, name in zip(firsts, names):
        value.name = name
    graph = onnx.helper.make_graph(
        [*calls, *nodes], "posterior", firsts, _outputs(onnx, network, kind), initializer=[*tensors, *constants]
    )
    opsets = [*network.opset_import, onnx.helper.make_opsetid(_DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, producer_name="lightning_lpsgld")
    model.functions.extend([*network.functions, function])
    model.ir_version = network.ir_version
    return model


@torch.no_grad()
def export_onnx(
    module: nn.Module,
    bank: SampleBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    batch: Any,
    *,
    task: TaskName | Task = "auto",
    forward: Callable[[nn.Module, Any], Any] = default_logits,
    noise_std: float | None = None,
    max_length: int | None = None,
    threads: int = 1,
) -> Export:
    """Write the ensemble of a bank as one ONNX file, and check it against PyTorch with onnxruntime.

    The network stands once, as a function that the graph calls for every sample; weights are int8 (int16) codes and
    power-of-two scales, multiplied in the graph, so nothing is rounded. (onnxruntime multiplies them when it loads the
    file, so a call is as fast as float32, and then takes float32's memory.) One-dimensional tensors, which have an
    exponent an element, and formats that are not linear keep float32 values.

    Input ``input``, or the names of a tokenized batch; the first dim is free, with ``max_length`` the second one too,
    the others are those of ``batch``.
    Outputs as :class:`.PosteriorEnsemble` has them: ``mean`` (probabilities ``(n, classes, ...)``, of yes and no ``(n,
    2)``, of several labels ``(n, labels)``), ``predictive_entropy``, ``mutual_information``; of a regression ``mean``,
    ``epistemic`` and ``aleatoric`` (variances).

    Args:
        module: Built like the one that was sampled, float32; not changed.
        bank: The samples, or their path.
        path: The file; its folder must exist.
        batch: Real inputs (or a batch with targets), two rows or more, for the check and the latency.
        task: As for :class:`.PosteriorEnsemble`.
        forward: ``forward(module, inputs)`` gives the output, where it is not ``module(inputs)``.
        noise_std: Standard deviation around values of a regression that gives no variance.
        max_length: Take sequences of any length from two to this one, not only of the length of ``batch``: the second
            dim of every input. Checked on the first half of the sequences too.
        threads: Threads of onnxruntime when latencies are measured.

    Returns:
        Size, largest difference, latency, versions.

    Raises:
        ModuleNotFoundError: If a package of the extra ``export`` is missing.
        ValueError: If the bank is empty, the task or the inputs cannot be exported, the length cannot be free, or the
            file would pass 2 GiB.
        BankError: If the module is not the one that was sampled.
    """
    onnx, onnxscript, runtime = _packages()
    subject = prepared(module, bank, batch, task, forward, noise_std, max_length)
    if sum(tensor.nbytes for tensor in subject.packed) > _LIMIT:
        raise ValueError("export_onnx: a file of more than 2 GiB is not possible; thin the bank first.")
    with swapped_weights(module), evaluation_mode(subject.ensemble.called):
        subject.bank.load_into(module, 0)
        firsts = tuple(tensor.decoded()[0].clone() for tensor in subject.packed)
        network = _exported(subject.single, subject, firsts)
        alone = _exported(subject.ensemble.called, subject, ())
    target = Path(path)
    onnx.save(_assemble(onnx, network, subject), target)
    onnx.checker.check_model(str(target), full_check=True)
    session = _session(runtime, target.read_bytes(), threads)
    single = _session(runtime, alone.SerializeToString(), threads)
    feed = _fed(subject.inputs)
    first = dict(zip([value.name for value in single.get_inputs()], feed.values()))
    names, samples = [output.name for output in session.get_outputs()], len(subject.bank)

    def answer(inputs: Inputs) -> dict[str, Tensor]:
        return dict(zip(names, map(torch.from_numpy, session.run(None, _fed(inputs)))))

    return Export(
        path=target,
        samples=samples,
        bytes=target.stat().st_size,
        bytes_fp32=samples * alone.ByteSize(),
        difference=subject.differences(answer),
        points=subject.points,
        seconds=median_seconds(lambda: session.run(None, feed)),
        seconds_fp32=samples * median_seconds(lambda: single.run(None, first)),
        versions=f"opset {OPSET}, onnx {onnx.__version__}, onnxscript {onnxscript.__version__}, "
        f"onnxruntime {runtime.__version__}, torch {torch.__version__}, {threads} thread(s)",
    )


def _fed(inputs: Inputs) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in named(inputs).items()}


def _session(runtime: Any, data: bytes, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
