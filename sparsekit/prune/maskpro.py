"""``MaskPro``: learns n:m masks from the losses of masked models, without back-propagation."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import check_functions
from .._layers import Where, check_model
from .._undo import Undo, change, claiming
from ..ops import nm_policy_step_, nm_sample
from .advantage import Advantage, lr_for, multiplier_for
from .apply_mask import apply_mask
from .calibration.ranks import Group, Ranks
from .first_masks import Init, first_masks
from .flips import measured_flips
from .mask_arena import MaskArena
from .masked_losses import LossFn, MaskedLosses, split_batches
from .maskpro_arguments import check_arguments, check_state, learnable_pattern
from .maskpro_report import MaskProReport, MaskProStep

CHECKED = 16  # batches, of all processes, on which the likeliest mask is compared with the best one
CHECK_EVERY = 10  # passes over as many batches: a check costs about a tenth of the time
PUBLISHED_LR, PUBLISHED_MULTIPLIER = 50.0, 10.0
ROUNDING = 1e-8  # absolute difference that is not noise either
DRAWS = 4  # of which each costs 1.25 forwards, as the likeliest mask is run too
REPEATS = 1e-2  # relative difference of two losses of one mask on one batch that tells noise from rounding


class MaskPro:
    """A learner of n:m masks that runs the model forward only: weights are frozen, and no gradient is needed.

    Every weight has a logit. Each step draws a mask at random from the logits, and makes it more likely if its loss is
    lower than usual on its batch, less likely if it is higher (MaskPro, https://arxiv.org/abs/2506.12876). What is
    usual is measured against the likeliest mask, which is run on each batch before the draws; the published rule
    measures against the initial mask, whose losses tell ever less as learning moves away from it::

        learner = sk.MaskPro(model, loss_fn, "2:4", batches=train, held_out=valid)
        for step in learner.steps(10_000):
            print(step)
        report = learner.finish()

    Until ``finish`` the model is unchanged: a masked weight exists while its layer is called, and no longer. It is run
    in evaluation mode. ``finish`` writes the best mask that was found, or the initial one where that has no larger
    loss on the batches that were held out, and stores masks as ``prune_`` does.

    All masks meet the same noise: the random state of torch is seeded by the number of the batch. So ``loss_fn`` draws
    from that state, not from a generator of its own, and the loss of the initial mask is computed once for each
    batch: make all steps under the same autocast mode.

    In a run, the learner is a part: ``run.restore(learner=learner)``. It goes on exactly, with the same arguments.
    Under ``torch.distributed`` (``torchrun --nproc-per-node 2 script.py``), each process gets its own batches and draws
    the same masks. They exchange losses while they learn, and learn what one process learns that has the
    batches of all in turn and as many ``microbatches`` as there are processes.

    Memory: the model, one logit for each weight, the mask that was drawn and the next one as bits, and the masked
    weight of one layer. LLaMA-2-7B in bfloat16 takes 13.5 GB, its logits 13.0 GB, each mask 0.8 GB. The initial and the
    best mask are on the CPU.

    Args:
        model: any tree of modules; the layers that ``prune_`` would prune are learned.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a number or a tensor of one.
        pattern: ``"n:m"``.
        batches: what is learned from: a list or another object with indices and a length, whose items may be loaded
            when they are asked for, or an iterable such as a DataLoader, which is read once and kept.
        held_out: other batches, on which the result is compared with the initial mask. None holds out the last tenth of
            ``batches``, at least one, and loads them all.
        init: the initial masks: a ``Method``, a pruned copy of the model, or bool masks by the names of layers. None
            takes those that the model has stored, if any, else ``Swaps(Wanda(pattern))``. A method gets up to 16 of
            ``batches``.
        where: ``where(name, module)`` selects layers; None selects all.
        axis: what the groups of a Conv2d run along, as in ``prune_``.
        lr: how far a step moves the logits at an advantage of 1. None follows from the multiplier: draws move a logit
            by the multiplier in about 200 steps, by a quarter of it at most in one at an advantage of 1.
        multiplier: the logit that kept entries begin with; the larger, the fewer groups are drawn differently.
        flips: how many groups a draw of the first mask should change, from which ``multiplier`` follows; below what
            equal logits give, for 2:4 5/6 of the groups. None chooses it in the first step by the losses of 16 draws,
            so that one draw in six is better than the initial mask, the square root of the number of groups at most.
        draws: how many steps in a row draw a mask for the same batches; None is 4, or 1 with ``parity``.
        microbatches: batches of this process for one step.
        seed: chooses masks and noise.
        dtype: of the logits; None is bfloat16, rounded at random, for 16-bit weights, else float32.
        parity: whether to follow the published code: lr 50 and multiplier 10 unless they, or flips, are given;
            residuals against the initial mask, less their running mean but not divided by their deviation; one draw for
            each batch, and the initial mask in the first step. It depends on the scale of the loss.
        group: the processes that learn together, as in ``Calibration``.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, no layer can be learned, there are too few batches to hold one out, or
            the processes have different models or arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        pattern: str = "2:4",
        *,
        batches: Any,
        held_out: Any = None,
        init: Init = None,
        where: Where | None = None,
        axis: Literal["input", "flatten"] = "input",
        lr: float | None = None,
        multiplier: float | None = None,
        flips: float | None = None,
        draws: int | None = None,
        microbatches: int = 1,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        parity: bool = False,
        group: Group = "world",
    ) -> None:
        check_model(model)
        check_functions(loss_fn=loss_fn)
        if loss_fn is None:
            raise TypeError("MaskPro needs a loss_fn, got None")
        parsed, draws = learnable_pattern(pattern), draws if draws is not None else 1 if parity else DRAWS
        check_arguments(axis, lr, multiplier, flips, draws, microbatches, seed, dtype, parity)
        self._model, self._pattern, self._seed = model, parsed, seed
        self._ranks = ranks = Ranks(group, None)
        learned, held = ranks.all_or_none(lambda: split_batches(batches, held_out))
        with torch.inference_mode(False), torch.no_grad():
            found = first_masks(model, init, parsed, axis, where, learned, loss_fn, group, ranks, seed)
            layers, masks, self._skipped = found
            weight = layers[0].weight
            dtype = dtype or (torch.float32 if weight.dtype == torch.float32 else torch.bfloat16)
            self._arena = arena = MaskArena(layers, parsed, dtype, weight.device)
            self._initial = self._best = ranks.all_or_none(lambda: arena.pack(masks))
            self._parity, self._draws, self._microbatches = parity, draws, microbatches
            self._given = {"lr": lr, "multiplier": multiplier, "flips": flips}
            self._advantage = Advantage(normalize=not parity)
            self._total = sum(ranks.exchange(len(learned)))
            digest = hashlib.sha256(self._initial.numpy().data).hexdigest()
            ranks.agree({**self._call(), "axis": axis, "initial masks": digest}, layers)
            self._step, self._finished, self._best_residual, self._baseline = 0, False, 0.0, 0.0
            self._begin(flips)
        self._baselines: dict[int, float] = {}
        self._losses = MaskedLosses(model, loss_fn, arena, learned, "learn", seed, microbatches, ranks)
        self._held_out = MaskedLosses(model, loss_fn, arena, held, "held out", seed, 1, ranks)
        self._checked = range(min(len(learned), max(CHECKED // ranks.size, 1)))
        checked = sum(ranks.exchange(len(self._checked)))
        self._check_every = CHECK_EVERY * max(checked // (microbatches * ranks.size), 1)

    def steps(self, count: int) -> Iterator[MaskProStep]:
        """Learns until ``count`` steps are done in all, those before a restore included; yields each step.

        Raises:
            ValueError: a loss is NaN or infinite, or ``loss_fn`` gives another loss each time.
            RuntimeError: ``finish`` was called, or another process has failed.
        """
        while self._step < count:
            yield self._ranks.all_or_none(self._learn)

    def learn(self, count: int) -> None:
        """Learns until ``count`` steps are done in all."""
        for _ in self.steps(count):
            pass

    def finish(self) -> MaskProReport:
        """Writes the best mask into the model, weights and stored masks, and returns what came of it.

        The best mask is that of the likeliest masks seen now and then with the lowest loss on batches learned from.
        If its loss on the batches that were held out is not lower than that of the initial mask, the initial mask is
        written. If anything fails, the model is as it was.

        Raises:
            RuntimeError: it was called before.
        """
        return change(self._model, "pruned", self._ranks.together(self._finish))

    def state_dict(self) -> dict[str, Any]:
        """Returns what learning goes on from; its tensors are those of the learner, not copies."""
        advantage = (self._advantage.steps, self._advantage.mean, self._advantage.variance)
        return {
            **self._call(),
            "step": self._step,
            "advantage": advantage,
            "baseline": self._baseline,
            "multiplier": self._multiplier,
            "lr": self._lr,
            "logits": self._arena.logits,
            "initial": self._initial,
            "best": self._best,
            "best_residual": self._best_residual,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the learner to a state of one that was made with the same arguments.

        Raises:
            ValueError: it is of other layers, arguments or batches, or incomplete; then nothing is changed.
        """
        check_state(state, own := self.state_dict(), self._call())
        loaded = {key: state[key] for key in own}
        tracker, normalize = self._advantage.tracker, self._advantage.normalize
        advantage = Advantage(tracker, normalize, *loaded["advantage"])
        with torch.inference_mode(False), torch.no_grad():
            initial, best = loaded["initial"].to("cpu", copy=True), loaded["best"].to("cpu", copy=True)
            self._arena.logits.copy_(loaded["logits"])
        self._advantage, self._initial, self._best = advantage, initial, best
        self._step, self._baseline, self._baselines = loaded["step"], loaded["baseline"], {}
        self._best_residual, self._multiplier, self._lr = (loaded[key] for key in ("best_residual", "multiplier", "lr"))
        self._bits = self._draw()

    def _call(self) -> dict[str, Any]:
        """Returns what two learners must have in common."""
        layers = [f"{slot.layer.name} {slot.full}" for slot in self._arena.slots]
        values = {"pattern": str(self._pattern), "given": self._given, "seed": self._seed, "parity": self._parity}
        values |= {"draws": self._draws, "batches of a step": self._microbatches * self._ranks.size}
        values["batches"] = self._total
        return {**values, "dtype": str(self._arena.logits.dtype), "layers": layers}

    def _begin(self, flips: float | None) -> None:
        """Sets the logits with which draws change so many groups of the initial mask, and draws the first mask."""
        arena = self._arena
        published = (PUBLISHED_MULTIPLIER if flips is None else None, PUBLISHED_LR) if self._parity else (None, None)
        multiplier = self._given["multiplier"] or published[0]
        self._multiplier = multiplier or multiplier_for(flips, arena.groups, arena.n, arena.m)
        self._lr = self._given["lr"] or published[1] or lr_for(self._multiplier, arena.n, arena.m)
        arena.set_logits(self._initial, self._multiplier)
        self._bits = self._draw()

    def _residual(self, bits: Tensor, indices: Sequence[int]) -> float:
        """Returns how much worse than the initial mask another one is on some of the batches."""
        initial = self._losses.mean(self._of_initial(indices))
        return self._losses.mean(self._losses.of(bits, indices)) - initial

    def _draw(self) -> Tensor:
        """Returns the mask of the next step; in the published code that of the first one is the initial mask."""
        logits, n, m = self._arena.logits, self._arena.n, self._arena.m
        if self._step == 0 and self._parity:
            return self._initial.to(logits.device)
        return nm_sample(logits, n, m, seed=self._seed, offset=self._step)

    def _learn(self) -> MaskProStep:
        if self._finished:
            raise RuntimeError("finish() has written the mask into the model: make a new MaskPro of the dense model")
        arena, losses = self._arena, self._losses
        turn = self._step // self._draws
        indices = losses.indices(turn)
        with claiming(self._model, "pruned"), losses.running():
            if self._step == 0 and not self._parity and self._given["flips"] is self._given["multiplier"] is None:
                self._begin(None)
                self._begin(measured_flips(arena, self._multiplier, self._seed, self._residual, losses.indices))
            if self._step and self._step % self._check_every == 0:
                self._check()
            initial = losses.mean(self._of_initial(indices))
            if self._step % self._draws == 0:
                self._baseline = initial if self._parity else self._of_likeliest(indices, initial)
            loss = losses.mean(losses.of(self._bits, indices))
            advantage, tracked = self._advantage.after(loss - self._baseline)
            step, bits, (n, m) = self._step, self._bits, (arena.n, arena.m)
            self._bits, self._advantage, self._step = (
                nm_policy_step_(arena.logits, bits, advantage, self._lr, n, m, seed=self._seed, offset=step),
                tracked,
                step + 1,
            )
        return MaskProStep(self._step, turn, loss, initial, self._baseline, advantage)

    def _of_likeliest(self, indices: list[int], initial: float) -> float:
        likeliest = self._arena.likeliest()
        if torch.equal(likeliest, self._initial):
            return initial
        return self._losses.mean(self._losses.of(likeliest, indices))

    def _of_initial(self, indices: Sequence[int]) -> list[float]:
        """Returns the losses of the initial mask, which are computed once."""
        if missing := [index for index in dict.fromkeys(indices) if index not in self._baselines]:
            found = self._losses.of(self._initial, missing)
            if not self._baselines:
                (again,) = self._losses.of(self._initial, missing[:1])
                if not math.isclose(again, found[0], rel_tol=REPEATS, abs_tol=ROUNDING):
                    raise ValueError(
                        f"loss_fn gave {found[0]:.6g} and {again:.6g} for the same mask and batch: it must draw all "
                        "noise from torch's global random state, which MaskPro seeds, or from the batch"
                    )
            self._baselines.update(zip(missing, found, strict=True))
        return [self._baselines[index] for index in indices]

    def _check(self) -> None:
        """Keeps the likeliest mask if its loss, on some of the batches, is the lowest so far."""
        likeliest = self._arena.likeliest()
        residual = self._residual(likeliest, self._checked)
        if residual < self._best_residual:
            self._best, self._best_residual = likeliest, residual

    def _finish(self, undo: Undo) -> MaskProReport:
        if self._finished:
            raise RuntimeError("finish() was called before: make a new MaskPro of the dense model")
        held, arena = self._held_out, self._arena
        every = range(len(held))
        with held.running():
            self._check()
            initial, loss = held.mean(held.of(self._initial, every)), held.mean(held.of(self._best, every))
            count = sum(self._ranks.exchange(len(held)))
            kept = loss < initial
            undo.callback(setattr, self, "_finished", False)
            for layer, mask in arena.masks(self._best if kept else self._initial):
                apply_mask(layer, layer.weight.detach().masked_fill(~mask, 0), mask, self._pattern, undo)
            self._finished = True
        names = tuple(slot.layer.name for slot in arena.slots)
        flips = arena.flips(self._best, self._initial)
        return MaskProReport(
            self._step, initial, loss, kept, flips, arena.groups, names, self._skipped, self._multiplier, count
        )
