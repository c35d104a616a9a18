"""Checks that a plan fits a model, before anything is changed."""

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .._layers import input_dim, shared_weight_reasons
from .._optimizers import is_sharded, sharding
from .plan import Branch, SlimPlan, Stages
from .resize import Side, size


def check_fits(model: nn.Module, plan: SlimPlan, *, whole: bool = False) -> None:
    """Checks that a plan names layers of the model that can be changed, with the sizes that they have.

    Args:
        model: the model.
        plan: the plan.
        whole: whether to check branches of which all units stay, too.

    Raises:
        ValueError: names what does not fit.
    """
    check_whole(model)
    shared = shared_weight_reasons(model, fast_paths=False)
    for branch in plan.units if whole else dict(plan.dropping_units()):
        _check_branch(model, branch, {module: reason for (module, _), reason in shared.items()})
    for stages in plan.stages:
        _check_stages(model, stages)


def check_whole(model: nn.Module) -> None:
    """Checks that a model is neither sharded nor wrapped.

    Raises:
        ValueError: it is.
    """
    if kind := sharding(model):
        raise ValueError(f"the model is sharded by {kind}: slim it where its weights are whole")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("slim model.module, before it is wrapped by DistributedDataParallel")


def fixed_reason(layer: nn.Module) -> str | None:
    """Returns why the size of a layer cannot be changed; None if it can."""
    if input_dim(layer) not in (0, 1) or isinstance(layer, nn.Conv2d):
        return f"it is a {type(layer).__name__}, not a Linear or a Conv1D of transformers"
    weight = layer._parameters.get("weight")
    if weight is None or is_parametrized(layer):
        return "its weight is not a parameter but computed"
    if is_lazy(weight) or is_sharded(weight) or type(weight) is not nn.Parameter or weight.dim() != 2:
        return f"its weight is a {type(weight).__name__}, not a plain matrix"
    return None


def _check_branch(model: nn.Module, branch: Branch, shared: dict[nn.Module, str]) -> None:
    layers: list[tuple[str, Side, int]] = [(branch.reader, "inputs", branch.units * branch.width)]
    layers += [(name, "outputs", branch.units * segments) for name, segments in branch.writers]
    for name, side, multiple in layers:
        layer = _submodule(model, name)
        if reason := fixed_reason(layer) or shared.get(layer):
            raise ValueError(f"layer {name!r} cannot be made smaller: {reason}")
        own = size(layer, side)
        if own % multiple or (side == "inputs" and own != multiple):
            raise ValueError(
                f"the plan has {branch.units} units of {branch.reader!r}, and layer {name!r} has {own} {side}: "
                "the plan is of another model, or has been applied already"
            )
    for full_name in branch.attributes:
        owner, _, name = full_name.rpartition(".")
        value = vars(_submodule(model, owner)).get(name)
        if type(value) is not int or value % branch.units:
            raise ValueError(f"{full_name!r} must be a multiple of {branch.units} units, got {value!r}")


def _check_stages(model: nn.Module, stages: Stages) -> None:
    holder = _submodule(model, stages.name)
    if not isinstance(holder, nn.ModuleList) or len(holder) != stages.count:
        raise ValueError(f"{stages.name!r} must be a ModuleList of {stages.count} modules, got {type(holder).__name__}")


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no module {name!r}, which the plan names") from None
