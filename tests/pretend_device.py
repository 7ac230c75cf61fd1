"""A device that stands in for a GPU where there is none.

Its tensors keep their values in the host's memory, but PyTorch takes them for another device's.
What fails on a GPU because tensors lie on different devices, because NumPy gets a tensor that is
not on the host, or because mixed precision meets tensors of two types, fails here, too. What is
slow on a GPU, or wrong in its kernels or compiler, does not show.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend"
HOST = torch.device("cpu")
KEY = torch._C.DispatchKey.AutocastPrivateUse1
# These take tensors of any device; those index with tensors of the host, too.
MOVING = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")

# What autocast does on CUDA (PyTorch's aten/src/ATen/autocast_mode.h): half precision, single
# precision, single precision of the result, the widest type of the arguments.
HALF = """_convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot
    linear addbmm baddbmm bmm chain_matmul linalg_multi_dot scaled_dot_product_attention"""
SINGLE = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity
    cosine_embedding_loss nll_loss nll_loss2d kl_div l1_loss smooth_l1_loss huber_loss mse_loss
    margin_ranking_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist cdist renorm logsumexp upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d norm.Scalar norm.ScalarOpt_dim
"""
SINGLE_RESULT = """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList"""
WIDEST = """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot
    scatter_add cat stack"""
waits: list[str] = []  # operations for which a GPU would have to finish all its work first
_kernels: list[torch.library.Library] = []


class Elsewhere(Tensor):
    """A tensor of the device; `held` are its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        new = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # files know the host alone

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list:
        return self.held.tolist()


class Placing(TorchDispatchMode):
    """Makes tensors on the device where one is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Check where the arguments are, compute on the host, and put the results in place."""
    leaves = tree_leaves((args, kwargs))
    tensors = [a for a in leaves if isinstance(a, Tensor)]
    check_places(func, args, kwargs)
    if must_wait(func, args, kwargs):
        waits.append(func._schema.name)
    asked = next((a for a in leaves if isinstance(a, torch.device)), None)
    there = any(map(is_there, tensors)) if asked is None else asked.type == NAME
    known = {id(t.held if is_there(t) else t): t for t in tensors}

    def inward(a: Any) -> Any:
        if isinstance(a, torch.device) and a.type == NAME:
            return HOST
        return a.held if is_there(a) else a

    def outward(a: Tensor) -> Tensor:
        return known[id(a)] if id(a) in known else Elsewhere(a) if there else a

    args, kwargs = tree_map(inward, (args, kwargs))
    try:
        result = func(*args, **kwargs)
    except NotImplementedError:  # some kernels of the CPU have no half precision
        result = tree_map(to(torch.half), func(*tree_map(to(torch.float), args), **kwargs))
    return tree_map_only(Tensor, outward, result)


def is_there(a: Any) -> bool:
    return isinstance(a, Elsewhere)


def to(dtype: torch.dtype) -> Callable:
    """Return what casts half and single precision alone."""
    types = torch.half, torch.float
    return lambda a: a.to(dtype) if isinstance(a, Tensor) and a.dtype in types else a


def check_places(func: Any, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError where a GPU would."""
    name = func._schema.name
    leaves = tree_leaves((args, kwargs))
    if name in INDEXING:
        indices = [a for a in tree_leaves(args[1]) if isinstance(a, Tensor)]
        leaves = tree_leaves((args[0], args[2:]))
        if not is_there(args[0]) and any(map(is_there, indices)):
            raise RuntimeError(f"{name}: indices on the device, the tensor on the host")
    tensors = [a for a in leaves if isinstance(a, Tensor)]
    strangers = [t for t in tensors if not is_there(t)]
    if name not in MOVING and 0 < len(strangers) < len(tensors):
        scalars = all(t.ndim == 0 for t in strangers)
        if not (scalars and (torch.Tag.pointwise in func.tags or name in INDEXING)):
            shapes = [tuple(t.shape) for t in strangers]
            raise RuntimeError(f"{name}: tensors on the device and, {shapes}, on the host")
    device = kwargs.get("device")
    there = any(map(is_there, tensors)) or (device is not None and device.type == NAME)
    for a in leaves:
        if isinstance(a, torch.Generator) and (a.device.type == NAME) != there:
            raise RuntimeError(f"{name}: the generator is on {a.device}")


def must_wait(func: Any, args: tuple, kwargs: dict) -> bool:
    """Tell whether the host waits: for values of the device, or for a copy that goes there."""
    name, first = func._schema.name, args[0] if args else None
    if name == "aten::_to_copy" and not is_there(first):
        device = kwargs.get("device")
        there = device is not None and device.type == NAME
        return there and not kwargs.get("non_blocking")
    if not is_there(first):
        return name == "aten::copy_" and is_there(args[1])
    if name in INDEXING:
        indices = [a for a in tree_leaves(args[1]) if isinstance(a, Tensor)]
        return any(i.dtype == torch.bool or not is_there(i) for i in indices)
    if name == "aten::_to_copy":
        return kwargs.get("device") == HOST
    return name in WAITING


def register() -> None:
    """Tell PyTorch of the device, once a process."""
    if _kernels:
        return

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.half]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    aten = torch.library.Library("aten", "IMPL")
    # `torch.tensor(values, device=...)` comes here, past all modes
    for op in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
        aten.impl(op.name().removeprefix("aten::"), partial(make, op), "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, KEY.name)
    for names, cast in (
        (HALF, to(torch.half)),
        (SINGLE, to(torch.float)),
        (SINGLE_RESULT, None),
        (WIDEST, "widest"),
    ):
        for name in names.split():
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, partial(autocast, op, cast), KEY.name)
    aten.impl("binary_cross_entropy", refuse, KEY.name)
    _kernels.extend([aten, rest])


def make(op: Any, *args: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(op(*args, **{**kwargs, "device": HOST}))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if is_there(target) and not is_there(source) and not non_blocking:
        waits.append("aten::_copy_from")
    values, place = (t.held if is_there(t) else t for t in (source, target))
    place.copy_(values)
    return target


def autocast(op: Any, cast: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operation as autocast would."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
        if cast is None:
            names = [a.name for a in op._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if args[0].dtype == torch.half and given.get("dtype") is None:
                args, kwargs = args[: names.index("dtype")], {**kwargs, "dtype": torch.float}
            return op(*args, **kwargs)
        if cast == "widest":
            types = {a.dtype for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            cast = to(torch.float) if torch.float in types else to(torch.half)
        args, kwargs = tree_map(cast, (args, kwargs))
        return op(*args, **kwargs)


def refuse(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("binary_cross_entropy is unsafe to autocast")


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Within, the device can be used, and files be loaded to it."""
    register()
    load = torch.load

    def load_there(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if map_location is None or torch.device(map_location).type != NAME:
            return load(*args, map_location=map_location, **kwargs)
        loaded = load(*args, map_location=HOST, **kwargs)
        return tree_map_only(Tensor, lambda t: t.to(map_location), loaded)

    with pytest.MonkeyPatch.context() as patch, Placing():
        patch.setattr(torch, "load", load_there)
        yield torch.device(NAME, 0)
