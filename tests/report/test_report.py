"""The page is whole, needs nothing from elsewhere, and draws in a browser without a word on the console."""

import html.parser
import re
import shutil
import struct
import subprocess
import zlib

import pytest
import torch
from torch import nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.metrics import categorical_nll
from lightning_lpsgld.predictive import PosteriorEnsemble, Regression, bayesian_model_average
from lightning_lpsgld.report import gather, render
from lightning_lpsgld.report.page import png


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def bank_of(chains=2, draws=6):
    bank = SampleBank()
    for chain in range(chains):
        for step in range(1, draws + 1):
            torch.manual_seed(100 * chain + step)
            bank.add(network(), step=10 * step, chain=chain, lr=0.1 / step, temperature=0.5)
    return bank


def data(n=40):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)
    return [(x[:25], y[:25]), (x[25:], y[25:])]


@pytest.fixture
def facts(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("noise/achieved_over_target/1.weight,lr-SGD,step\n1.5,0.1,0\n,0.2,1\n1.25,,2\n")
    return gather(bank_of(), network(), data(), metrics_csv=log)


def test_facts_are_those_of_the_ensemble(facts):
    x, y = torch.cat([x for x, _ in data()]), torch.cat([y for _, y in data()])
    p = PosteriorEnsemble(network(), bank_of())(x).mean
    said = facts.evaluation
    assert said.task == "multiclass"
    assert said.growth[-1]["nll"] == pytest.approx(categorical_nll(p, y).item(), rel=1e-5)
    assert said.scores["error"][1] == pytest.approx((p.argmax(1) != y).double().mean().item())
    last = network()
    bank_of().load_into(last, 11)
    apart = (last(x).argmax(1) != p.argmax(1)).double().mean().item()
    assert said.distance[-1] == pytest.approx(apart)
    assert len(said.growth) == len(said.distance) == 12
    assert set(facts.traces["norm"]) == {0, 1}
    assert [step for step, _ in facts.traces["norm"][1]] == [10, 20, 30, 40, 50, 60]
    wrong = p.amax(1)[p.argmax(1) != y].sort(descending=True).values
    assert [m.size for m in said.mistakes] == pytest.approx(wrong[:12].tolist(), rel=1e-5)
    assert torch.equal(said.mistakes[-1].image, x[said.mistakes[-1].index])
    assert facts.heat == {"1.weight": [(0.0, 1.5), (2.0, 1.25)]}
    assert facts.schedule == {"SGD": [(0.0, 0.1), (1.0, 0.2)]}


def bank_for(build, draws=4, **info):
    bank = SampleBank()
    for step in range(1, draws + 1):
        torch.manual_seed(step)
        bank.add(build(), step=step, lr=0.1, **info)
    return bank


def values(n=60):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(n, 3, generator=generator)
    return [(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(n, 1, generator=generator))]


def pixels(n=9):
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(n, 1, 4, 4, generator=generator), torch.randint(3, (n, 4, 4), generator=generator)
    y[2] = -100  # an input without a point that counts
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def labels():
    ((x, y),) = values()
    return [(x, (y + torch.arange(4.0) > 1).long())]


def tokens():
    generator = torch.Generator().manual_seed(10)
    ids = torch.randint(7, (12, 5), generator=generator)
    return [{"input": ids, "labels": ids % 3}]


def linear(out):
    return lambda: nn.Linear(3, out)


#: build, batches, options, figures that only such a report has
REPORTS = {
    "values": (linear(1), values, {"task": Regression(noise_variance=0.5)}, ("RMSE", "CRPS", "Quantiles", "Coverage")),
    "mean and variance": (linear(2), values, {"task": Regression("mean_log_variance")}, ("RMSE", "Predictions and")),
    "one logit": (linear(1), lambda: [(x, (y > 0).float()) for x, y in values()], {}, ("Error", "Reliability")),
    "labels": (linear(4), labels, {}, ("Error", "Reliability")),
    "pixels": (lambda: nn.Conv2d(1, 3, 3, padding=1), pixels, {}, ("Error", "Reliability")),
    "tokens": (lambda: nn.Embedding(7, 3), tokens, {}, ("Error", "NLL")),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_any_task(name):
    build, batches, options, figures = REPORTS[name]
    facts = gather(bank_for(build), build(), batches(), **options)
    page = render(facts, name)
    for figure in figures:
        assert f"<figcaption>{figure}" in page
    assert "nothing to show" not in page
    assert "nan" not in page
    scores = bayesian_model_average(bank_for(build), build(), batches(), **options).scores
    assert facts.evaluation.scores["nll"][1] == pytest.approx(scores["nll"])
    assert facts.card["task"] == facts.evaluation.task
    assert facts.evaluation.mistakes
    assert all(distance > 0 for distance in facts.evaluation.distance)


def test_errors_of_numbers_are_those_that_the_spread_does_not_explain():
    facts = gather(bank_for(linear(1)), linear(1)(), values(), task=Regression(noise_variance=0.5))
    ((x, y),) = values()
    answer = PosteriorEnsemble(linear(1)(), bank_for(linear(1)), task=Regression(noise_variance=0.5))(x)
    off = ((answer.mean - y).abs() / answer.variance.sqrt()).flatten().sort(descending=True)
    assert [m.index for m in facts.evaluation.mistakes] == off.indices[:12].tolist()
    assert [m.size for m in facts.evaluation.mistakes] == pytest.approx(off.values[:12].tolist(), rel=1e-4)
    quantiles = next(curve for curve in facts.evaluation.curves if curve.name == "Coverage of central intervals")
    promised, inside = quantiles.series["inside"][9]
    inner = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.75))
    assert promised == 0.5
    assert inside == pytest.approx(
        float((off.values < inner).double().mean()), abs=0.1
    )  # the mixture is near a Gaussian


class Tokenized(nn.Module):
    """Called by keyword, as the models of Hugging Face are."""

    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(7, 3)

    def forward(self, input_ids, attention_mask):
        return (self.net(input_ids) * attention_mask[..., None]).mean(1)


def test_a_tokenized_batch_has_no_pictures():
    ids = torch.randint(7, (12, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones(12, 5), "labels": torch.randint(3, (12,))}
    found = gather(bank_for(Tokenized), Tokenized(), [batch])
    assert found.evaluation.task == "multiclass"
    assert all(mistake.image is None for mistake in found.evaluation.mistakes)


def test_inputs_with_ignored_points_keep_their_numbers():
    build = REPORTS["pixels"][0]
    facts = gather(bank_for(build), build(), pixels())
    x, y = torch.cat([x for x, _ in pixels()]), torch.cat([y for _, y in pixels()])
    wrong = (PosteriorEnsemble(build(), bank_for(build))(x).labels != y).flatten(1).double().mean(1)
    wrong[2] = 0.0
    assert {m.index: m.size for m in facts.evaluation.mistakes} == pytest.approx(
        {i: share for i, share in enumerate(wrong.tolist()) if share > 0}
    )
    worst = facts.evaluation.mistakes[0]
    assert torch.equal(worst.image, x[worst.index])
    assert worst.text == f"{round(16 * worst.size)} of 16 points wrong"


def test_samples_stand_on_the_learning_rate_of_the_run(tmp_path):
    (tmp_path / "metrics.csv").write_text("lr-SGD,step\n0.1,0\n0.05,2\n")
    bank = bank_for(network, draws=3, cycle=2)
    page = render(gather(bank, network(), data(), metrics_csv=tmp_path / "metrics.csv"), "cycles")
    figure = page[page.index("<figcaption>Learning rate") :].split("</figure>")[0]
    assert "run, SGD" in figure
    assert figure.count("<circle") == 3
    assert figure.count("samples of cycle 2: ") == 3


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "input", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_needs_nothing_from_elsewhere(facts):
    page = render(facts, "A <bank>")
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.links
    assert all(link.startswith("data:") for link in tags.links)
    assert "A &lt;bank&gt;" in page
    for name in ("Error against samples", "NLL against samples", "Reliability", "Learning rate", "Noise over target",
                 "Disagreement", "Trace: norm"):  # fmt: skip
        assert f"<figcaption>{name}" in page
    assert "nothing to show" not in page
    assert "nan" not in re.sub(r"data:[^\"]*", "", page)


def test_pictures_are_the_inputs():
    image = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    data = png(image)
    length = struct.unpack(">I", data[33:37])[0]
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert zlib.decompress(data[41 : 41 + length]) == bytes([0, 0, 255, 0, 128, 64])


def test_refusals():
    with pytest.raises(ValueError, match="no usable sample"):
        gather(SampleBank(), network(), data())
    with pytest.raises(ValueError, match="got no test batch"):
        gather(bank_of(), network(), [])
    with pytest.raises(ValueError, match="no targets to score with"):
        gather(bank_of(), network(), [data()[0][0]])


def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs a Chromium browser")
    return found


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("classes", 1200, False), ("classes", 1200, True), ("classes", 400, False), ("values", 1200, False)]
    + [pytest.param(name, 400, False, marks=pytest.mark.slow) for name in REPORTS],
)
def test_it_draws_in_a_browser(tmp_path, facts, name, width, dark):
    """Screenshot with pixels of the figures' colours, every SVG of some size, nothing wider than the window.

    And what can be pointed at answers.
    """
    if name != "classes":
        build, batches, options, _ = REPORTS[name]
        facts = gather(bank_for(build), build(), batches(), **options)
    page = render(facts, "A bank")
    probe = (
        "<script>addEventListener('load', () => { const s = [...document.querySelectorAll('svg')].map(e => "
        "e.getBoundingClientRect()); document.body.dataset.drawn = s.filter(r => r.width > 150 && r.height > 60).length"
        " + '/' + s.length; document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth; "
        "const shown = e => getComputedStyle(e).display != 'none', key = document.querySelector('.key input'); "
        "if (!key) return; "
        "const figure = key.closest('figure'), series = figure.querySelector('.series.s0'); "
        "const tip = document.querySelector('.mark .tip'), seen = [shown(series), shown(tip)]; "
        "key.click(); tip.parentNode.focus(); seen.push(shown(series), shown(tip)); "
        "key.click(); tip.parentNode.blur(); "
        "document.body.dataset.moves = seen; })</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", f"--window-size={width},2400", "--virtual-time-budget=3000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]  # fmt: skip
    address = f"file://{tmp_path / 'page.html'}"
    dumped = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    count = page.count("<svg")
    assert f'data-drawn="{count}/{count}"' in dumped.stdout
    assert 'data-wide="false"' in dumped.stdout
    moves = 'data-moves="true,false,false,true"'
    assert (moves in dumped.stdout) == ("<label class=" in page), "a key hides its series, a mark shows its value"
    assert "<label class=" in page or name != "classes"
    assert "CONSOLE" not in dumped.stderr
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, timeout=120, check=True)
    from torchvision.io import decode_image

    pixels = decode_image(str(shot))[:3].flatten(1).T
    ink, back = ([110, 168, 254], [13, 17, 23]) if dark else ([37, 99, 201], [255, 255, 255])
    for colour, least in ((ink, 50), (back, 10_000)):
        assert int((pixels == torch.tensor(colour, dtype=torch.uint8)).all(1).sum()) > least
