"""Packed layers in transformers' tensor parallelism: what a rank keeps of them, and what the ranks exchange.

transformers' styles ("colwise", "rowwise", ...) shard every parameter of a layer along one dimension. A packed layer
has parameters with a row for each output, others with a column for each input, and lists that belong to the whole
layer. So the styles are wrapped: for packed layers the rules are those below, for every other module they are
transformers'. Parameters are marked as `DTensor`s before the checkpoint is read, of which each rank then reads its part
alone; once they are loaded, each rank has an ordinary `ARBLinear` of its own rows or columns.

| style | packed linear | exchanged |
|---|---|---|
| colwise | its rows are divided | nothing |
| colwise_gather_output | its rows are divided | the outputs are gathered |
| rowwise | its columns are divided, where these are whole blocks in the order of the inputs | the outputs are summed |
| rowwise, otherwise | its rows are divided | the inputs are gathered, and so are the outputs |
| moe_tp_experts | the experts are divided | the outputs are summed |

Of a product of two sign matrices, the rows of the outer or the columns of the inner one are divided, and every rank
has the other as a whole. "Otherwise" are salient columns, inputs that are mixed by a transform, and columns that are
stored in order of activation: each block then holds columns of every rank. Against the sum over ranks that costs one
more gather of the input, and nothing is stored or computed twice.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..format.slicing import ROW_TENSORS, column_obstacle
from ..nn import ARBExperts, ARBFactorizedLinear, ARBLinear
from .forwards import divided_columns, divided_experts, divided_rows

_STYLES = (
    "colwise",
    "colwise_rep",
    "colwise_gather_output",
    "rowwise",
    "rowwise_rep",
    "rowwise_split_input",
    "packed_colwise",
    "packed_rowwise",
    "moe_tp_experts",
)
# Where a packed module remembers what of it other ranks hold: name of a parameter -> mesh, placements, shape, stride.
_SHARDS = "_arb_shards"
# Where it notes that its parameters were divided by the rules of this file.
_RULE = "_arb_rule"
# The parameters that have a row for each output, and those that have a column for each input.
_ROW_PARAMETERS = frozenset(name if name == "weight" else f"weight_{name}" for name in ROW_TENSORS)
_COLUMN_PARAMETERS = ("weight", "weight_row_scale", "weight_col_scale")
# Packed tensors that are columns, or that every rank can have as a whole: not the salient columns, which lie unevenly
# among the ranks, nor what reorders or mixes the inputs.
_DIVISIBLE = frozenset(
    ("weight", "row_scale", "col_scale", "scale_grid", "inner", "inner_row_scale", "inner_col_scale")
)
_COLUMN_PARAMETERS_OF_FACTORS = ("weight_inner", "weight_inner_col_scale")


def prepare(model: PreTrainedModel, pre_quantized: bool) -> None:
    """Before a model is divided and loaded: teaches transformers' styles how packed layers are divided.

    Args:
        model: on the meta device, its packed modules in their places.
        pre_quantized: whether it is loaded binarized.

    Raises:
        ValueError: a form of parallelism that packed layers or this torch do not have, or a model that is to be
            binarized.
    """
    config = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(config, name, None) or 1 for name in ("tp_size", "ep_size", "fsdp_size", "pp_size")}
    sizes["dp_replicate_size"] = getattr(config, "dp_replicate_size", None) or 1
    if max(sizes.values()) == 1:
        return
    if not pre_quantized:
        raise ValueError(
            "A model cannot be binarized while it is divided over several ranks: each would calibrate a part of every "
            "layer. Binarize it without distributed_config (several GPUs: torchrun -m optimum_arb quantize), save it, "
            "and load the saved model with distributed_config."
        )
    for name in ("fsdp_size", "pp_size", "dp_replicate_size"):
        if sizes[name] > 1:
            raise ValueError(
                f"{name}={sizes[name]}: a binarized model is divided by tp_size (and ep_size) alone. Leave {name} out, "
                "or load the model with device_map."
            )
    follows = hasattr(HfQuantizer, "update_parallel_plan")  # since 5.21 a plan is extended to the companions
    dispatches = "ep_dispatch_experts" in (getattr(model, "ep_plan", None) or {}).values()
    if sizes["ep_size"] > 1 and not (follows and dispatches):
        raise ValueError(
            f"ep_size={sizes['ep_size']}: {type(model).__name__} has no expert plan that packed experts can follow in "
            "this version of transformers. Use tp_size alone, which divides the experts too."
        )
    from torch.distributed.tensor import distribute_tensor

    if "src_data_rank" not in inspect.signature(distribute_tensor).parameters:
        raise ValueError(
            f"tp_size={sizes['tp_size']}: transformers divides a model with what torch has from 2.7 on, and this is "
            f"torch {torch.__version__}. Install a newer torch, or load the model with device_map."
        )
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    for name in _STYLES:
        if name in ALL_PARALLEL_STYLES and not isinstance(ALL_PARALLEL_STYLES[name], _PackedStyle):
            ALL_PARALLEL_STYLES[name] = _PackedStyle(name, ALL_PARALLEL_STYLES[name])


def localize(model: nn.Module) -> None:
    """After a divided model has loaded: each packed module becomes an ordinary one of this rank's part.

    Raises:
        ValueError: a packed module was divided by a style that is not for packed layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, (ARBLinear, ARBExperts)):
            shards = {}
            parameters: list[tuple[str, Any]] = list(module.named_parameters(recurse=False))
            for key, parameter in parameters:
                if not hasattr(parameter, "placements"):
                    continue
                mesh, placements = parameter.device_mesh, tuple(parameter.placements)
                shards[key] = (mesh, placements, tuple(parameter.shape), tuple(parameter.stride()))
                local = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
                module.register_parameter(key, local)
            if shards:
                _check_rule(name, module)
                module.__dict__[_SHARDS] = shards
                _shrink(module)


def is_divided(module: nn.Module) -> bool:
    """Whether other ranks hold a part of a packed module."""
    return _SHARDS in module.__dict__


def whole_state_dict(model: nn.Module) -> dict[str, Any] | None:
    """The state dict of a divided model, in which transformers gathers what other ranks hold; None for any other.

    Every rank must ask for it, and save what it gets.
    """
    from torch.distributed.tensor import DTensor

    divided = {name: module for name, module in model.named_modules() if is_divided(module)}
    if not divided:
        return None
    state = model.state_dict()
    for name, module in divided.items():
        for key, (mesh, placements, shape, stride) in module.__dict__[_SHARDS].items():
            whole = f"{name}.{key}" if name else key
            part = state[whole].detach()
            short = part.dtype == torch.int16  # neither gloo nor NCCL moves it
            tensor = DTensor.from_local(
                part.int() if short else part,
                mesh,
                placements,
                run_check=False,
                shape=torch.Size(shape),
                stride=stride,
            )
            state[whole] = tensor.full_tensor().to(part.dtype) if short else tensor
    return state


class _PackedStyle:
    """One of transformers' styles, with the rules of this file for packed modules.

    Args:
        name: of the style.
        style: transformers' own, for all other modules.
    """

    def __init__(self, name: str, style: Any):
        self.name = name
        self.style = style

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "style":
            raise AttributeError(name)
        return getattr(self.style, name)

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        """Raises ValueError where a packed module cannot be divided by this style among so many ranks."""
        if not isinstance(module, (ARBLinear, ARBExperts)):
            self.style.validate_param(module, param, mesh, parameter_name=parameter_name)
            return
        where = (parameter_name or param).rpartition(".")[0]
        if isinstance(module, ARBExperts):
            if module.num_experts < mesh.size():
                raise ValueError(f"{where}: {module.num_experts} experts cannot be divided among {mesh.size()} ranks.")
        elif self.name not in _STYLES[:6]:
            raise ValueError(
                f"{where}: a packed linear cannot be divided by the style {self.name!r}. Give it another one, for "
                f"instance DistributedConfig(tp_plan={{'{where}': 'colwise_gather_output'}}) with * for the layer."
            )
        elif module.out_features < mesh.size():
            raise ValueError(f"{where}: {module.out_features} outputs cannot be divided among {mesh.size()} ranks.")

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        """Marks a parameter as divided, or leaves it whole."""
        if isinstance(module, ARBExperts):
            dim: int | None = 0
        elif isinstance(module, ARBLinear):
            if self._by_columns(module, mesh):
                factors = isinstance(module, ARBFactorizedLinear)
                whole_row = param == "weight_row_scale" and module.block_size == -1
                has_columns = param in (_COLUMN_PARAMETERS_OF_FACTORS if factors else _COLUMN_PARAMETERS)
                dim = 1 if has_columns and not whole_row else None
            else:
                dim = 0 if param in _ROW_PARAMETERS or param == "bias" else None
        else:
            self.style.shard_param(module, param, mesh)
            return
        module.__dict__[_RULE] = self.name
        parameter = module._parameters.get(param)
        if dim is None or parameter is None or hasattr(parameter, "placements"):
            return
        from torch.distributed.tensor import Shard, distribute_tensor

        divided = distribute_tensor(parameter, mesh, [Shard(dim)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(divided, requires_grad=parameter.requires_grad)

    def install_forward(self, module: nn.Module, mesh: Any, **kwargs: Any) -> nn.Module:
        """Puts what the ranks exchange around the module's forward."""
        if isinstance(module, ARBExperts):
            forward = divided_experts(module, mesh)
        elif not isinstance(module, ARBLinear):
            return self.style.install_forward(module, mesh, **kwargs)
        elif self.name.startswith("colwise"):
            forward = divided_rows(module, mesh, gather_input=False, gather_output=self.name != "colwise")
        elif self._by_columns(module, mesh):
            forward = divided_columns(module, mesh, split_input=self.name != "rowwise")
        else:
            forward = divided_rows(module, mesh, gather_input=self.name == "rowwise", gather_output=True)
        module.__dict__["forward"] = forward
        return module

    def _by_columns(self, module: ARBLinear, mesh: Any) -> bool:
        """Whether the columns are divided: in a rowwise style, where the parts are packed weights themselves."""
        tensors = module.packed()
        if self.name.startswith("colwise") or not tensors.keys() <= _DIVISIBLE:
            return False
        return column_obstacle(tensors, module.in_features, module.block_size, mesh.size()) is None


def _check_rule(name: str, module: nn.Module) -> None:
    if _RULE not in module.__dict__ and not isinstance(module, ARBExperts):  # of experts, ep_plan divides them too
        raise ValueError(
            f"{name}: it is packed, and was divided by a style that is not for packed layers. Use the model's own plan "
            "(tp_plan='auto'), or one of " + ", ".join(_STYLES[:6]) + "."
        )


def _shrink(module: ARBLinear | ARBExperts) -> None:
    """Sets a module's sizes to those of this rank's part."""
    if isinstance(module, ARBLinear):
        mesh, placements, *_ = next(iter(module.__dict__[_SHARDS].values()))
        if placements[0].dim == 1:
            module.in_features //= mesh.size()
        module.out_features = module.weight.shape[0]
        return
    experts = next(len(module.get_parameter(name)) for name in module.float_matrices)
    module.num_experts = experts
    module.__dict__["_is_expert_parallel"] = True  # transformers' own forward, of backend="dequantize", asks for it
    module.forms = {name: dataclasses.replace(form, experts=experts) for name, form in module.forms.items()}
    module.float_matrices = {
        name: dataclasses.replace(matrix, experts=experts) for name, matrix in module.float_matrices.items()
    }
