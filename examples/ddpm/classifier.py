"""A small classifier of real images: it says what a generated one shows, and gives FID its features."""

from pathlib import Path

import torch
import torch.nn.functional as F
from data import Part, scaled
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

FEATURES = 64


class Features(nn.Sequential):
    """The classifier without its last layer."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, FEATURES),
            nn.ReLU(),
        )


class Classifier(nn.Module):
    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.features, self.last = Features(channels, size), nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.features(x), 0.3, self.training))


def trained_classifier(folder: Path, part: Part, classes: int, epochs: int, seed: int = 0) -> Classifier:
    """Loads the classifier of so many epochs from a folder, or trains it on real images and stores it there."""
    images, labels = part
    path = folder / f"classifier-{epochs}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(images.shape[1], images.shape[2], classes)
        if path.exists():
            load_model(model, path)
            return model.eval()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        steps = epochs * -(-len(images) // 100)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        with tqdm(total=steps, desc="train the classifier", leave=False, disable=None) as bar:
            for _ in range(epochs):
                for batch in torch.randperm(len(images)).split(100):
                    loss = F.cross_entropy(model(scaled(images[batch])), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    whole = path.with_suffix(".part")  # a kill in the middle leaves no half of a file under the name
    save_model(model, whole)
    whole.replace(path)
    return model.eval()


@torch.no_grad()
def predicted(model: Classifier, images: Tensor) -> Tensor:
    """Returns the class of each image."""
    return torch.cat([model(scaled(batch)).argmax(1) for batch in images.split(500)])
