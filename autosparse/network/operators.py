"""What the operators of torch do: kinds, factors of products, and their arguments by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

KINDS_OF_OPERATORS = {
    "activation": "relu relu6 leaky_relu gelu silu sigmoid tanh elu selu celu mish hardswish hardsigmoid hardtanh "
    "softplus threshold log_sigmoid_forward prelu _prelu_kernel rrelu_with_noise glu clamp clamp_min clamp_max "
    "softshrink hardshrink",
    "norm": "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm_with_update native_layer_norm native_group_norm _fused_rms_norm linalg_vector_norm",
    "add": "add sub rsub",
    "mul": "mul div",
    "concat": "cat stack",
    "pool": "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d mean amax",
    "reshape": "view _unsafe_view reshape _reshape_alias t transpose permute expand squeeze unsqueeze clone _to_copy "
    "flatten as_strided pixel_shuffle pixel_unshuffle roll flip constant_pad_nd movedim native_channel_shuffle "
    "channel_shuffle contiguous im2col col2im copy",
    "slice": "slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unbind index index_select "
    "gather narrow diagonal",
    "softmax": "_softmax _safe_softmax _log_softmax",
    "embedding": "embedding embedding_bag _embedding_bag _embedding_bag_forward_only",
    "resize": "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d",
    "reduce": "sum var var_mean std prod max min",
}


KIND = {name: kind for kind, names in KINDS_OF_OPERATORS.items() for name in names.split()}


# The two factors of a product by their names in the operator's schema, and their contracted dimensions.
FACTORS: dict[str, tuple[tuple[str, int], tuple[str, int]]] = {
    "convolution": (("input", 1), ("weight", 1)),
    "linear": (("input", -1), ("weight", -1)),
    "mm": (("self", -1), ("mat2", -2)),
    "bmm": (("self", -1), ("mat2", -2)),
    "addmm": (("mat1", -1), ("mat2", -2)),
    "_addmm_activation": (("mat1", -1), ("mat2", -2)),
    "baddbmm": (("batch1", -1), ("batch2", -2)),
    "addbmm": (("batch1", -1), ("batch2", -2)),
    "mv": (("self", -1), ("vec", 0)),
    "addmv": (("mat", -1), ("vec", 0)),
    "dot": (("self", 0), ("tensor", 0)),
    "vdot": (("self", 0), ("other", 0)),
}


# Their results are views or copies, as strides allow.
VIEWS = ("view", "_unsafe_view", "_reshape_alias", "reshape")


ON_VECTORS = ("mv", "addmv", "dot", "vdot")


SAME = ("alias", "detach", "lift_fresh", "lift", "_conj", "resolve_conj", "resolve_neg")


def may_be_left_out(name: str) -> bool:
    """Torch leaves some of these out, as strides allow, and detaches results of factories that an observer keeps."""
    return name in SAME or KIND.get(name) == "reshape"


def base_name(func: Any) -> str:
    """The operator's name without its overload and the underscore of an in-place variant: `"relu"` of `aten.relu_`."""
    name: str = func._schema.name.removeprefix("aten::")
    return name if name in KIND or name in FACTORS or name.endswith("__") else name.removesuffix("_")


def named_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator by their names in its schema."""
    return {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})


def written_arguments(func: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes in place."""
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in changed for t in tree_leaves(arguments.get(name)) if isinstance(t, Tensor)]


def takes_no_values(name: str) -> bool:
    """Whether the operator reads only the shape and type of its operand (`zeros_like`, `new_zeros`)."""
    return name.startswith("new_") or name.endswith("_like")


def only_moves(func: Any, name: str) -> bool:
    """Whether the operator gives the values of its operands, elsewhere or in another precision."""
    return getattr(func, "is_view", False) or name in VIEWS or KIND.get(name) in ("reshape", "slice", "concat")
