"""The example that distills, prunes, slims and quantizes a classifier: its data, stages, errors and report."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from distilbert_example import example_modules, write_reviews

import sparsekit as sk
from sparsekit.evaluate import measure_latency
from sparsekit.evaluate.cost import ProcessCost

for package in ("accelerate", "matplotlib", "torchmetrics", "tqdm", "transformers", "tyro"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def modules():
    with example_modules() as found:
        yield found


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    write_reviews(tmp_path / "data")
    monkeypatch.setenv("SPARSEKIT_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "sst2"


def test_labels_may_stand_before_or_behind(modules, tmp_path):
    path = tmp_path / "x.tsv"
    for text in ("label\tsentence\r\n1\ta fine film\r\n", "sentence\tlabel\na fine film\t1\n"):
        path.write_bytes(text.encode())
        found = modules.data.read_tsv(path)
        assert (found.texts, found.labels) == (["a fine film"], [1])


@pytest.mark.parametrize("line", ["2\ta film", "a film", "1\ta\tfilm"])
def test_a_line_that_is_no_sentence_is_named(modules, tmp_path, line):
    (tmp_path / "x.tsv").write_text(f"label\tsentence\n1\ta film\n{line}\n")
    with pytest.raises(ValueError, match="line 3: expected a label 0 or 1"):
        modules.data.read_tsv(tmp_path / "x.tsv")


def test_without_test_sentences_some_of_training_are_checked_on(modules, reviews):
    (reviews / "test.tsv").unlink()
    parts = modules.data.from_folder(reviews)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (576, 64, 96)
    assert parts.test.texts == modules.data.read_tsv(reviews / "dev.tsv").texts


def test_batches_have_all_sentences_of_about_one_length(modules, reviews):
    sentences = modules.data.read_tsv(reviews / "train.tsv")
    pieces = modules.data.Pieces(sentences, modules.models.small_tokenizer(sentences.texts), 16)
    for seed in (None, 1):
        groups = pieces.groups(50, seed)
        order = [index for group in groups for index in group]
        assert sorted(order) == list(range(640)) and {len(group) for group in groups} == {50, 40}
        lengths = [len(pieces.tokens[index]) for index in order]
        assert lengths == sorted(lengths)
    assert pieces.groups(50, 1) == pieces.groups(50, 1) != pieces.groups(50, 2)
    batch = pieces.batch([0, 1])
    for row, index in enumerate((0, 1)):
        assert batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist() == pieces.tokens[index].tolist()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher": "x"}, "--student is missing"),
        ({"preset": "published"}, "--preset published needs --teacher and --student"),
        ({"sparsity": 1.0}, "--sparsity must be between 0 and 1, got 1.0"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(modules, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        modules.config.Settings(out=tmp_path, **options)


def test_the_published_recipe(modules, tmp_path):
    settings = modules.config.Settings(out=tmp_path, teacher="t", student="s")
    assert settings.preset == "published"
    found = (settings.batch_size, settings.lr, settings.recover_lr, settings.prune_every, settings.sparsity)
    assert found == (32, 5e-5, 1e-5, 20, 0.2)
    assert settings.distill_epochs + settings.prune_epochs + settings.recover_epochs == 15
    assert (settings.temperature, settings.alpha, settings.patience) == ((10.0, 2.0), (0.9, 0.2), 5)
    pipeline = modules.pipeline.Pipeline(settings)
    assert [pipeline.span(stage) for stage in ("distill", "prune", "recover")] == [(0, 2 / 15), (2 / 15, 0.6), (0.6, 1)]


def test_what_is_missing_is_said_in_one_sentence(modules, tmp_path, monkeypatch):
    settings = modules.run.Run(out=tmp_path, stages=("quantize",))
    with pytest.raises(ValueError, match="the stage quantize needs student, which is not there"):
        modules.run.main(settings)
    with pytest.raises(ValueError, match="there is no model teacher in"):
        modules.compare.report(settings)
    with pytest.raises(ValueError, match=r"there is no train.tsv in"):
        modules.data.from_folder(tmp_path)
    with pytest.raises(ValueError, match="is not the folder of a model"):
        modules.evaluate.main(modules.evaluate.Evaluation(out=tmp_path, folder=tmp_path))
    monkeypatch.delenv("SPARSEKIT_DATA", raising=False)
    with pytest.raises(ValueError, match="there is no vocabulary of word pieces"):
        modules.models.small_tokenizer(["a film"])


def test_a_stage_is_done_again_where_its_inputs_or_outputs_changed(modules, tmp_path):
    source, target, calls = tmp_path / "source", tmp_path / "target", []
    source.write_text("1")

    def work():
        calls.append(source.read_text())
        target.write_text(source.read_text())
        return {"n": len(calls)}

    def run(**settings):
        stage = modules.stages.Stage("double", work, settings, [source], [target])
        return modules.stages.run_stage(stage, tmp_path, modules.run.Alone())["n"]

    assert [run(), run()] == [1, 1]
    source.write_text("2")
    assert [run(), run()] == [2, 2]
    target.write_text("altered")
    assert [run(), run()] == [3, 3]
    assert [run(rate=1), run(rate=1), run(rate=2)] == [4, 4, 5]
    assert calls == ["1", "2", "2", "2", "2"]


def test_a_damaged_model_and_one_of_other_classes_are_refused(modules, tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": 8, "dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8, "max_position_embeddings": 8}
    sk.save(DistilBertForSequenceClassification(DistilBertConfig(**sizes)), tmp_path / "two", format="transformers")
    three = DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=3))
    three.save_pretrained(tmp_path / "three")
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).distilbert.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="must be a model of two classes, it has 3"):
        modules.models.load_model(tmp_path / "three")
    with pytest.raises(ValueError, match="is no trained classifier"):
        modules.models.load_teacher(tmp_path / "body")
    for file in ("model.safetensors", "config.json"):
        path = tmp_path / "two" / file
        data = path.read_bytes()
        for offset in (0, 8, 20, 300, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :])
            with pytest.raises(ValueError, match="cannot load"):
                modules.models.load_model(tmp_path / "two")
        path.write_bytes(data)
    assert modules.models.load_teacher(tmp_path / "two").config.num_labels == 2


KINDS = ("head", "neuron")


def analytic_flops(config, plan, length):
    """Returns the operations of a DistilBERT at one row, by the units that stay in its layers."""
    kept = {kind: [len(kept) for branch, kept in plan.units.items() if branch.kind == kind] for kind in KINDS}
    heads, neurons = (kept[kind] for kind in KINDS)
    head = config.dim // config.n_heads
    linear = sum(4 * config.dim * head * count for count in heads) + sum(2 * config.dim * count for count in neurons)
    attention = sum(2 * length * head * count for count in heads)
    return 2 * (length * (linear + attention) + config.dim * config.dim + config.dim * config.num_labels)


@pytest.mark.slow
def test_the_whole_pipeline(modules, reviews, tmp_path, monkeypatch):
    cost = ProcessCost(1.0, 2, 1, 0)
    monkeypatch.setattr(modules.evaluate, "measure_process", lambda work: cost)  # no process for each model
    options = {"out": tmp_path, "short": True, "device": "cpu", "precision": "no", "teacher_lr": 1e-3, "lr": 1e-3}
    settings = modules.run.Run(**options, batch_size=16, distill_epochs=2, prune_epochs=2)
    out = settings.out
    result = modules.run.main(settings)
    report = json.loads((out / "final_report.json").read_text())
    rows = report["rows"]

    assert [*rows] == [*modules.pipeline.ROWS] and json.loads(json.dumps(result["report"]["rows"])) == rows
    student = rows["student"]["accuracy"]
    assert student > 0.9
    for name in ("pruned", "2-4"):
        assert rows[name]["accuracy"] >= student - 0.02
    assert [result["quantize"][name]["layers"] for name in modules.pipeline.QUANTIZED] == [12] * 4
    assert result["slim"]["pruned"]["largest_change_of_a_logit"] < 1e-5
    assert report["goals"]["encoder_weights_removed"] == pytest.approx(settings.sparsity, abs=0.04)

    whole, slim = (modules.models.load_model(out / name) for name in ("student", "pruned"))
    every = sk.slim.find_units(whole, modules.pipeline.passed(1, 8)).keep()
    assert rows["student"]["flops"]["executed"] == analytic_flops(whole.config, every, 128)
    assert rows["pruned"]["flops"]["executed"] == analytic_flops(whole.config, sk.slim.slim_plan(slim), 128)
    assert rows["2-4"]["flops"]["effective"] < 0.6 * rows["student"]["flops"]["executed"]
    nf4 = [(out / name / "model.safetensors").stat().st_size for name in ("student", "student-nf4", "2-4-nf4")]
    assert nf4 == sorted(nf4, reverse=True)

    with (out / "results" / "model_comparison.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == [*rows]
    for path in ("final_report.png", "results/model_comparison.png", "results/model_comparison.pdf"):
        assert (out / path).stat().st_size > 1000
    history = json.loads((out / "training_history.json").read_text())
    assert len(history) == 8 and all(records[-1]["step"] == len(records) for records in history.values())

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "result.json"}
    modules.run.main(settings)
    assert before == {path: path.stat().st_mtime_ns for path in before}

    check_fresh_process(modules, out)


def check_fresh_process(modules, out):
    """Checks that every folder gives the same logits where ``from_pretrained`` alone loads it."""
    ids = torch.tensor([[2, 6, 7, 8, 3]])
    code = """
import json, sys, torch, transformers, sparsekit
load, found = transformers.AutoModelForSequenceClassification.from_pretrained, {}
for folder in sys.argv[1:]:
    with torch.no_grad():
        found[folder] = load(folder)(torch.tensor([[2, 6, 7, 8, 3]])).logits.tolist()
print(json.dumps(found))
"""
    folders = [str(out / name) for name in modules.pipeline.ROWS]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for folder in folders:
        with torch.no_grad():
            logits = modules.models.load_model(folder)(ids).logits
        torch.testing.assert_close(logits, torch.tensor(found[folder]), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["l2", "taylor"])
def test_a_pruning_run_that_was_killed_goes_on_exactly(modules, reviews, tmp_path, monkeypatch, criterion):
    from accelerate import Accelerator

    options = {"out": tmp_path, "data": str(reviews), "train_examples": 96, "batch_size": 16, "sparsity": 0.4}
    settings = modules.config.Settings(**options, criterion=criterion, prune_every=2, precision="no", device="cpu")
    pipeline = modules.pipeline.Pipeline(settings, Accelerator(cpu=True))
    data, phase = pipeline.data(torch.zeros(96, 2)), modules.trainer.Phase(2, 1e-3, pruning="units", best=False)
    monkeypatch.setattr(modules.config, "SMALL", modules.config.SHORT_SMALL)
    monkeypatch.setattr(modules.trainer, "SAVE_EVERY", 3)

    def run(name):
        model = modules.models.small_model(settings, "student", pipeline.tokenizer)
        modules.trainer.train(model, data, phase, tmp_path / name, settings, pipeline.accelerator, {})
        return {key: value.tolist() for key, value in model.state_dict().items()}

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(modules.trainer.Step, "__call__", killed_at(modules.trainer.Step.__call__, 8))
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    assert run("killed") == whole == run("whole")
    zeros = sum(row.count(0.0) for row in whole["distilbert.transformer.layer.0.ffn.lin1.weight"])
    assert zeros > 0


def killed_at(step, number):
    """Returns a step that is interrupted when it is called for that time."""
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(*args)

    return call


@pytest.mark.slow
def test_a_pass_is_the_faster_the_more_neurons_are_removed(modules, threads):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"vocab_size": 32, "dim": 128, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
    models = {}
    for left in (2048, 512, 64):
        model = DistilBertForSequenceClassification(DistilBertConfig(**sizes, hidden_dim=2048)).eval()
        units = sk.slim.find_units(model, modules.pipeline.passed(1, 8))
        branches = [branch for branch in units.branches if branch.kind == "neuron"]
        sk.slim.slim_(model, units.keep({branch.reader: range(left) for branch in branches}))
        models[str(left)] = model
    threads(1)

    def in_order():
        times = [each.p50 for each in measure_latency(models, modules.pipeline.passed, [(8, 64)], runs=15)]
        return times == sorted(times, reverse=True)

    assert any(in_order() for _ in range(3))  # another process may disturb one try
