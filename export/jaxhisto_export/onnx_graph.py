"""Layout onnx: the encoder as a graph for onnxruntime and others, weights unfused and bit-equal.

Input `image` (n, 3, height, width) float32, normalised, or `tiles` (n, height, width, 3) uint8
RGB with the normalisation inside; output `features` (n, d). Initialisers have torchvision's
names, so that the file can be read back; the counters of the BatchNorms, which no node uses,
are in the metadata.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto_export.architecture import COUNT_SUFFIX, Architecture
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.provenance import Provenance, to_strings

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, NDArray[Any]]

OPSET = 17
IR_VERSION = 8  # of that opset; readers of 2022 and later take it
COUNTERS = "num_batches_tracked"  # key of the metadata: JSON, name -> count
EPSILON = 1e-5  # torchvision's BatchNorm
OUTPUT = "features"
INPUTS = {False: "image", True: "tiles"}  # by whether the graph normalises

# Field numbers of onnx.proto, each with wire type 2 (length, then bytes).
MODEL_GRAPH, GRAPH_INITIALIZER, TENSOR_RAW_DATA = 7, 5, 9


def onnx_pieces(
    tensors: Arrays, architecture: Architecture, provenance: Provenance, normalise: bool
) -> Iterator[bytes | memoryview]:
    """The bytes of the file, tensor after tensor.

    The library would hold every weight twice more: in its tree, and as one string. Here it
    serialises the graph without weights, and they are framed around it.

    Args:
      tensors: the backbone under torchvision's names.
      architecture: their network.
      provenance: what the metadata says.
      normalise: take uint8 tiles and normalise inside.

    Raises:
      ExportFileError: onnx is not installed.
    """
    helper = _onnx().helper
    weights = {k: v for k, v in tensors.items() if not k.endswith(COUNT_SUFFIX)}
    counters = {k: int(v) for k, v in tensors.items() if k.endswith(COUNT_SUFFIX)}
    graph = build_graph(architecture, provenance, normalise).SerializeToString(deterministic=True)
    framed = [_framed_tensor(name, array) for name, array in weights.items()]
    size = len(graph) + sum(len(head) + array.nbytes for head, array in framed)
    model = helper.make_model(
        helper.make_graph([], "", [], []),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="jaxhisto",
        producer_version=provenance["code_version"],
    )
    model.ClearField("graph")
    helper.set_model_props(model, to_strings(provenance) | {COUNTERS: json.dumps(counters)})
    yield model.SerializeToString(deterministic=True) + _field(MODEL_GRAPH, size) + graph
    for head, array in framed:
        yield head
        yield array.reshape(-1).view(np.uint8).data


def _framed_tensor(name: str, array: NDArray[Any]) -> tuple[bytes, NDArray[Any]]:
    """All of an initialiser but its values, and its values."""
    tensor = _onnx().TensorProto(name=name, dims=array.shape, data_type=_onnx().TensorProto.FLOAT)
    head = tensor.SerializeToString(deterministic=True) + _field(TENSOR_RAW_DATA, array.nbytes)
    values = np.ascontiguousarray(array, dtype="<f4")
    return _field(GRAPH_INITIALIZER, len(head) + array.nbytes) + head, values


def _field(number: int, length: int) -> bytes:
    """Tag and length of a protobuf field of bytes."""
    encoded = bytearray([number << 3 | 2])
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*encoded, length])


def build_graph(
    architecture: Architecture, provenance: Provenance, normalise: bool
) -> onnx.GraphProto:
    """The network's nodes, inputs and outputs, without its weights."""
    helper, kinds = _onnx().helper, _onnx().TensorProto
    nodes = _Nodes()
    if normalise:
        shape: list[Any] = ["n", "height", "width", 3]
        image = _preprocessing(nodes, provenance)
    else:
        shape, image = ["n", 3, "height", "width"], INPUTS[False]
    _network(nodes, architecture, image)
    kind = kinds.UINT8 if normalise else kinds.FLOAT
    given = helper.make_tensor_value_info(INPUTS[normalise], kind, shape)
    width = ["n", architecture.feature_width]
    result = helper.make_tensor_value_info(OUTPUT, kinds.FLOAT, width)
    graph: onnx.GraphProto = helper.make_graph(nodes.all, architecture.name, [given], [result])
    return graph


class _Nodes:
    """The nodes so far; each is named after its output."""

    def __init__(self) -> None:
        self.all: list[onnx.NodeProto] = []

    def add(self, operation: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        make = _onnx().helper.make_node
        self.all.append(make(operation, inputs, [output], name=output, **attributes))
        return output

    def convolution(self, x: str, name: str, norm: str, **attributes: Any) -> str:
        """A convolution without bias and its BatchNorm."""
        y = self.add("Conv", [x, f"{name}.weight"], f"{name}.out", **attributes)
        parts = ("weight", "bias", "running_mean", "running_var")
        inputs = [y, *(f"{norm}.{part}" for part in parts)]
        return self.add("BatchNormalization", inputs, f"{norm}.out", epsilon=EPSILON)


def _preprocessing(nodes: _Nodes, provenance: Provenance) -> str:
    """tiles -> image: values to the encoder's range, minus mean, by std, as one Sub and Div."""
    low, high = provenance["value_range"]
    unit = 255 / (high - low)
    offset = [(value - low) * unit for value in provenance["mean"]]
    scale = [value * unit for value in provenance["std"]]
    constants = {"offset": np.array(offset, np.float32), "scale": np.array(scale, np.float32)}
    helper = _onnx().numpy_helper
    for name, values in constants.items():
        tensor = helper.from_array(values.reshape(3, 1, 1), f"preprocess.{name}")
        nodes.add("Constant", [], f"preprocess.{name}", value=tensor)
    x = nodes.add("Cast", [INPUTS[True]], "preprocess.float", to=_onnx().TensorProto.FLOAT)
    x = nodes.add("Transpose", [x], "preprocess.channels_first", perm=[0, 3, 1, 2])
    if provenance["channel_order"] == "BGR":
        order = helper.from_array(np.array([2, 1, 0], np.int64), "preprocess.order")
        nodes.add("Constant", [], "preprocess.order", value=order)
        x = nodes.add("Gather", [x, "preprocess.order"], "preprocess.bgr", axis=1)
    x = nodes.add("Sub", [x, "preprocess.offset"], "preprocess.centred")
    return nodes.add("Div", [x, "preprocess.scale"], INPUTS[False])


def _network(nodes: _Nodes, architecture: Architecture, x: str) -> None:
    x = nodes.convolution(x, "conv1", "bn1", **_geometry(7, 2))
    x = nodes.add("Relu", [x], "relu")
    x = nodes.add("MaxPool", [x], "maxpool", **_geometry(3, 2))
    for stage, count in enumerate(architecture.blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            project = block == 0 and (stage > 0 or architecture.bottleneck)
            name = f"layer{stage + 1}.{block}"
            x = _block(nodes, x, name, stride, architecture.bottleneck, project)
    x = nodes.add("GlobalAveragePool", [x], "avgpool")
    nodes.add("Flatten", [x], OUTPUT, axis=1)


def _block(nodes: _Nodes, x: str, name: str, stride: int, bottleneck: bool, project: bool) -> str:
    sides = (1, 3, 1) if bottleneck else (3, 3)
    strided = 2 if bottleneck else 1  # torchvision strides in the 3x3
    y = x
    for number, side in enumerate(sides, start=1):
        geometry = _geometry(side, stride if number == strided else 1)
        y = nodes.convolution(y, f"{name}.conv{number}", f"{name}.bn{number}", **geometry)
        if number < len(sides):
            y = nodes.add("Relu", [y], f"{name}.relu{number}")
    if project:
        shortcut = f"{name}.downsample"
        x = nodes.convolution(x, f"{shortcut}.0", f"{shortcut}.1", **_geometry(1, stride))
    return nodes.add("Relu", [nodes.add("Add", [y, x], f"{name}.sum")], f"{name}.out")


def _geometry(side: int, stride: int) -> dict[str, list[int]]:
    return {"kernel_shape": [side] * 2, "strides": [stride] * 2, "pads": [side // 2] * 4}


def read_onnx(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Initialisers, with the counters of our metadata among them, and the other metadata.

    Arrays are read-only views. Nothing of the graph is run and no other file is opened.

    Raises:
      ExportFileError: onnx is not installed, no whole ONNX file, or weights outside of it.
    """
    model = _parse(path)
    try:
        arrays = {tensor.name: _array(tensor) for tensor in model.graph.initializer}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        counters = json.loads(metadata.pop(COUNTERS, "{}"))
        arrays |= {str(name): np.array(count, np.int64) for name, count in counters.items()}
    except ExportFileError as error:
        raise ExportFileError(f"{path}: {error}") from error
    except Exception as error:  # dimensions, types and counters are whatever the file says
        raise ExportFileError(f"{path}: not a whole ONNX file, export it again.") from error
    return arrays, metadata


def _array(tensor: onnx.TensorProto) -> NDArray[Any]:
    if tensor.data_location == tensor.EXTERNAL:
        raise ExportFileError("keeps weights in another file, save it as one file.")
    array: NDArray[Any] = _onnx().numpy_helper.to_array(tensor)
    return array


def _parse(path: Path) -> onnx.ModelProto:
    load = _onnx().load_model
    try:
        model: onnx.ModelProto = load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own errors, and whatever a damaged file runs into
        raise ExportFileError(f"{path}: not a whole ONNX file, export it again.") from error
    if not model.graph.node:
        raise ExportFileError(f"{path}: holds no graph, export it again.")
    return model


def graph_problems(path: Path, architecture: Architecture, provenance: Provenance) -> list[str]:
    """Whether the nodes are those of this package: right weights in another graph are wrong."""
    graph = _parse(path).graph
    graph.ClearField("initializer")
    names = {given.name for given in graph.input}
    wanted = build_graph(architecture, provenance, INPUTS[True] in names)
    return [] if graph == wanted else ["the graph is not the one that was exported"]


def run_graph(path: Path, image: NDArray[np.float32], tiles: NDArray[np.uint8]) -> NDArray[Any]:
    """Features (n, d) by onnxruntime on the CPU, from whichever of the two it takes.

    Raises:
      ModuleNotFoundError: onnxruntime is not installed.
      ExportFileError: onnxruntime refuses it.
    """
    onnxruntime = importlib.import_module("onnxruntime")  # comes without types
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # waiting threads cost more than a few tiles gain
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        name = session.get_inputs()[0].name
        feed = tiles if name == INPUTS[True] else image
        features: NDArray[Any] = session.run([OUTPUT], {name: feed})[0]
    except Exception as error:  # its errors share no class but this one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ExportFileError(f"{path}: onnxruntime does not run it ({reason}).") from error
    return features


def _onnx() -> ModuleType:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ModuleNotFoundError as error:
        raise ExportFileError(
            "onnx is not installed: pip install 'jaxhisto[onnx]' (or onnx alone)"
        ) from error
    return onnx
