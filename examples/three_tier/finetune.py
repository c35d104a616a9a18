"""Fine-tuning between the iterations, with the masks kept, on one device or with accelerate on many."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import sparsekit as sk
from sparsekit.tiers import Step, fade

WARM = 20  # updates until the learning rate is at its highest
FADING = 0.1  # the share of all updates until the weights that the schedule will drop have faded to zero


class FineTune:
    """A function that trains a causal LM for the epochs of a step.

    One schedule of the learning rate spans the updates of all steps: the rate is constant for the first half, then
    falls to zero in a straight line. So update n has the same rate and the same windows whether the weights are pruned
    in steps or at once. Weights that later steps will drop fade to zero in the first tenth of all updates, so that the
    other weights have the rest of the time to adapt. Every step begins with the optimizer's moments of the step before.

    Args:
        windows: ``[n, window]`` token ids to learn from.
        schedule: all steps, also those that are done.
        accelerator: places models and batches on the devices of all processes, in its precision.
        rate: the highest learning rate.
        batch: windows in an update, on all processes together.
        epoch: windows in an epoch; None takes all.
        moments: returns the path of the file with the optimizer's moments after an iteration.
        seed: determines the order of the windows.
    """

    def __init__(
        self,
        windows: Tensor,
        schedule: Sequence[Step],
        accelerator: Accelerator,
        *,
        rate: float,
        batch: int,
        epoch: int | None,
        moments: Callable[[int], Path],
        seed: int,
    ) -> None:
        self._windows, self._schedule, self._accelerator = windows, schedule, accelerator
        self._rate, self._batch, self._moments, self._seed = rate, batch, moments, seed
        self._updates_per_epoch = (epoch or len(windows)) / batch
        self._whole = self._updates(len(schedule))
        self._fading = round(FADING * self._whole)
        if batch % accelerator.num_processes:
            raise ValueError(f"--batch must be a multiple of {accelerator.num_processes} processes, got {batch}")

    def __call__(self, model: nn.Module, step: Step) -> None:
        first, last = self._updates(step.iteration - 1), self._updates(step.iteration)
        if first == last:
            return
        optimizer = torch.optim.AdamW(model.parameters(), self._rate, betas=(0.9, 0.95), weight_decay=0.0)
        # This gives every process the weights and masks of the first one, since rounding may have made them differ.
        wrapped, stepper = self._accelerator.prepare(model, optimizer)
        if self._moments(step.iteration - 1).exists():
            optimizer.load_state_dict(torch.load(self._moments(step.iteration - 1), "cpu", weights_only=True))
        wrapped.train()
        batches = tqdm(
            self._batches(first, last),
            f"fine-tune {step.iteration}",
            last - first,
            leave=False,
            disable=None if self._accelerator.is_main_process else True,  # None disables it if there is no terminal
        )
        with sk.keep_masks(model, optimizer), fade(model, optimizer, max(0, self._fading - first)):
            for update, batch in enumerate(batches, first):
                for group in optimizer.param_groups:
                    group["lr"] = self._rate * self.rate_share(update)
                self._accelerator.backward(wrapped(input_ids=batch, labels=batch).loss)
                self._accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                stepper.step()
                stepper.zero_grad()
        self._accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        self._accelerator.free_memory()
        if self._accelerator.is_main_process:
            self._moments(step.iteration).parent.mkdir(parents=True, exist_ok=True)
            torch.save(optimizer.state_dict(), self._moments(step.iteration))
        self._accelerator.wait_for_everyone()
        model.eval()

    def rate_share(self, update: int) -> float:
        """Returns the learning rate at an update as a share of the highest one."""
        return min(1.0, (update + 1) / WARM, 2 * (1 - update / self._whole))

    def _updates(self, iteration: int) -> int:
        """Returns the number of updates until an iteration is done."""
        epochs = sum(step.epochs for step in self._schedule if step.iteration <= iteration)
        return round(epochs * self._updates_per_epoch)

    def _batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Yields this process's part of every batch; the windows come in random order, a new one in each round."""
        rows = islice(self._rows(), first * self._batch, last * self._batch)
        mine = slice(self._accelerator.process_index, None, self._accelerator.num_processes)
        while batch := list(islice(rows, self._batch)):
            yield self._windows[batch[mine]].to(self._accelerator.device)

    def _rows(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from torch.randperm(len(self._windows), generator=generator).tolist()
