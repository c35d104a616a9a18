"""The example that distills a classifier moves every batch to the device of the model, such as a GPU."""

import pytest
import torch
from distilbert_example import example_modules, write_reviews

for package in ("accelerate", "matplotlib", "torchmetrics", "tqdm", "transformers", "tyro"):
    pytest.importorskip(package)


def test_all_batches_are_on_the_device_of_the_model(tmp_path, monkeypatch):
    write_reviews(tmp_path)
    monkeypatch.setenv("SPARSEKIT_DATA", str(tmp_path))
    with example_modules() as modules:
        check_devices(modules, modules.data.read_tsv(tmp_path / "sst2" / "dev.tsv"), tmp_path, monkeypatch)


def check_devices(modules, texts, out, monkeypatch):
    trainer, found = modules.trainer, []
    pieces = modules.data.Pieces(texts, modules.models.small_tokenizer(texts.texts), 16)
    data, model = trainer.Data(pieces, pieces), torch.nn.Linear(2, 2, device="meta")

    def seen(*batches):
        found.extend(each.device.type for batch in batches for each in batch.values())
        return torch.zeros(len(texts), 2)

    monkeypatch.setattr(trainer, "predict_logits", lambda model, batches: seen(*batches))
    monkeypatch.setattr(trainer, "find_units", lambda model, batch: [seen(batch), None][1])
    monkeypatch.setattr(trainer.sk, "prune_", lambda model, rule, batches, where: seen(*batches))
    trainer.accuracy(model, data)
    assert len(found) == 2 * len(data.checked)
    trainer.mask_24(model, data)
    count = len(found)
    with pytest.raises(AttributeError):  # there are no units to mask
        trainer.UnitPruner(model, data, modules.config.Settings(out=out), 4)
    assert len(found) == count + 2 and {*found} == {"meta"}
