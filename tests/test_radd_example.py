"""The example of masked diffusion of text: its settings, its files, its figures, its errors, and going on."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from radd_example import FOLDER, PACKAGES, SMALL, example_modules, write_text

for package in PACKAGES:
    pytest.importorskip(package)

from sparsekit.diffusion import DiffusionSampler  # noqa: E402
from sparsekit.models import RADD  # noqa: E402
from sparsekit.models.radd import _renamed  # noqa: E402


@pytest.fixture(scope="module")
def modules():
    with example_modules() as found:
        yield found


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(modules, text, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("radd") / "train"
    return modules.train.train(modules.config.read_config([f"outdir={folder}", *SMALL, *text]))


def test_published_settings_are_known(modules):
    config = modules.config.read_config(
        ["training.loss_type=t_DCE", "noise.type=geometric", "model=medium_radd", "training.accum=1", "model.dropout=0"]
    )
    assert (config.training.loss_type, config.noise.type, config.training.accum) == ("t_DCE", "geometric", 1)
    assert (config.model.hidden_size, config.model.n_blocks, config.model.length) == (1024, 24, 1024)
    assert (config.training.batch_size, config.optim.lr, config.optim.warmup) == (512, 3e-4, 2500)
    assert modules.config.noise_of(config).sigma_max == 20


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ngpus=4", "torchrun --nproc_per_node"),
        ("hydra.run.dir=old", "outdir names the folder"),
        ("+load_dir=old", "outdir names the folder"),
        ("training.loss=k", "training.loss"),
        ("training.loss_type=DSE", "must be one of t_DSE, t_DCE, lambda_DCE, k_DCE, got DSE"),
        ("training.n_iters=0", "training.n_iters must be a whole number of at least 1, got 0"),
        ("model=large", "model must be one of small_radd, medium_radd, tiny_radd, got large"),
        ("--short", "key=value"),
    ],
)
def test_wrong_settings_are_one_sentence(modules, argument, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")) as error:
        modules.config.read_config([argument])
    assert "\n" not in str(error.value)


def test_the_folder_has_what_readers_of_published_runs_expect(modules, run):
    for name in (
        *("config.json", "metrics.jsonl", "result.json", "logs", ".hydra/config.yaml", "model/model.safetensors"),
        *("checkpoints/checkpoint_6.pth", "checkpoints-meta/checkpoint.pth", "samples/iter_6/sample_0.txt"),
    ):
        assert (run / name).exists(), name
    stored = torch.load(run / "checkpoints-meta" / "checkpoint.pth", weights_only=True)
    assert sorted(stored) == ["ema", "model", "optimizer", "step"]
    assert "blocks.0.attn_qkv.weight" in stored["model"] and "vocab_embed.embedding" in stored["model"]
    average, _ = modules.load_model.load_model(run)
    published = RADD.from_published(str(run), n_heads=2).state_dict()
    assert all(torch.equal(tensor, published[name]) for name, tensor in average.state_dict().items())
    assert all(_renamed(modules.checkpoints.published_name(name)) == name for name in average.state_dict())


def test_records_and_result(modules, run, text):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "bound" in record] == [3, 6]
    result = json.loads((run / "result.json").read_text())
    nats, error = modules.evaluation_modeling.measure(
        modules.load_model.load_model(run)[0],
        modules.data.run_texts(run, modules.load_model.load_tokenizer("bytes")).held_out,
        "k_DCE",
        4,
        16,
        0,
    )
    assert (result["nats"], result["standard_error"]) == pytest.approx((nats, error), rel=1e-5)
    assert result["tokens"] == 6 * 4 * 16 and result["perplexity"] == pytest.approx(math.exp(result["nats"]))


@pytest.mark.parametrize("loss", ["t_DCE", "lambda_DCE"])
def test_a_stopped_run_goes_on_exactly(modules, text, tmp_path, monkeypatch, loss):
    more = (f"training.loss_type={loss}", "model.dropout=0.1", "training.snapshot_sampling=false", "training.accum=2")

    def records(name):
        config = modules.config.read_config([f"outdir={tmp_path / name}", *SMALL, *text, *more])
        modules.train.train(config)
        return (tmp_path / name / "metrics.jsonl").read_text()

    whole, step = records("whole"), modules.trainer.Trainer.step

    def stop(self, tokens, run):
        if run.step == 5:
            raise KeyboardInterrupt
        step(self, tokens, run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(modules.trainer.Trainer, "step", stop)
        records("stopped")
    assert records("stopped") == whole


def test_the_values_of_t_dce_are_recorded_without_its_constant(modules, text, tmp_path):
    found = {}
    for loss in ("t_DSE", "t_DCE"):
        config = modules.config.read_config([f"outdir={tmp_path / loss}", *SMALL, *text, f"training.loss_type={loss}"])
        modules.train.train(config)
        lines = (tmp_path / loss / "metrics.jsonl").read_text().splitlines()
        found[loss] = [record for record in map(json.loads, lines) if "loss" in record]
    for dse, dce in zip(found["t_DSE"], found["t_DCE"], strict=True):
        assert dce["nats"] == pytest.approx(dse["loss"], rel=1e-4) and dce["loss"] != pytest.approx(dse["loss"])


def test_ngrams_by_hand(modules):
    train = torch.tensor([[0, 1, 0, 1, 0, 2]])
    rows = torch.tensor([[0, 1]])
    single = torch.tensor([3.5, 2.5, 1.5], dtype=torch.float64) / 7.5
    expected = -(single[0].log() + single[1].log()).item() / 2
    assert modules.ngrams.unigram_nats(train, rows, 3) == pytest.approx(expected)
    pair = (2 + 1 * single[1]) / (3 + 1)
    expected = -(single[0].log() + pair.log()).item() / 2
    assert modules.ngrams.bigram_nats(train, rows, 3, pseudo=(1,)) == pytest.approx(expected)


def test_the_published_cache_draws_the_same_and_evaluates_more(modules):
    torch.manual_seed(0)
    model = RADD(6, hidden_size=16, n_blocks=1, n_heads=2, dropout=0.0).eval()
    torch.nn.init.normal_(model.head.weight)
    sampler, start = DiffusionSampler(8), torch.full((4, 10), 6)
    tokens, evaluations = modules.cost.sample(model, sampler, start, range(4))
    cached, more = modules.cost.cached_sample(model, sampler, start, range(4))
    assert torch.equal(tokens, cached)
    assert evaluations == int(sampler.evaluations(start, 6, range(4)).sum()) < more <= 4 * 8


def test_every_loss_measures_the_model(modules):
    torch.manual_seed(0)
    model = RADD(5, hidden_size=16, n_blocks=1, n_heads=2, dropout=0.0).eval()  # all tokens are equally likely
    rows = torch.randint(5, (4, 8))
    for kind in ("k_DCE", "ar_forward", "ar_random"):
        assert modules.evaluation_modeling.measure(model, rows, kind, 2, 3, 0)[0] == pytest.approx(
            math.log(5), rel=1e-6
        )
    for kind in ("lambda_DCE", "t_DSE", "t_DCE"):
        nats, error = modules.evaluation_modeling.measure(model, rows, kind, 100, 4, 0)
        assert abs(nats - math.log(5)) < 4 * error + 0.01 and error > 0


def test_texts(modules, tmp_path):
    data = modules.data
    assert (
        data.detokenize("He said , 1 @,@ 000 dogs ( big ones ) don n't run .")
        == "He said, 1,000 dogs (big ones) donn't run."
    )
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"document {i:02}" for i in range(20)), "utf-8")
    tokenizer = modules.load_model.load_tokenizer("bytes")
    found = data.load_texts(str(path), str(path), tokenizer, 12, 5, None)
    assert found.held_out.shape == (5, 12) and found.train.shape == (15, 12)
    assert tokenizer.batch_decode(found.train[:1]) == ["document 05<|endoftext|>"]
    with pytest.raises(ValueError, match="gives 0 rows of 400 tokens, 1 are needed"):
        data.load_texts(str(path), str(path), tokenizer, 400, 2, None)
    with pytest.raises(ValueError, match=r"a text must be auto, builtin, .* or a file, got nothing"):
        data.read_documents("nothing")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        data.run_texts(tmp_path, tokenizer)


def test_texts_between_given_parts(modules, run):
    settings = modules.sampling.Sampling(str(run), batch_size=2, length=24, steps=8)
    drawn, found = modules.sampling.draw(settings, "Once", "end.")
    tokenizer = modules.load_model.load_tokenizer("bytes")
    assert all(tokenizer.decode(row[:4]) == "Once" and tokenizer.decode(row[-4:]) == "end." for row in found.tokens)
    assert len(drawn) == 2 and int(found.evaluations.max()) <= 8
    alone = modules.sampling.Sampling(str(run), length=24, steps=8, seed=1)
    assert torch.equal(modules.sampling.draw(alone, "Once", "end.")[1].tokens[0], found.tokens[1])
    with pytest.raises(ValueError, match="leaves nothing to draw between 20 and 4 tokens"):
        modules.sampling.draw(settings, "x" * 20, "end.")


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(modules, text, tmp_path):
    sizes = ("training.n_iters=300", "training.snapshot_freq=300", "training.snapshot_freq_for_preemption=20")
    more = (*SMALL, *text, *sizes, "training.eval_freq=300", "model.dropout=0.1", "device=cpu")
    script = [sys.executable, str(FOLDER / "train.py"), f"outdir={tmp_path / 'killed'}", *more]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not [*(tmp_path / "killed" / "state").glob("step-*")] and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    found = {}
    for name in ("killed", "whole"):
        modules.train.train(modules.config.read_config([f"outdir={tmp_path / name}", *more]))
        found[name] = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    assert "goes on after step" in (tmp_path / "killed" / "log.txt").read_text()
    assert found["killed"] == found["whole"] and len(found["whole"]) == 301


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(modules, text, tmp_path, kind):
    more = (*SMALL, *text, "training.accum=2", f"parallel={kind}", "device=cpu")
    modules.train.train(modules.config.read_config([f"outdir={tmp_path / 'one'}", *more]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(FOLDER / "train.py"), f"outdir={tmp_path / 'two'}", *more]
    subprocess.run([*launcher, *script], capture_output=True, text=True, timeout=300)  # see launch.py of examples/ddpm
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["nats"] == pytest.approx(two["nats"], rel=1e-5)
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0] == [loss if loss is None else pytest.approx(loss, rel=1e-4) for loss in losses[1]]
    assert (tmp_path / "two" / "samples" / "iter_6" / "sample_0.txt").exists()


@pytest.mark.slow
def test_the_whole_example_in_miniature(modules, text, tmp_path):
    path = text[0].partition("=")[2]
    settings = modules.run.Settings(out=tmp_path, data=path, short=True)
    result = modules.run.main(settings)
    assert set(result["losses"]) == {"t_DSE", "t_DCE", "lambda_DCE", "k_DCE"}
    assert result["losses"]["t_DSE"]["nats"] == pytest.approx(result["losses"]["t_DCE"]["nats"], abs=1e-3)
    assert result["evaluate"]["bigram"] < result["evaluate"]["unigram"]
    assert {row["sampler"] for row in result["prune"]["sampling"]} == {
        "cached as published",
        "dense",
        "best dense",
        "2:4",
    }
    assert result == json.loads((tmp_path / "short" / "result.json").read_text())
