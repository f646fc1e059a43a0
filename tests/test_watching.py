"Who looks on while a run trains: told of each step once, through kills and failures, and never in its way."
import sys
import warnings
from io import StringIO
from types import ModuleType

import pytest
import torch

from conftest import make_llama
from qlora_lab import watching
from qlora_lab.live_figure import LiveFigure
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.runs import Run
from qlora_lab.settings import TrainConfig
from qlora_lab.train import train
from qlora_lab.watching import Bar, Watcher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    "One layer, for steps that take no time."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama(layers=1, hidden=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(tiny, data, folder, watchers=(), progress=False, **settings):
    short = dict(steps=7, batch_size=4, accumulation=1, rank=2, eval_examples=4, eval_prompts=0, checkpoint_every=3)
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
    return train(model, tokenizer, data, TrainConfig(folder=folder, **short | settings), progress, watchers)


class Diary(Watcher):
    "Writes down what it is told, and may end the run at a step."
    def __init__(self, end=None): self.told, self.end = [], end
    def on_start(self, outset): self.told.append(("start", len(outset.rows), outset.config.steps))
    def on_evaluation(self, row): self.told.append(("measured", row["step"]))
    def on_end(self, run): self.told.append(("end", run and run.adapter_step))
    def on_step(self, row):
        self.told.append(row["step"])
        if row["step"] == self.end: raise KeyboardInterrupt


def test_everything_is_told_once(tiny, data, tmp_path):
    "In order, and after a kill from the checkpoint on; a finished run has nothing to tell."
    first, second, third = Diary(end=5), Diary(), Diary()
    with pytest.raises(KeyboardInterrupt): run(tiny, data, tmp_path / "run", [first], eval_every=2)
    done = run(tiny, data, tmp_path / "run", [second], eval_every=2)
    run(tiny, data, tmp_path / "run", [third], eval_every=2)
    assert first.told == [("start", 0, 7), 1, 2, ("measured", 2), 3, 4, ("measured", 4), 5, ("end", None)]
    assert second.told == [("start", 3, 7), 4, ("measured", 4), 5, 6, ("measured", 6), 7, ("measured", 7),
                           ("end", done.adapter_step)]
    assert third.told == []


def test_a_watcher_that_fails_is_left_out(tiny, data, tmp_path):
    "With a warning that names it; the run ends as without it."
    class Fails(Diary):
        def on_step(self, row): raise OSError(28, "No space left on device")
    fails, plain = Fails(), run(tiny, data, tmp_path / "plain")
    with pytest.warns(UserWarning, match="Fails failed and is left out.*No space left"):
        watched = run(tiny, data, tmp_path / "run", [fails])
    assert watched.losses == plain.losses and fails.told == [("start", 0, 7)]


def test_the_bar_shows_the_held_out_loss(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", out := StringIO())
    run(tiny, data, tmp_path / "run", progress=True, eval_every=3)
    last = out.getvalue().rstrip().split("\r")[-1]
    assert "7/7" in last and "loss " in last and "held out " in last and "tokens/s" in last


def test_a_notebook_has_a_figure_and_a_terminal_a_bar(monkeypatch):
    kinds = lambda: [type(w) for w in watching.usual_watchers(TrainConfig(), True)]  # noqa: E731
    assert kinds() == [Bar] and watching.usual_watchers(TrainConfig(), False) == []
    kernel = type("Shell", (), {"kernel": None})()
    monkeypatch.setitem(sys.modules, "IPython", type("IPython", (ModuleType,), {})("IPython"))
    sys.modules["IPython"].get_ipython = lambda: kernel
    assert watching.in_notebook()
    sys.modules["IPython"].get_ipython = lambda: None
    assert not watching.in_notebook() and kinds() == [Bar]


def test_the_live_figure_is_one_picture(tiny, data, tmp_path, monkeypatch):
    "Shown once, renewed in its place, standing at the end; after a kill too."
    shown = []
    class Handle:
        def update(self, picture): shown.append(("update", picture.alt))
    def display(picture, display_id):
        assert display_id and picture.data.startswith(b"\x89PNG")
        shown.append(("display", picture.alt))
        return Handle()
    import IPython.display
    monkeypatch.setattr(IPython.display, "display", display)
    run(tiny, data, tmp_path / "run", [LiveFigure(pause=0.)], eval_every=3)
    assert [what for what, _ in shown] == ["display"] + ["update"] * (len(shown) - 1) and len(shown) >= 2
    assert "step 7 of 7" in shown[-1][1]
    shown.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tiny, data, tmp_path / "cut", [LiveFigure(pause=1e9), Diary(end=2)], eval_every=3)
    assert [what for what, _ in shown] == ["display", "update"] and "step 2 of 7" in shown[-1][1]


def logged(folder):
    "The scalars of a run's logs by tag, as any reader finds them: every event of every file."
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = {}
    for path in sorted((folder / "tensorboard").glob("events*")):
        for event in loader.LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                got = value.simple_value if value.HasField("simple_value") else value.tensor.float_val[0]
                found.setdefault(value.tag, []).append((event.step, got, event.wall_time))
    return found


def test_tensorboard_has_each_step_once(tiny, data, tmp_path):
    "Cut short beyond a checkpoint and gone on with: the steps in order, the numbers of metrics.jsonl, rising times."
    pytest.importorskip("tensorboard")
    with pytest.raises(KeyboardInterrupt):
        run(tiny, data, tmp_path / "run", [Diary(end=5)], eval_every=2, tensorboard=True)
    assert [step for step, *_ in logged(tmp_path / "run")["train/loss"]] == [1, 2, 3, 4, 5]
    done = run(tiny, data, tmp_path / "run", eval_every=2, tensorboard=True)
    found = logged(tmp_path / "run")
    assert [(step, pytest.approx(value)) for step, value, _ in found["train/loss"]] == list(enumerate(done.losses, 1))
    assert [step for step, *_ in found["held_out/loss"]] == [0, 2, 4, 6, 7]
    times = [time for *_, time in found["train/loss"]]
    assert times == sorted(times) and len(list((done.folder / "tensorboard").iterdir())) == 1


def test_tensorboard_is_asked_for_before_the_first_step(tiny, data, tmp_path, monkeypatch):
    "Where the package is missing one sentence says so, and no folder is made."
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LabError, match="pip install tensorboard"):
        run(tiny, data, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_every_run_can_be_plotted(tiny, data, tmp_path):
    "Measured on the way or not, done or cut short: the figure holds the run's numbers, and the look stays as it was."
    import matplotlib.pyplot as plt
    before, open_figures = dict(plt.rcParams), plt.get_fignums()
    plain, measured = run(tiny, data, tmp_path / "plain"), run(tiny, data, tmp_path / "measured", eval_every=3)
    with pytest.raises(KeyboardInterrupt): run(tiny, data, tmp_path / "cut", [Diary(end=2)])
    def curve(figure, name):
        line = next(line for line in figure.axes[0].lines if name in line.get_label())
        return [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = [r.plot() for r in (plain, measured, Run.load(tmp_path / "cut"))]
        for i, figure in enumerate(figures): figure.savefig(tmp_path / f"{i}.png")
    assert curve(figures[0], "each step") == list(enumerate(plain.losses, 1))
    assert curve(figures[0], "held out") == [(0, plain.before.loss), (7, plain.after.loss)]
    assert curve(figures[1], "held out")[1:] == measured.held_out and curve(figures[2], "held out")[0][0] == 0
    assert list(figures[0].axes[1].lines[0].get_ydata()) == [m["lr"] for m in plain.metrics]
    assert [len(f.axes) for f in figures] == [3, 3, 2] and plt.get_fignums() == open_figures
    assert dict(plt.rcParams) == before
