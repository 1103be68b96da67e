"""ONNX: the network once, as a function that is called for every sample, whose codes are dequantized in it."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.export.network import Kind, Single, checked_inputs, kind_of
from lightning_lpsgld.export.outcome import Export, median_seconds
from lightning_lpsgld.export.weights import PackedTensor, pack
from lightning_lpsgld.predictive import PosteriorEnsemble
from lightning_lpsgld.predictive.reading import TaskName
from lightning_lpsgld.predictive.swap import swapped_weights

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


def _exported(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
    """ONNX model of a module whose first argument has a free first dim."""
    batch = torch.export.Dim("batch", min=2)
    shapes: Any = ({0: batch},) if len(args) == 1 else ({0: batch}, tuple({} for _ in args[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
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


def _calls(onnx: Any, network: Any, packed: list[PackedTensor]) -> tuple[Any, list[Any], list[Any]]:
    """The network as a function, its calls whose outputs become ``all`` ``(samples, n, ...)``, and its tensors."""
    node, graph = onnx.helper.make_node, network.graph
    read = {name for one in graph.node for name in one.input} | {value.name for value in graph.output}
    inputs: list[str] = []
    steps: list[Any] = []
    tensors: list[list[Any]] = [[] for _ in packed[0].values]
    for number, (value, tensor) in enumerate(zip(list(graph.input)[1:], packed)):
        if value.name not in read:
            continue  # num_batches_tracked and the like
        names, made = _dequantized(onnx, number, value.name, tensor)
        inputs += names
        steps += made
        for sample, kept in enumerate(tensors):
            for name, array in zip(names, (tensor.values, tensor.scales)):
                assert array is not None
                kept.append(onnx.numpy_helper.from_array(array[sample].contiguous().numpy(), f"{name}_of_{sample}"))
    constants = [node("Constant", [], [value.name], value=value) for value in graph.initializer]
    function = onnx.helper.make_function(
        _DOMAIN, "OneSample", [graph.input[0].name, *inputs], [graph.output[0].name],
        [*constants, *steps, *graph.node], list(network.opset_import),
    )  # fmt: skip
    nodes = []
    for sample, kept in enumerate(tensors):
        call = ["input", *(tensor.name for tensor in kept)]
        nodes.append(node("OneSample", call, [f"output_{sample}"], domain=_DOMAIN))
        nodes.append(node("Unsqueeze", [f"output_{sample}", "axis_0"], [f"row_{sample}"]))
    nodes.append(node("Concat", [f"row_{sample}" for sample in range(len(tensors))], ["all"], axis=0))
    return function, nodes, [tensor for kept in tensors for tensor in kept]


def _tail(onnx: Any, kind: Kind) -> tuple[list[Any], list[Any], list[str]]:
    """Nodes from ``all`` to the outputs, constants they need, names of the outputs."""
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    constants = [array(np.array([0], np.int64), "axis_0")]
    if kind == "regression":
        nodes = [
            node("ReduceMean", ["all", "axis_0"], ["mean"], keepdims=0),
            node("Sub", ["all", "mean"], ["apart"]),
            node("Mul", ["apart", "apart"], ["squared"]),
            node("ReduceMean", ["squared", "axis_0"], ["epistemic"], keepdims=0),
        ]
        return nodes, constants, ["mean", "epistemic"]
    constants += [
        array(np.array([1], np.int64), "axis_1"),
        array(np.array([2], np.int64), "axis_2"),
        array(np.array(_TINY, np.float32), "tiny"),
        array(np.array(0.0, np.float32), "zero"),
    ]

    def entropy(p: str, axis: str, out: str) -> list[Any]:
        return [
            node("Max", [p, "tiny"], [f"{p}_kept"]),
            node("Log", [f"{p}_kept"], [f"{p}_log"]),
            node("Mul", [p, f"{p}_log"], [f"{p}_terms"]),
            node("ReduceSum", [f"{p}_terms", axis], [f"{p}_sum"], keepdims=0),
            node("Neg", [f"{p}_sum"], [out]),
        ]

    nodes = [
        node("Softmax", ["all"], ["each"], axis=2),
        node("ReduceMean", ["each", "axis_0"], ["mean"], keepdims=0),
        *entropy("mean", "axis_1", "predictive_entropy"),
        *entropy("each", "axis_2", "entropies"),
        node("ReduceMean", ["entropies", "axis_0"], ["expected"], keepdims=0),
        node("Sub", ["predictive_entropy", "expected"], ["apart"]),
        node("Max", ["apart", "zero"], ["mutual_information"]),
    ]
    return nodes, constants, ["mean", "predictive_entropy", "mutual_information"]


def _assemble(onnx: Any, network: Any, packed: list[PackedTensor], kind: Kind) -> Any:
    function, calls, tensors = _calls(onnx, network, packed)
    nodes, constants, outputs = _tail(onnx, kind)
    first = copy.deepcopy(network.graph.input[0])
    first.name = "input"
    dims = [d.dim_value or d.dim_param for d in network.graph.output[0].type.tensor_type.shape.dim]
    entropy = [dims[0], *dims[2:]]
    shapes = {name: entropy if kind == "multiclass" and name != "mean" else dims for name in outputs}
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name]) for name in outputs]
    graph = onnx.helper.make_graph([*calls, *nodes], "posterior", [first], infos, initializer=[*tensors, *constants])
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
    task: TaskName = "auto",
    threads: int = 1,
) -> Export:
    """Write the ensemble of a bank as one ONNX file, and check it against PyTorch with onnxruntime.

    The network stands once, as a function that the graph calls for every sample; weights are int8 (int16) codes and
    power-of-two scales, multiplied in the graph, so nothing is rounded. (onnxruntime multiplies them when it loads the
    file, so a call is as fast as float32, and then takes float32's memory.) One-dimensional tensors, which have an
    exponent an element, and formats that are not linear keep float32 values. Input ``input``; outputs ``mean``,
    ``predictive_entropy``, ``mutual_information``, or ``mean`` and ``epistemic`` of a regression. The first dim is
    free.

    Args:
        module: Built like the one that was sampled, float32, with one input tensor; not changed.
        bank: The samples, or their path.
        path: The file; its folder must exist.
        batch: Real inputs (or a batch with targets), two rows or more, for the check and the latency.
        task: ``"auto"`` or ``"multiclass"`` for logits, ``"regression"`` for values.
        threads: Threads of onnxruntime when latencies are measured.

    Returns:
        Size, largest difference, latency, versions.

    Raises:
        ModuleNotFoundError: If a package of the extra ``export`` is missing.
        ValueError: If the bank is empty, the task or the inputs cannot be exported, or the file would pass 2 GiB.
        BankError: If the module is not the one that was sampled.
    """
    onnx, onnxscript, runtime = _packages()
    bank = bank if isinstance(bank, SampleBank) else SampleBank.open(bank)
    if bank.needs_base:
        bank.give_base(module)
    inputs, packed = checked_inputs(batch).cpu(), pack(bank)
    ensemble = PosteriorEnsemble(module, bank, task=task, members="streamed")
    kind = kind_of(next(ensemble.outputs(inputs)), task)
    if sum(tensor.nbytes for tensor in packed) > _LIMIT:
        raise ValueError("export_onnx: a file of more than 2 GiB is not possible; thin the bank first.")
    with swapped_weights(module):
        module.eval()
        bank.load_into(module, 0)
        firsts = tuple(tensor.decoded()[0].clone() for tensor in packed)
        network = _exported(Single(module, [tensor.name for tensor in packed]), (inputs, *firsts))
        alone = _exported(module, (inputs,))
    model = _assemble(onnx, network, packed, kind)
    target = Path(path)
    onnx.save(model, target)
    onnx.checker.check_model(str(target), full_check=True)
    session = _session(runtime, target.read_bytes(), threads)
    single = _session(runtime, alone.SerializeToString(), threads)
    feed = {"input": inputs.numpy()}
    names = [output.name for output in session.get_outputs()]
    answer = dict(zip(names, session.run(None, feed)))
    expected = ensemble(inputs).tensors()
    first = {single.get_inputs()[0].name: inputs.numpy()}
    return Export(
        path=target,
        samples=len(bank),
        bytes=target.stat().st_size,
        bytes_fp32=len(bank) * alone.ByteSize(),
        difference={name: float(np.abs(answer[name] - expected[name].numpy()).max()) for name in names},
        points=len(inputs),
        seconds=median_seconds(lambda: session.run(None, feed)),
        seconds_fp32=len(bank) * median_seconds(lambda: single.run(None, first)),
        versions=f"opset {OPSET}, onnx {onnx.__version__}, onnxscript {onnxscript.__version__}, "
        f"onnxruntime {runtime.__version__}, torch {torch.__version__}, {threads} thread(s)",
    )


def _session(runtime: Any, data: bytes, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
