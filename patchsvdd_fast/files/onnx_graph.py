"""A builder of ONNX graphs: nodes are appended one by one, and tensors kept in the model.

Maps and other values are names of nodes' outputs. The package `onnx` is imported only when used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 13, 7  # the operators need no newer ones, and older runtimes read these

Values = tuple[torch.dtype, Sequence[int | str]]
"""Dtype and shape of an input or output; a text in the shape names a size that is free."""


class Graph:
    """Collects the nodes and the kept tensors of a model."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        """The kept tensors by name; ONNX calls them initializers."""

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        return self.add_several(operator, *inputs, outputs=[output or ""], **attributes)[0]

    def add_several(
        self, operator: str, *inputs: str, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs, and return their names; "" where any name will do."""
        from onnx import helper

        place = f"{operator}_{len(self.nodes)}"
        names = [name or f"{place}{'' if i == 0 else f'_{i}'}" for i, name in enumerate(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name=names[0], **attributes))
        return names

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """The value as float32, int64 or bool."""
        from onnx import TensorProto

        types = {
            torch.float32: TensorProto.FLOAT,
            torch.int64: TensorProto.INT64,
            torch.bool: TensorProto.BOOL,
        }
        return self.add("Cast", value, to=types[dtype])

    def weight(self, name: str, values: Tensor) -> str:
        """Keep a tensor in the model and return its name."""
        from onnx import numpy_helper

        kept = values.detach().cpu().contiguous().numpy()
        self.weights[name] = numpy_helper.from_array(kept, name)
        return name

    def number(self, value: float | Sequence[int]) -> str:
        """Keep a float32 scalar, an int64 scalar or a list of int64, and return its name."""
        dtype = torch.float32 if isinstance(value, float) else torch.int64
        return self.weight(f"number.{value}".replace(" ", ""), torch.tensor(value, dtype=dtype))

    def include(self, model: onnx.ModelProto, prefix: str, inputs: Mapping[str, str]) -> list[str]:
        """Append all of another model and return the names of its outputs.

        prefix: of all its names here. inputs: for each of its inputs, the value here.
        """
        from onnx import compose

        prefixed = compose.add_prefix(model, prefix).graph
        values = {prefix + name: value for name, value in inputs.items()}
        for node in prefixed.node:
            node.input[:] = [values.get(name, name) for name in node.input]
            self.nodes.append(node)
        self.weights |= {weight.name: weight for weight in prefixed.initializer}
        return [output.name for output in prefixed.output]

    def model(
        self,
        name: str,
        inputs: Mapping[str, Values],
        outputs: Mapping[str, Values],
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
        """The graph as a checked model, with its inputs, outputs and metadata."""
        from onnx import TensorProto, checker, helper

        from .. import __version__

        types = {
            torch.float32: TensorProto.FLOAT,
            torch.uint8: TensorProto.UINT8,
            torch.bool: TensorProto.BOOL,
        }
        given, found = (
            [
                helper.make_tensor_value_info(value, types[dtype], list(shape))
                for value, (dtype, shape) in values.items()
            ]
            for values in (inputs, outputs)
        )
        model = helper.make_model(
            helper.make_graph(self.nodes, name, given, found, list(self.weights.values())),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="patchsvdd_fast",
            producer_version=__version__,
        )
        helper.set_model_props(model, dict(metadata))
        checker.check_model(model, full_check=True)
        return model
