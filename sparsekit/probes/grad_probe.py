"""The gradients of intermediate activations, by hooks on the tensors that go into modules and come out of them."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._layers import Where, check_model, selects
from .._trees import tensors_in
from .values import REDUCTIONS, Reduce, real_values, sample_norms, to_cpu

What = Literal["output", "input"]
UNCOMPILED = (
    "probe the model before torch.compile, or train it uncompiled meanwhile, within "
    'torch.compiler.set_stance("force_eager")'
)
COMPILED = f"compiled code calls no hooks: {UNCOMPILED}"


class GradProbe:
    """A probe that records the gradients of what goes into modules and comes out of them, while a model trains.

    ::

        with sk.GradProbe(model, "blocks.*", every=10, run=run) as probe:
            train(model, optimizer)
        sk.probes.draw_gradients(probe.records, "gradients.png")

    A record is a dict with the ``step`` first, then a value for each module that was called, under ``grad_output/NAME``
    or ``grad_input/NAME``. It is closed when an optimizer of the model's parameters steps, and holds what all backward
    passes since the step before gave: several calls of a module, several outputs and accumulated passes count as one
    long vector. All is removed from the model at the end of the block, also after an error.

    The gradient is that of the tensor as the module got or gave it, over all its uses, as ``torch.autograd.grad`` has
    it; it is right where the tensor is changed in place later. Under checkpointing each gradient counts once. In
    several processes each records its own: a loss that is a mean over the samples of a process has activation gradients
    that no one averages.

    Args:
        model: any module, also in DistributedDataParallel or ``fully_shard``.
        modules: which modules: a pattern of their names, where ``*`` also matches dots, or a function of
            ``(name, module)``.
        what: ``"output"``, ``"input"``, or both in a set.
        reduce: ``"norm"``, the Euclidean one; ``"mean_abs"``, the mean magnitude; ``"hist"``, how many magnitudes lie
            in ``[2**e, 2**(e + 1))`` for e from -40 to 10, with all smaller and all larger ones in the first and last
            bin; ``"full"``, a list of the gradients themselves on the CPU, of which only the last record is kept.
        every: one in so many steps is recorded; the others cost a call of a Python function for each module.
        scaler: the GradScaler that scales the loss: gradients are divided by its scale, and the passes of a step that
            it skipped are left out.
        run: gets each record, by ``run.record(**values)``; ``run.step`` then is the step. None counts steps from 1.
        timesteps: the number of timesteps of a diffusion model, or the end of its continuous time. Then ``at`` is
            called before each forward pass, and with ``"norm"`` the record also has ``grad_output_by_timestep/NAME``:
            the mean norm of the samples in each of ``bins`` equal parts of ``[0, timesteps)``, None where there was no
            sample. A module whose tensor does not have the samples along its first dimension has no such entry.
        bins: the number of those parts.

    Raises:
        TypeError: ``model`` is not a module, or ``modules`` neither a string nor a function.
        ValueError: another argument is out of range, or ``modules`` selects nothing.
        RuntimeError: on entry, the model is compiled or the probe is in use; at the first step, no probed module was
            called, or by compiled code alone.
    """

    records: list[dict[str, Any]]

    def __init__(
        self,
        model: nn.Module,
        modules: str | Where = "*",
        *,
        what: What | Iterable[What] = "output",
        reduce: Reduce = "norm",
        every: int = 1,
        scaler: Any = None,
        run: Any = None,
        timesteps: float | None = None,
        bins: int = 10,
    ) -> None:
        check_model(model)
        self._what = {what} if isinstance(what, str) else set(what)
        if not self._what or self._what - {"output", "input"}:
            raise ValueError(f'what must be "output", "input" or both in a set, got {what!r}')
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        if every < 1 or bins < 1 or not (timesteps is None or timesteps > 0):
            raise ValueError(f"every, bins and timesteps must be positive, got {every}, {bins} and {timesteps}")
        if timesteps is not None and reduce != "norm":
            raise ValueError(f'timesteps are for reduce="norm", got {reduce!r}')
        if run is not None and reduce == "full":
            raise ValueError('a run records numbers, not the tensors of reduce="full"')
        self._model, self._modules = model, _selected(model, modules)
        self._reduce, self._every, self._scaler, self._run = reduce, every, scaler, run
        self._timesteps, self._bins = timesteps, bins
        self.records = []
        self._handles: list[Any] = []  # those that stay until the end
        self._of_step: list[Any] = []  # those on the tensors of the current step
        self._taken: list[_Taken] = []
        self._bin_of: Tensor | None = None
        self._steps, self._called, self._ever = 1, False, False

    def __enter__(self) -> "GradProbe":
        if self._handles:
            raise RuntimeError("this probe is in use already: make another GradProbe")
        for name, module in self._model.named_modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise RuntimeError(f"{name or 'the model'} is compiled, and {COMPILED}")
        try:
            self._attach()
            return self
        except BaseException:
            self._detach()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                if kind is None and self._taken:
                    self.step()
            finally:
                self._detach()
        finally:
            self._detach()  # an interrupt may have come before the first call was done

    def at(self, timesteps: Tensor) -> None:
        """Says which timesteps the samples of the next forward pass have.

        Args:
            timesteps: ``[samples]``, numbers from 0 up to the ``timesteps`` that the probe was made with.

        Raises:
            ValueError: the probe was made without ``timesteps``, or they have another shape.
        """
        if self._timesteps is None or timesteps.dim() != 1:
            raise ValueError(
                "at takes the timesteps of the samples, [samples], in a probe that was made with timesteps=..., "
                f"got the shape {tuple(timesteps.shape)} in one with timesteps={self._timesteps}"
            )
        share = timesteps.detach().float() / self._timesteps
        self._bin_of = (share * self._bins).floor().clamp(0, self._bins - 1)

    def step(self) -> None:
        """Closes the record of this step; it is called by itself where a torch optimizer steps."""
        if self._taken and (values := self._joined()):
            record = {"step": self._now, **values}
            if self._reduce == "full":
                self.records.clear()
            self.records.append(record)
            if self._run is not None:
                self._run.record(**{key: value for key, value in record.items() if key != "step"})
        self._forget()
        self._steps += 1

    @property
    def _now(self) -> int:
        return self._steps if self._run is None else self._run.step

    def _attach(self) -> None:
        own = {id(parameter) for parameter in self._model.parameters()}

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if any(id(each) in own for group in optimizer.param_groups for each in group["params"]):
                if not self._ever:
                    raise RuntimeError(
                        "no probed module was called before this step, unless by compiled code, which calls no hooks: "
                        + UNCOMPILED
                    )
                skipped = getattr(optimizer, "found_inf", False)  # a scaler lets a fused optimizer skip the step itself
                if self._called and not skipped:  # if not called, a second optimizer has closed this step
                    self.step()

        self._handles.append(register_optimizer_step_post_hook(stepped))
        for name, module in self._modules:
            if "input" in self._what:
                hook = partial(self._saw, f"grad_input/{name}".rstrip("/"))
                self._handles.append(module.register_forward_pre_hook(_before(hook), with_kwargs=True))
            if "output" in self._what:
                hook = partial(self._saw, f"grad_output/{name}".rstrip("/"))
                self._handles.append(module.register_forward_hook(_after(hook)))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._forget()
        self._handles = []

    def _forget(self) -> None:
        for handle in self._of_step:
            handle.remove()
        self._of_step, self._taken, self._bin_of, self._called = [], [], None, False

    def _saw(self, key: str, value: Any) -> None:
        """Puts a hook on each tensor in what a module got or gave, if this step is recorded."""
        if torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        self._ever = True
        if not torch.is_grad_enabled():
            return
        self._called = True
        if self._now % self._every == 0:
            for tensor in {id(each): each for each in tensors_in(value) if each.requires_grad}.values():
                self._of_step.append(tensor.register_hook(partial(self._take, key, self._bin_of)))

    @torch.no_grad()
    def _take(self, key: str, bin_of: Tensor | None, gradient: Tensor) -> None:
        values, scale = real_values(gradient), None
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones(1, dtype=torch.float32, device=values.device))
            values = values.float() / scale
        if bin_of is not None and values.shape[:1] == bin_of.shape:
            self._taken.append(_Taken(key, sample_norms(values), bin_of, scale))
        else:
            self._taken.append(_Taken(key, REDUCTIONS[self._reduce].take(values), None, scale))

    def _joined(self) -> dict[str, Any]:
        """Returns the values of this step's record."""
        taken = self._taken
        if self._scaler is not None:
            # Since the last step, the scale only fell, after passes with infinite gradients, whose step was skipped.
            scales, now = to_cpu([each.scale for each in taken if each.scale is not None]), self._scaler.get_scale()
            taken = [each for each, scale in zip(taken, scales, strict=True) if scale.item() <= now]
        parts: dict[str, list[Tensor]] = {}
        binned: dict[str, list[tuple[Tensor, Tensor]]] = {}
        bins = iter(to_cpu([each.bin_of for each in taken if each.bin_of is not None]))
        for each, part in zip(taken, to_cpu([each.part for each in taken]), strict=True):
            parts.setdefault(each.key, []).append(part)
            if each.bin_of is not None:
                binned.setdefault(each.key, []).append((part, next(bins)))
        values = {key: REDUCTIONS[self._reduce].join(found) for key, found in parts.items()}
        for key, found in binned.items():
            norms, bin_of = (torch.cat(each) for each in zip(*found, strict=True))
            what, _, name = key.partition("/")
            values[f"{what}_by_timestep/{name}".rstrip("/")] = [
                norms[bin_of == index].mean().item() if (bin_of == index).any() else None for index in range(self._bins)
            ]
        return values


class _Taken(NamedTuple):
    """What one hook on one tensor took of its gradient."""

    key: str
    part: Tensor
    bin_of: Tensor | None  # the bin of each sample, whose norms are the part; None if there are no bins
    scale: Tensor | None


def _before(saw: Callable[[Any], None]) -> Callable[..., None]:
    return lambda module, args, kwargs: saw((args, kwargs))


def _after(saw: Callable[[Any], None]) -> Callable[..., None]:
    return lambda module, args, output: saw(output)


def _selected(model: nn.Module, modules: str | Where) -> list[tuple[str, nn.Module]]:
    if not (isinstance(modules, str) or callable(modules)):
        raise TypeError(f"modules must be a pattern of names or a function of (name, module), got {modules!r}")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (fnmatchcase(name, modules) if isinstance(modules, str) else selects(modules, name, module))
    ]
    if not found:
        raise ValueError(f"modules selects nothing in the model: {modules!r}")
    return found
