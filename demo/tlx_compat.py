"""Lets TensorLayerX 0.5.8 and GammaGL 0.4.0 run on today's torch and Paddle, far enough for the demos.

Both were written for torch 1.10 and Paddle 2.2. On TensorFlow nothing is changed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install(backend: str) -> None:
    """Choose TensorLayerX's backend and mend what keeps it from working.

    Parameters
    ----------
    backend : str
        ``"tensorflow"``, ``"torch"`` or ``"paddle"``.

    Raises
    ------
    RuntimeError
        TensorLayerX has been imported already.
    """
    if "tensorlayerx" in sys.modules:
        raise RuntimeError("install() must be called before tensorlayerx is imported")
    os.environ["TL_BACKEND"] = backend
    # TensorLayerX says so of every version but the one that it was written for.
    warnings.filterwarnings("ignore", message="The version of the backend you have installed does not match")
    if backend == "torch":
        _install_torch()
    elif backend == "paddle":
        _install_paddle()


def _stand_in(name: str, **members: Any) -> ModuleType:
    """Put a made-up module where ``import`` finds it."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # others may ask importlib whether there is such a module
    vars(module).update(members)
    sys.modules[name] = module
    return module


# --- torch ---------------------------------------------------------------------------------------------------------


def _install_torch() -> None:
    import torch

    if importlib.util.find_spec("torchvision") is None:
        # TensorLayerX imports it for operations on images.
        _stand_in("torchvision", ops=_stand_in("torchvision.ops"))

    core = importlib.import_module("tensorlayerx.nn.core.core_torch")
    # An override of torch's own method, which lacks an argument that torch passes since 2.0.
    core.Module._named_members = torch.nn.Module._named_members

    optimizers = importlib.import_module("tensorlayerx.optimizers.torch_optimizers")
    # It updates weights by private functions of torch, whose arguments have changed.
    optimizers.Adam.apply_gradients = _adam_step

    mpops = importlib.import_module("gammagl.mpops.torch")
    if not mpops.use_ext:
        # GammaGL's wheel lacks the compiled module that these functions are in.
        mpops.c_segment_sum, mpops.c_segment_mean, mpops.c_segment_max = _segment_sum, _segment_mean, _segment_max


def _adam_step(self: Any, grads_and_vars: Any = None, closure: Any = None) -> Any:
    """Update weights by torch's Adam, which TensorLayerX's optimiser holds with all its settings."""
    for group in self.optimizer_adam.param_groups:
        group["lr"] = self.lr() if callable(self.lr) else self.lr  # a schedule
    return self.optimizer_adam.step(closure)


def _segment_sum(x: Any, segments: Any, count: int) -> Any:
    """Add up rows `x` [E, ...] by their segments [E]; return [count, ...]."""
    return x.new_zeros(count, *x.shape[1:]).index_add(0, segments, x)


def _segment_mean(x: Any, segments: Any, count: int) -> Any:
    """Average rows by their segments; a segment without rows is 0."""
    rows = segments.bincount(minlength=count).clamp(min=1).to(x.dtype)
    return _segment_sum(x, segments, count) / rows.reshape(-1, *[1] * (x.dim() - 1))


def _segment_max(x: Any, segments: Any, count: int) -> Any:
    """Return the largest of rows by their segments; a segment without rows is 0."""
    rows = segments.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
    return x.new_zeros(count, *x.shape[1:]).scatter_reduce(0, rows, x, "amax", include_self=False)


# --- Paddle --------------------------------------------------------------------------------------------------------


def _install_paddle() -> None:
    import paddle

    _install_fluid()

    initializers = importlib.import_module("tensorlayerx.nn.initializers.paddle_initializers")
    # They draw by operators appended to a program, of which Paddle has none in its dynamic mode any more.
    initializers.XavierUniform.__call__ = lambda self, var, block=None: paddle.nn.initializer.XavierUniform()(
        var, block
    )
    initializers.HeNormal.__call__ = lambda self, var, block=None: paddle.nn.initializer.KaimingNormal(
        negative_slope=self.a, nonlinearity=self.nonlinearity, mode=self.mode
    )(var, block)

    mpops = importlib.import_module("gammagl.mpops.paddle")
    # It calls an operator by a table of Paddle 2 that is gone; this is the same operator.
    mpops._scatter = paddle.scatter


def _install_fluid() -> None:
    """Make ``paddle.fluid``, which became ``paddle.base``, with what TensorLayerX and GammaGL import from it."""
    import paddle
    import paddle.base.data_feeder
    import paddle.base.dygraph.base
    import paddle.base.layer_helper
    from paddle.nn import initializer as renamed
    from paddle.utils import layers_utils

    base = paddle.base
    paddle.fluid = _stand_in("paddle.fluid", core=base.core, framework=base.framework, unique_name=base.unique_name)
    for name in ("core", "framework", "unique_name", "data_feeder", "layer_helper"):
        sys.modules[f"paddle.fluid.{name}"] = getattr(base, name)
    _stand_in("paddle.fluid.layers", core=base.core)
    sys.modules["paddle.fluid.layers.utils"] = layers_utils
    _stand_in(
        "paddle.fluid.initializer",
        ConstantInitializer=_renamed(renamed.Constant, value="value"),
        UniformInitializer=_renamed(renamed.Uniform, low="low", high="high"),
        NormalInitializer=_renamed(renamed.Normal, loc="mean", scale="std"),
        TruncatedNormalInitializer=_renamed(renamed.TruncatedNormal, loc="mean", scale="std"),
        MSRAInitializer=renamed.KaimingNormal,
        XavierInitializer=renamed.XavierNormal,
    )
    # Of several processes nothing is needed.
    parallel = _stand_in("paddle.fluid.dygraph.parallel_helper", _is_data_parallel_mode=lambda: False)
    _stand_in(
        "paddle.fluid.dygraph",
        Layer=paddle.nn.Layer, LayerList=paddle.nn.LayerList, parallel_helper=parallel,
    )  # fmt: skip
    _stand_in(
        "paddle.fluid.dygraph.base",
        param_guard=base.dygraph.base.param_guard,
        program_desc_tracing_guard=contextlib.nullcontext,  # tracing is gone
    )


def _renamed(initializer: type, **names: str) -> type:
    """Return a class of initialisers by its old arguments: those in `names` are passed on, the others dropped."""

    class Renamed(initializer):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**{new: arguments[old] for old, new in names.items()})

    return Renamed
