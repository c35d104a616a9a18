"""The three-tier example runs whole, in pieces and after a kill; what it learns from is never scored."""

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from language import one_thread
from safetensors.torch import load_file

from sparsekit.tiers import Ratios, Step, load_tier_maps, read_schedule

for package in ("accelerate", "matplotlib", "tqdm", "transformers", "tyro"):
    pytest.importorskip(package)

FOLDER = Path(__file__).parent.parent / "examples" / "three_tier"
SCHEDULE = read_schedule(FOLDER / "progressive_config.csv")
SHARES = [0.05, 0.1461, 0.2441, 0.3422, 0.4172]  # of zeros: half of the 2:4 blocks, all but 10 of 256 of the top-k ones


def command(*arguments, short=True):
    return [sys.executable, str(FOLDER / "run.py"), *(["--short"] if short else []), *map(str, arguments)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """What is computed here and in other processes has the same bits: those of sums depend on the threads."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def out(modules, tmp_path_factory):
    """The folder of a whole short run."""
    folder = tmp_path_factory.mktemp("three_tier") / "out"
    with redirect_stdout(io.StringIO()) as said:
        modules.run.main(modules.run.Config(short=True, out=folder))
    assert "progressive" in said.getvalue() and "tokens/s" in said.getvalue()
    return folder


@pytest.fixture(scope="module")
def modules():
    """The example's modules, imported as ``python run.py`` finds its neighbors."""
    names = ("run", "finetune", "model", "show", "speed", "text")
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def run_here(modules, monkeypatch):
    """The command, in this process, which has imported what takes seconds."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", command(*arguments)[1:])
        runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")

    return run


def test_the_schedule_is_the_published_one_with_the_epochs_that_were_run():
    assert [step.epochs for step in SCHEDULE] == [2, 2, 2, 2, 3]
    assert SCHEDULE[-1] == Step(5, Ratios(0.35, 0.45, 0.20), 0.15, 0.0, 3)
    for step, share in zip(SCHEDULE, SHARES, strict=True):
        assert step.ratios.mid_2_4 / 2 + step.ratios.topk * (1 - 10 / 256) == pytest.approx(share, abs=1e-4)


@pytest.mark.slow
def test_the_log_has_every_iteration_beside_one_shot(out):
    head, *rows = [line.split("\t") for line in (out / "log.tsv").read_text().splitlines()]
    assert head == ["run", "iteration", "dense", "mid_2_4", "topk", "expected_sparsity", "sparsity", "ppl"]
    runs = [row[0] for row in rows]
    assert runs == ["dense"] + 5 * ["progressive"] + 5 * ["one-shot"] + ["one-shot, all fine-tuning"]
    for row, step, share in zip(rows[1:6], SCHEDULE, SHARES, strict=True):
        number = dict(zip(head[1:], map(float, row[1:]), strict=True))
        assert number["iteration"] == step.iteration
        assert (number["dense"], number["mid_2_4"], number["topk"]) == pytest.approx(step.ratios, abs=2e-3)
        assert number["sparsity"] == pytest.approx(share, abs=3e-3)  # whole blocks of a small model
        assert number["sparsity"] == pytest.approx(number["expected_sparsity"], abs=1e-4)
        assert 1 < number["ppl"] < 256
    report = json.loads((out / "report.json").read_text())
    assert [len(report["runs"][run]) for run in dict.fromkeys(runs[1:])] == [5, 5, 1]
    assert f"{report['runs']['progressive'][4]['metric']:.4f}" == rows[5][-1]
    assert all(ratio > 0 for ratio in report["speed"].values())
    assert (out / "three_tier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_iteration_leaves_a_model_and_its_maps(out):
    last = load_tier_maps(out / "progressive" / "iteration-5" / "tier_maps.safetensors")
    for step in SCHEDULE:
        folder = out / "progressive" / f"iteration-{step.iteration}"
        maps = load_tier_maps(folder / "tier_maps.safetensors")
        weights = load_file(folder / "hf" / "model.safetensors")
        for name, tier_map in maps.items():
            zeros = (weights[f"{name}.weight"] == 0).float().mean().item()
            assert (tier_map.tiers <= last[name].tiers).all()
            assert zeros == pytest.approx(last[name].sparsity, abs=2e-3)  # all fades in the first iteration
    assert (out / "compressed.safetensors").exists()


@pytest.mark.slow
def test_one_iteration_from_the_files_of_the_one_before(run_here, out, tmp_path):
    before, now = (out / "progressive" / f"iteration-{number}" for number in (2, 3))
    maps = before / "tier_maps.safetensors"
    run_here("--iteration", 3, "--model", before / "hf", "--previous_tier_maps", maps, "--out", tmp_path)
    same = tmp_path / "progressive" / "iteration-3"
    for name in ("tier_maps.safetensors", "hf/model.safetensors"):
        found, expected = load_file(same / name), load_file(now / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert [line.split("\t")[:2] for line in (tmp_path / "log.tsv").read_text().splitlines()[1:]] == [
        ["dense", "0"],
        ["progressive", "3"],
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on(run_here, out, tmp_path):
    shutil.copytree(out / "builtin", tmp_path / "builtin")
    arguments = ("--out", tmp_path, "--no-compare", "--seconds", 0)
    third = tmp_path / "progressive" / "iteration-3"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command(*arguments), env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    try:
        end = time.monotonic() + 200
        while not (third / "report.json").exists():
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    kept = (third / "hf" / "model.safetensors").stat().st_mtime_ns
    run_here(*arguments)
    assert (third / "hf" / "model.safetensors").stat().st_mtime_ns == kept
    last = Path("progressive", "iteration-5", "hf", "model.safetensors")
    found, expected = load_file(tmp_path / last), load_file(out / last)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_errors_are_one_sentence(run_here, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:  # a string is printed on stderr, and the exit code is 1
        run_here("--model", tmp_path / "none", "--out", tmp_path)
    assert ended.value.code.startswith(f"error: --model {tmp_path / 'none'} could not be loaded: ")
    assert len(ended.value.code.splitlines()) == 1 and capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration": 6}, r"--iteration must be from 1 to 5, got 6"),
        ({"iteration": 2}, r"--iteration 2 needs --previous-tier-maps, those of the one before"),
        ({"previous_tier_maps": Path("maps.pt")}, r"--previous-tier-maps is for --iteration, which is not given"),
        ({"seed": 1}, r"has a run with --seed 0, not 1: use another --out"),
        ({"config": FOLDER / "run.py"}, r"run.py, line 1: the columns must be iteration,dense"),
    ],
)
def test_what_does_not_fit_is_said(modules, out, changes, message):
    with pytest.raises(ValueError, match=message):
        modules.run.main(modules.run.Config(short=True, out=out, **changes))


def test_text_that_is_missing_or_too_short_is_said(modules, tmp_path):
    tokenizer = modules.model.bytes_tokenizer()
    with pytest.raises(ValueError, match=r"--data must be builtin, wikitext2, c4 or a file, got nowhere.txt"):
        modules.text.read("nowhere.txt", tokenizer, 8, 2)
    path = tmp_path / "short.txt"
    path.write_text("to be or not to be\n\nthat is", encoding="utf-8")
    with pytest.raises(ValueError, match=r"gives 2 windows of 8 tokens to score and 0 to learn from, 2 of each are"):
        modules.text.read(str(path), tokenizer, 8, 2)


def test_held_out_text_is_never_learned_from(modules, tmp_path):
    documents = [f"{index:02}" * 20 for index in range(20)]
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join([*documents, *documents]), encoding="utf-8")
    text = modules.text.read(str(path), modules.model.bytes_tokenizer(), 20, 5)
    assert text.held_out.shape == (5, 20) and text.train.shape == (34, 20)
    tokenizer = modules.model.bytes_tokenizer()
    scored, learned = (tokenizer.decode(windows.flatten()) for windows in (text.held_out, text.train))
    assert scored == "".join(documents)[:100] and learned == "".join(documents[3:])


def finetune(modules, windows, rank, processes):
    accelerator = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    return modules.finetune.FineTune(windows, SCHEDULE, accelerator, rate=1.0, batch=4, epoch=20, moments=Path, seed=0)


def test_processes_share_a_batch_and_steps_share_an_order(modules):
    windows = torch.arange(60)[:, None]
    alone = [batch.flatten().tolist() for batch in finetune(modules, windows, 0, 1)._batches(0, 15)]
    assert sorted(row for batch in alone for row in batch) == list(
        range(60)
    )  # every window once, before any comes again
    halves = [list(finetune(modules, windows, rank, 2)._batches(0, 15)) for rank in (0, 1)]
    for batch, first, second in zip(alone, *halves, strict=True):
        assert len(first) == len(second) == 2 and sorted(torch.cat([first, second]).flatten().tolist()) == sorted(batch)
    later = [batch.flatten().tolist() for batch in finetune(modules, windows, 0, 1)._batches(10, 15)]
    assert later == alone[10:]
    with pytest.raises(ValueError, match="--batch must be a multiple of 3 processes, got 4"):
        finetune(modules, windows, 0, 3)


def test_the_learning_rate_is_that_of_one_shot_at_every_update(modules):
    steps = finetune(modules, torch.zeros(8, 1), 0, 1)
    accelerator = SimpleNamespace(num_processes=1)
    whole = Step(1, SCHEDULE[-1].ratios, 0.65, 0.2, 11)
    once = modules.finetune.FineTune(
        torch.zeros(8, 1), (whole,), accelerator, rate=1.0, batch=4, epoch=20, moments=Path, seed=0
    )
    shares = [steps.rate_share(update) for update in range(55)]
    assert shares == [once.rate_share(update) for update in range(55)]
    assert shares[0] == 0.05 and shares[19:28] == [1.0] * 9
    assert shares[28:] == sorted(shares[28:], reverse=True) and 0 < shares[-1] < 0.05


@pytest.mark.slow
def test_on_a_real_model_steps_beat_one_shot_and_are_no_worse_with_all_fine_tuning(modules, data, tmp_path):
    model, text = data / "ckpt_stories260K" / "hf", data / "tinystories" / "tinystories_sample.txt"
    sizes = {"batch": 8, "epoch_windows": 120, "seconds": 0}
    modules.run.main(modules.run.Config(model=str(model), data=str(text), out=tmp_path, **sizes))
    report = json.loads((tmp_path / "report.json").read_text())
    ppl = {run: rows[-1]["metric"] for run, rows in report["runs"].items()}
    assert report["dense"] < ppl["progressive"] < 0.3 * ppl["one-shot"]
    assert ppl["progressive"] < 1.005 * ppl["one-shot, all fine-tuning"]  # 0.988; the number of threads moves it
