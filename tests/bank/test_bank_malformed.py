"""Whatever lies in a bank's directory: a clear error or a named damage, never a crash, never a wrong sample.

Manifests are altered and then *sealed again* with a matching checksum, so that what lies behind the checksum is tested;
sample files are altered and named by the checksum of what they became.
"""

import contextlib
import copy
import json
import os
import shutil

import pytest
import torch
from bank_samples import Net, assert_holds, contents, expected, fill, filled_bank, resealed, rewrite_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lpsgld.bank import BankError, SampleBank, tensors
from lightning_lpsgld.bank import memory as memory_store
from lightning_lpsgld.bank.folder import LocalFolder
from lightning_lpsgld.bank.journal import line
from lightning_lpsgld.bank.manifest import MAX_MANIFEST_BYTES, checksum
from lightning_lpsgld.bank.tensors import sample_bytes
from lightning_lpsgld.ops import quantize

STEPS = (1, 2)
QUICK, MANY = 100, 2_500  # for each of five attacks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A bank in a folder of its own, and a secret beside it that nobody may read into a sample or write over."""
    root = tmp_path_factory.mktemp("root")
    filled_bank(root / "bank", STEPS).compact()
    filled_bank(root / "journaled" / "bank", STEPS)
    with SampleBank(root / "based" / "bank") as based:
        for step in STEPS:
            constant = ["conv.weight", "norm.running_mean"]  # which the second sample has otherwise
            based.add(fill(Net(), step), step=step, formats="bfp8", constant=constant)
        based.compact()
    (root / "secret.safetensors").write_bytes(next((root / "bank").glob("*-s1-*")).read_bytes())
    return root


def manifest_of(place):
    return json.loads((place / "bank" / "manifest.json").read_text())


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 2**63, 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        [
            *("bfp8", "fixed8.6", "e4m3", "bfp8-dim7", "bfp99", "float32", "int64", "fc.weight", "conv.weight", "thin"),
            *("..", "../secret.safetensors", "/etc/passwd", "manifest.json", "\ud800", "\x00", "", "nan", "last"),
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def spots(value, found=()):
    """Every place in nested lists and dicts, as paths of keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from (path for key, inner in items for path in ((*found, key), *spots(inner, (*found, key))))


def mutated(data, value):
    """Replace, drop, duplicate or swap something somewhere in ``value``."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        paths = list(spots(value))
        if not paths:
            return value
        *above, key = data.draw(st.sampled_from(paths))
        parent = value
        for step in above:
            parent = parent[step]
        action = data.draw(st.sampled_from(["replace", "replace", "drop", "repeat", "swap"]))
        if action == "replace":
            parent[key] = data.draw(VALUES)
        elif action == "drop":
            del parent[key]
        elif action == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            other = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[key], parent[other] = parent[other], parent[key]
    return value


def use(path):
    """Open a bank and load all it offers; only BankError may come of it."""
    try:
        bank = SampleBank.open(path)
        for sample in bank:
            sample.load_into(fill(Net(), 0))
    except BankError as error:
        return str(error)
    return bank


def check_manifest(place, text):
    """Invariant: BankError, or a bank; nothing is written anywhere; whoever still claims to be our module is right."""
    file = place / "bank" / "manifest.json"
    genuine = file.read_bytes()
    file.write_bytes(text)
    try:
        before = tree(place)
        outcome = use(place / "bank")
        assert tree(place) == before
        if isinstance(outcome, SampleBank):
            for sample in outcome:
                wanted = expected(int(sample.entries["labels"][0]))
                assert all(torch.equal(value, wanted[name]) for name, value in sample.state_dict().items())
        else:
            assert 0 < len(outcome) < 2000
    finally:
        file.write_bytes(genuine)


def mutated_manifest(place, data):
    manifest = mutated(data, manifest_of(place))
    if isinstance(manifest, dict):
        with contextlib.suppress(BankError):
            manifest = resealed(manifest)
    check_manifest(place, json.dumps(manifest).encode())


def mutated_base(place, data):
    """Alter what a manifest says of the tensors that samples leave out, and seal it again."""
    place = place / "based"
    manifest = manifest_of(place)
    with contextlib.suppress(BankError):
        manifest = resealed({**manifest, "base": mutated(data, manifest["base"])})
    check_manifest(place, json.dumps(manifest).encode())


def mutated_text(place, data):
    text = bytearray((place / "bank" / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, max(len(text) - 1, 0)))
        if data.draw(st.booleans()):
            del text[start : start + data.draw(st.integers(1, 2000))]
        else:
            text[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    check_manifest(place, bytes(text))


def mutated_journal(place, data):
    """Alter the journal's bytes, or its one addition and then seal the line again."""
    place = place / "journaled"
    (file,) = (place / "bank").glob("journal-*")
    genuine = file.read_bytes()
    head, row, _ = genuine.split(b"\n")
    text = bytearray(genuine)
    if data.draw(st.booleans()):
        change = mutated(data, json.loads(row.partition(b" ")[2]))
        with contextlib.suppress(ValueError):
            addition = json.dumps(change, allow_nan=False)
            text = head + b"\n" + line(file.name[8:24], 1, addition)
    else:
        position = data.draw(st.integers(0, len(text) - 1))
        text[position : position + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=6))
    file.write_bytes(bytes(text))
    try:
        before = tree(place)
        outcome = use(place / "bank")
        assert tree(place) == before
        if isinstance(outcome, SampleBank):
            assert {sample.step for sample in outcome} <= set(STEPS)
            for sample in outcome:
                wanted = expected(int(sample.entries["labels"][0]))
                assert all(torch.equal(value, wanted[name]) for name, value in sample.state_dict().items())
    finally:
        file.write_bytes(genuine)


def mutated_sample(place, data):
    """Alter a sample file and make name, size and checksum in the manifest match."""
    bank = place / "bank"
    genuine_file = next(bank.glob("*-s1-*"))
    content, manifest = bytearray(genuine_file.read_bytes()), (bank / "manifest.json").read_bytes()
    header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([8, 8 + header, len(content) - 1]))
        start = data.draw(st.integers(0, max(min(end, len(content) - 1), 0)))
        if data.draw(st.booleans()):
            content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        else:
            del content[start : start + data.draw(st.integers(1, 300))]
    name = f"sample-c0-s1-{checksum(bytes(content))}.safetensors"

    def adopt(body):
        body["samples"][0]["file"], body["samples"][0]["size"] = name, len(content)

    (bank / name).write_bytes(content)
    try:
        rewrite_manifest(bank, adopt)
        outcome = use(bank)
        if isinstance(outcome, SampleBank) and outcome.steps == [1, 2]:
            outcome.load_into(net := Net(), 1)
            assert all(torch.equal(contents(net)[key], value) for key, value in expected(2).items())
        SampleBank.open(bank, verify=False)
    finally:
        (bank / "manifest.json").write_bytes(manifest)
        if bank / name != genuine_file:
            (bank / name).unlink()


def mutated_state(place, data):
    """A checkpoint's copy of a bank in memory, altered."""
    bank = filled_bank(None, STEPS)
    state = bank.state_dict()
    manifest, samples = state["manifest"], state["samples"]
    kind = data.draw(st.sampled_from(["manifest", "samples", "tensor", "whole"]))
    if kind == "manifest":
        manifest = mutated(data, manifest)
        if isinstance(manifest, dict):
            with contextlib.suppress(BankError):
                manifest = resealed(manifest)
    elif kind == "samples":
        samples = data.draw(VALUES)
    elif kind == "tensor":
        name = data.draw(st.sampled_from(sorted(samples[0])))
        samples[0][name] = data.draw(st.sampled_from([None, 3, torch.zeros(2), samples[0][name].double(), [1]]))
    other = SampleBank()
    try:
        other.load_state_dict({"manifest": manifest, "samples": samples} if kind != "whole" else data.draw(VALUES))
    except BankError:
        assert len(other) == 0
    else:
        for sample in other:
            wanted = expected(int(sample.entries["labels"][0]))
            assert all(torch.equal(value, wanted[key]) for key, value in sample.state_dict().items())


ATTACKS = {
    "manifest": mutated_manifest,
    "text": mutated_text,
    "journal": mutated_journal,
    "base": mutated_base,
    "sample": mutated_sample,
    "state": mutated_state,
}
NO_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("attack", ATTACKS)
@given(data=st.data())
@settings(max_examples=QUICK, deadline=None, suppress_health_check=NO_CHECKS)
def test_malformed_content_is_an_error_or_named_damage(place, attack, data):
    ATTACKS[attack](place, data)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
@given(data=st.data())
@settings(max_examples=MANY, deadline=None, suppress_health_check=NO_CHECKS)
def test_ten_thousand_malformed_contents(place, attack, data):
    ATTACKS[attack](place, data)


def test_the_genuine_bank_is_accepted(place):
    """The other tests could not fail if the bank they alter were refused anyway."""
    assert_holds(SampleBank.open(place / "bank"), STEPS)
    rewritten = json.dumps(resealed(manifest_of(place))).encode()
    check_manifest(place, rewritten)
    assert isinstance(use(place / "bank"), SampleBank)


OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "sub/sample.safetensors",
    "..\\secret.safetensors",
    "C:\\secret.safetensors",
    "secret.safetensors",
    "manifest.json",
    "sample-c0-s1-{digest}.safetensors/../../secret.safetensors",
    "./sample-c0-s1-{digest}.safetensors",
    "sample-c0-s1-{digest}.safetensors\n",
    "sample-c0-s1-{digest}.safetensors\x00",
    "sample-c0-s01-{digest}.safetensors",
    "SAMPLE-c0-s1-{digest}.safetensors",
    "sample-c0-s\u0661-{digest}.safetensors",
    "sample-c0-s2-{digest}.safetensors",
    "file:///etc/passwd",
    "memory://x",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_only_plain_names_of_our_pattern_are_opened(place, tmp_path, name):
    """Also when the checksum in the manifest is right, and the file would be readable."""
    shutil.copytree(place, tmp_path / "root")
    secret = (tmp_path / "root" / "secret.safetensors").read_bytes()
    before = tree(tmp_path)

    def point_outside(body):
        body["samples"][0]["file"] = name.format(digest=checksum(secret))

    rewrite_manifest(tmp_path / "root" / "bank", point_outside)
    with pytest.raises(BankError, match="is not the file name of the sample"):
        SampleBank.open(tmp_path / "root" / "bank")
    after = tree(tmp_path)
    assert {k: v for k, v in after.items() if "manifest" not in k} == {
        k: v for k, v in before.items() if "manifest" not in k
    }


@pytest.mark.parametrize("kind", ["link to a sample", "broken link", "directory", "pipe"])
def test_only_regular_files_are_opened(place, tmp_path, kind):
    """A sample that is a link, a directory or a pipe is damage, even if what it leads to is the right content."""
    shutil.copytree(place, tmp_path / "root")
    file = next((tmp_path / "root" / "bank").glob("*-s1-*"))
    file.unlink()
    if kind == "link to a sample":
        file.symlink_to(tmp_path / "root" / "secret.safetensors")
    elif kind == "broken link":
        file.symlink_to(tmp_path / "nowhere")
    elif kind == "directory":
        file.mkdir()
    else:
        os.mkfifo(file)
    for verify in (True, False):
        bank = SampleBank.open(tmp_path / "root" / "bank", verify=verify)
        assert "not a regular file" in bank.damaged[0].reason
        assert_holds(bank, (2,))


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_the_manifest_must_be_a_regular_file(place, tmp_path, kind):
    shutil.copytree(place / "bank", tmp_path / "bank")
    manifest = tmp_path / "bank" / "manifest.json"
    manifest.rename(tmp_path / "elsewhere.json")
    if kind == "link":
        manifest.symlink_to(tmp_path / "elsewhere.json")
    elif kind == "pipe":
        os.mkfifo(manifest)
    else:
        manifest.mkdir()
    with pytest.raises(BankError, match="not a regular file"):
        SampleBank.open(tmp_path / "bank")


def test_a_link_in_the_way_is_replaced_not_followed(place, tmp_path):
    """Writing a sample never writes through a link: the link goes, what it pointed to stays."""
    bank = filled_bank(tmp_path / "bank", (1,))
    file = next((tmp_path / "bank").glob("*-s1-*"))
    (tmp_path / "victim").write_text("untouched")
    file.unlink()
    file.symlink_to(tmp_path / "victim")
    bank.add(fill(Net(), 1), step=1, formats="bfp8", lr=0.1, temperature=1.0, metrics={"loss": 1 / 8})
    assert (tmp_path / "victim").read_text() == "untouched"
    assert not file.is_symlink()
    assert_holds(SampleBank.open(tmp_path / "bank"), (1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON"),
        (b'{"format": "lightning_lpsgld.bank", "version": NaN}', "not valid JSON"),
        (b'{"version": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "is not the manifest of a sample bank"),
        (b"null", "is not the manifest of a sample bank"),
        (b'{"format": "lightning_lpsgld.bank", "version": 4}', "has format version 4, this release reads 1 to 3"),
        (b'{"format": "lightning_lpsgld.bank", "version": true}', "has format version True"),
        (b'{"format": "lightning_lpsgld.bank", "version": 1}', "must have exactly the fields"),
    ],
    ids=range(12),
)
def test_wrong_manifests_are_explained(tmp_path, text, message):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(BankError, match=message):
        SampleBank.open(tmp_path)


def test_a_huge_manifest_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)  # sparse: takes no space
    with pytest.raises(BankError, match=f"at most {MAX_MANIFEST_BYTES} bytes"):
        SampleBank.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["samples"][0].update(size=2**60), "a sample of this module takes"),
        (lambda m: m["module"]["entries"][1].__setitem__(1, [2**39, 2**39]), "more than .* is refused"),
        (lambda m: m["module"]["entries"][1].__setitem__(1, [0, 2**41]), "must be a list of sizes"),
        (lambda m: m["module"]["entries"][1].__setitem__(3, "bfp4"), "fingerprint is not that of the module"),
        (lambda m: m["samples"].append(m["samples"][0]), "two samples have the same chain and step"),
        (lambda m: m["arrivals"].update({"0": [2]}), "missing from `arrivals`"),
        (lambda m: m["arrivals"].update({"0": [1, 1, 2]}), "a step is twice"),
        (lambda m: m.update(capacity=0), "`capacity` must be None or an int >= 1"),
        (lambda m: m["samples"][0]["info"].update(lr=-1), "`lr` of a sample"),
        (lambda m: m["samples"][0]["info"].update(lr=10**400), "`lr` of a sample is too large"),
    ],
    ids=range(10),
)
def test_sealed_nonsense_is_explained(place, tmp_path, change, message):
    """Each of these has a matching checksum, so only the check of its own meaning can catch it."""
    shutil.copytree(place / "bank", tmp_path / "bank")
    rewrite_manifest(tmp_path / "bank", change)
    with pytest.raises(BankError, match=message):
        SampleBank.open(tmp_path / "bank")


def test_a_genuine_sample_of_another_module_is_refused(place, tmp_path):
    """Right checksum, right name, readable: but not the tensors that the manifest promises."""
    shutil.copytree(place / "bank", tmp_path / "bank")
    other = SampleBank(tmp_path / "other")
    net = Net()
    net.register_buffer("labels", torch.arange(4).int())
    other.add(fill(net, 1), step=1, formats="bfp8")
    content = next((tmp_path / "other").glob("*-s1-*")).read_bytes()
    name = f"sample-c0-s1-{checksum(content)}.safetensors"
    (tmp_path / "bank" / name).write_bytes(content)
    rewrite_manifest(tmp_path / "bank", lambda m: m["samples"][0].update(file=name, size=len(content)))
    bank = SampleBank.open(tmp_path / "bank")
    with pytest.raises(BankError, match=r"does not hold the tensors of this bank's module: `values.labels` differs"):
        bank.load_into(Net(), 0)


@pytest.mark.parametrize("text", [b"[],", b"1,", b"{},", b'"",'])
def test_a_manifest_of_brackets_is_refused_before_it_is_parsed(tmp_path, text):
    """Parsed, 100 MB of them would take gigabytes; here it takes next to nothing."""
    whole = b"[" + text * (100 * 2**20 // len(text)) + b"0]"
    (tmp_path / "manifest.json").write_bytes(whole)
    with pytest.raises(BankError, match=rf"has {len(whole)} bytes and \d+ values; at most"):
        SampleBank.open(tmp_path)


def test_recovering_reads_no_more_than_a_sample_can_have(tmp_path, monkeypatch):
    """A sparse file of 20 GB with a sample's name, and one whose header claims as much."""
    filled_bank(tmp_path, (1,)).close()
    genuine = next(tmp_path.glob("sample-*")).read_bytes()
    for number, head in enumerate((b"", genuine, (2**34).to_bytes(8, "little"))):
        with open(tmp_path / f"sample-c0-s{number + 5}-{'0' * 40}.safetensors", "wb") as file:
            file.write(head)
            file.truncate(20 * 2**30)
    (tmp_path / "manifest.json").unlink()
    sizes, read = [], LocalFolder.head

    def noted(folder, name, count):
        data = read(folder, name, count)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(LocalFolder, "head", noted)
    assert_holds(SampleBank.recover(tmp_path), (1,))
    assert max(sizes) < 2**20


@pytest.mark.parametrize(
    ("fmt", "key", "value"),
    [
        ("fixed4.2", "codes.weight", 8),
        ("fixed4.2", "codes.weight", -9),
        ("bfp8", "codes.weight", -128),
        ("e2m1", "codes.weight", 16),
        ("e2m1", "codes.weight", -1),
        ("mxfp4e2m1", "codes.weight", 16),
        ("mxfp4e2m1", "exponents.weight", 127),
    ],
)
def test_codes_that_a_format_does_not_have_are_refused(tmp_path, fmt, key, value, monkeypatch):
    """From a file with a right checksum, and from a checkpoint; decoded they would be weights off the grid.

    Both as they were before codes were packed: packed, most of these values have no room (test_bank_packing.py).
    """
    for room in (tensors, memory_store):
        monkeypatch.setattr(room, "packed", lambda found, spec: dict(found))
    module = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(quantize(torch.tensor([[0.5, -0.25], [1.0, 0.5]]), fmt, rounding="nearest"))
    memory = SampleBank()
    memory.add(module, step=0, formats=fmt)
    state = memory.state_dict()
    state["samples"][0] = {name: tensor.clone() for name, tensor in state["samples"][0].items()}
    SampleBank().load_state_dict(state)
    state["samples"][0][key].view(-1)[0] = value
    with pytest.raises(BankError, match=r"of `weight` .* lie between .*; the format has"):
        SampleBank().load_state_dict(state)
    crafted = sample_bytes(memory.infos[0], memory.spec, state["samples"][0])
    name = f"sample-c0-s0-{checksum(crafted)}.safetensors"
    with SampleBank(tmp_path) as bank:
        bank.add(module, step=0, formats=fmt)
        bank.compact()
    (tmp_path / name).write_bytes(crafted)
    rewrite_manifest(tmp_path, lambda m: m["samples"][0].update(file=name, size=len(crafted)))
    with pytest.raises(BankError, match=r"of `weight` .* lie between"):
        SampleBank.open(tmp_path).load_into(module, 0)
