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
from lightning_lpsgld.predictive import PosteriorEnsemble
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
    log.write_text("noise/achieved_over_target/1.weight,step\n1.5,0\n,1\n1.25,2\n")
    return gather(bank_of(), network(), data(), metrics_csv=log)


def test_facts_are_those_of_the_ensemble(facts):
    x, y = torch.cat([x for x, _ in data()]), torch.cat([y for _, y in data()])
    p = PosteriorEnsemble(network(), bank_of())(x).mean
    assert facts.growth[-1]["nll"] == pytest.approx(categorical_nll(p, y).item(), rel=1e-5)
    assert facts.scores["error"][1] == pytest.approx((p.argmax(1) != y).double().mean().item())
    assert len(facts.growth) == len(facts.disagreement) == 12
    assert set(facts.traces["norm"]) == {0, 1}
    assert [step for step, _ in facts.traces["norm"][1]] == [10, 20, 30, 40, 50, 60]
    wrong = p.amax(1)[p.argmax(1) != y].sort(descending=True).values
    assert [m.confidence for m in facts.mistakes] == pytest.approx(wrong[:12].tolist(), rel=1e-5)
    assert torch.equal(facts.mistakes[0].image, x[facts.mistakes[0].index])
    assert facts.heat == {"1.weight": [(0.0, 1.5), (2.0, 1.25)]}


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "line", "circle", "rect", "polyline"):
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


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (400, False)])
def test_it_draws_in_a_browser(tmp_path, facts, width, dark):
    """Screenshot with pixels of the figures' colours, every SVG of some size, nothing wider than the window."""
    page = render(facts, "A bank")
    probe = (
        "<script>addEventListener('load', () => { const s = [...document.querySelectorAll('svg')].map(e => "
        "e.getBoundingClientRect()); document.body.dataset.drawn = s.filter(r => r.width > 150 && r.height > 60).length"
        " + '/' + s.length; document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth; })</script>"
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
    assert "CONSOLE" not in dumped.stderr
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", address], capture_output=True, timeout=120, check=True)
    from torchvision.io import decode_image

    pixels = decode_image(str(shot))[:3].flatten(1).T
    ink, back = ([110, 168, 254], [13, 17, 23]) if dark else ([37, 99, 201], [255, 255, 255])
    for colour, least in ((ink, 50), (back, 10_000)):
        assert int((pixels == torch.tensor(colour, dtype=torch.uint8)).all(1).sum()) > least
