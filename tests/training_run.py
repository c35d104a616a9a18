"""A tiny training run in a process of its own, for the tests that kill it: ``python training_run.py FOLDER STEPS``."""

import random
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsekit.runs import Run


def main(folder, epochs, pause):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 35])
    data = TensorDataset(torch.randn(40, 8), torch.randn(40, 1))
    with Run.open(folder, {"epochs": epochs}, steps=10 * epochs) as run:
        run.restore(model=model, ema=average, optimizer=optimizer, schedule=schedule)
        for x, y in run.batches(40, 4, epochs=epochs, load=lambda order: DataLoader(data, batch_sampler=order)):
            loss = (model(x + 0.1 * random.random() * np.random.rand()) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            run.record(loss=loss.item())
            time.sleep(pause)
            if run.step % 3 == 0:
                run.save()
        run.save()
        run.finish({"loss": loss.item() if run.result is None else run.result["loss"]})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
