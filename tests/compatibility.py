"""What works with what: every cell is a test, every refusal its message. ``.ci/compat`` makes the page of it.

A row names tests by the beginning of their node ids; it holds where all of them pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "tests" / "compatibility.json"
BEGIN, END = "<!-- made by .ci/compat: begin -->\n", "<!-- made by .ci/compat: end -->\n"


@dataclass(frozen=True)
class Row:
    """One thing that is combined with the plugin.

    Attributes:
        area: Its group.
        what: What it is.
        test: Node id from ``tests/`` on, or its beginning; without parameters: with any.
        refusal: Words of the message, where it is refused; they stand in the test.
        newer: Why it fails at the lower bounds, where it does.
    """

    area: str
    what: str
    test: str
    refusal: str = ""
    newer: str = ""


_USE, _NO = "precision/test_compatibility.py::", "precision/test_refusals.py::"
_DYNAMO = "needs a newer torch: the Dynamo of 2.6 cannot trace the casts"
_OTHERS = "precision/test_other_libraries.py::test_networks_as_they_come"
_PARTS, _MEAN = "precision/test_parts.py::", "precision/test_averaging.py::"

ROWS = (
    Row("Optimizers", "SGD with momentum, Adam, AdamW", f"{_USE}test_optimizers"),
    Row("Optimizers", "parameter groups with rates of their own", f"{_USE}test_param_groups_keep_their_own_rates"),
    Row("Optimizers", "manual optimization that steps `self.optimizers()`",
        f"{_USE}test_manual_optimization_that_steps_our_sampler_works"),
    Row("Optimizers", "manual optimization that steps an optimizer of its own",
        f"{_NO}test_manual_optimization_that_never_steps_our_sampler", "step what `self.optimizers()` returns"),
    Row("Optimizers", "none at all", f"{_NO}test_no_optimizer", "returned no optimizer"),
    Row("Optimizers", "a part of the network beside another optimizer with its state",
        f"{_PARTS}test_the_rest_follows_the_users_own_optimizer_bit_for_bit"),
    Row("Optimizers", "a part beside LBFGS", f"{_PARTS}test_parts_that_cannot_be_sampled_are_refused",
        "LBFGS evaluates its closure many times"),
    Row("Optimizers", "learning-rate schedulers: per epoch, per step, on plateau, chained",
        f"{_USE}test_lr_schedulers_drive_the_sampler"),
    Row("Gradients", "`accumulate_grad_batches`", f"{_USE}test_accumulated_batches_make_one_step"),
    Row("Gradients", "accumulation whose last group an epoch cuts short",
        "precision/test_right_posterior.py::test_the_group_that_the_end_of_an_epoch_cuts_short_has_a_whole_gradient"),
    Row("Gradients", "clipping by norm and by value", f"{_USE}test_gradients_are_clipped_before_they_are_rounded"),
    Row("Gradients", "NaN", f"{_NO}test_nan_is_refused_and_names_the_parameter", "loss is nan at step 1"),
    Row("Gradients", "sparse", f"{_NO}test_sparse_gradients", "sparse=False"),
    Row("Precision", "bfloat16 autocast (`compute=\"bf16-mixed\"`)", f"{_USE}test_bf16_autocast"),
    Row("Precision", "float16 with a GradScaler", f"{_NO}test_half_precision_compute_would_need_a_gradscaler",
        "GradScaler"),
    Row("Precision", "a second precision plugin", f"{_NO}test_another_precision_plugin", "Precision"),
    Row("Precision", "a format wider than the parameters", f"{_NO}test_format_wider_than_the_dtype", "cannot hold"),
    Row("Compilation", "`torch.compile` of the LightningModule or a part: whole graph, the same bits",
        "casting/test_compile.py::test_a_compiled_lightning_module_trains_as_an_uncompiled_one", newer=_DYNAMO),
    Row("Compilation", "no compilation per step",
        "casting/test_compile.py::test_whole_graph_same_bits_and_no_compilation_per_step", newer=_DYNAMO),
    Row("Compilation", "activation checkpointing around a compiled network",
        "casting/test_compile.py::test_checkpointing_around_a_compiled_network_is_refused_in_backward",
        "run again in backward", _DYNAMO),
    Row("Strategies", "DDP: replicas bit-identical after every step",
        "distributed/test_replicas.py::test_replicas_are_bit_identical_after_every_step"),
    Row("Strategies", "DDP that lets replicas drift apart",
        "distributed/test_replicas.py::test_the_checksum_stops_the_forked_run_on_all_ranks", "differs from rank 0"),
    Row("Strategies", "`ParallelChainsStrategy`: each chain is the one that runs alone",
        "strategies/test_parallel_chains.py::test_each_chain_is_the_one_that_runs_alone_with_its_seed"),
    Row("Strategies", "`ModelParallelStrategy` (FSDP2) with SGLD: chain and bank of DDP",
        "strategies/test_model_parallel.py::test_fsdp2_gives_the_chain_and_the_bank_of_ddp",
        newer="needs a newer torch: the DTensor of 2.6 has no sharding rule for `amax`"),
    Row("Strategies", "FSDP v1", f"{_NO}test_fsdp_v1_names_the_way", "ModelParallelStrategy"),
    Row("Strategies", "DeepSpeed", f"{_MEAN}test_deepspeed_is_refused_by_its_name",
        "does not run under DeepSpeedStrategy"),
    Row("Callbacks", "EarlyStopping, ModelCheckpoint, LearningRateMonitor, tqdm bar",
        f"{_USE}test_learning_rate_monitor_early_stopping_checkpoints_and_progress_bars"),
    Row("Callbacks", "rich progress bar", f"{_USE}test_rich_progress_bar"),
    Row("Callbacks", "SWA, WeightAveraging, EMA with `accumulator=\"low\"`",
        f"{_MEAN}test_the_average_is_that_of_the_chain"),
    Row("Callbacks", "SWA, WeightAveraging, EMA with any other accumulator",
        f"{_MEAN}test_averages_of_rounded_views_are_refused", "averages `parameters"),
    Row("Callbacks", "BackboneFinetuning", f"{_PARTS}test_backbone_finetuning"),
    Row("Callbacks", "validate, test and predict from a checkpoint",
        f"{_USE}test_validate_test_and_predict_from_a_checkpoint"),
    Row("Networks", "frozen, tied and unused parameters", f"{_USE}test_frozen_tied_and_unused_parameters"),
    Row("Networks", "ResNet, MobileNetV3, transformer encoder, LSTM", f"{_USE}test_architectures"),
    Row("Networks", "timm: ResNet, MobileNetV3, vision transformer", f"{_OTHERS}[timm"),
    Row("Networks", "torchvision segmentation (LR-ASPP)", f"{_OTHERS}[torchvision segmentation"),
    Row("Networks", "torchvision detection (SSDlite, Faster R-CNN); a bank, and no average of boxes",
        f"{_OTHERS}[torchvision detection"),
    Row("Networks", "Hugging Face: models, heads and peft adapters, from fit to test",
        "precision/test_language_models.py::test_a_model_from_fit_to_test"),
    Row("Networks", "Hugging Face under DDP, resumed",
        "precision/test_language_models.py::test_two_ranks_stay_bit_identical_and_resume"),
    Row("Networks", "lazy modules that have not run",
        "precision/test_start.py::test_lazy_modules_that_have_not_run_are_refused_by_name", "Run one batch"),
    Row("Networks", "`sites` that match nothing", f"{_NO}test_no_layer_matched", "match"),
    Row("Data", "several train dataloaders", f"{_NO}test_two_train_dataloaders_are_ambiguous", "2 train dataloaders"),
    Row("Data", "a stream without `num_data=`", f"{_NO}test_num_data_that_cannot_be_known", "has no length"),
    Row("Loss", "a mean, or a multiple of it with `loss_scale=`",
        "precision/test_right_posterior.py::test_a_loss_that_is_a_multiple_is_scaled_with_accumulation_too"),
    Row("Loss", "a sum over the batch",
        "precision/test_right_posterior.py::test_a_sum_over_the_batch_is_refused_and_can_be_scaled", "loss_scale"),
    Row("Runs", "resumed at an epoch's end and within one, bit for bit",
        "precision/test_plugin.py::test_resume_equals_uninterrupted_bitwise"),
    Row("Runs", "started from a Lightning checkpoint",
        "precision/test_start.py::test_weights_of_a_lightning_checkpoint_and_nothing_else"),
    Row("Runs", "any task, from fit to test",
        "callbacks/test_evaluation_of_tasks.py::test_any_task_from_fit_to_test"),
)  # fmt: skip


def function_of(row: Row) -> tuple[Path, str]:
    """File and function of a row's test."""
    file, _, name = row.test.partition("::")
    return ROOT / "tests" / file, name.partition("[")[0]


def outcome_of(row: Row, outcomes: Mapping[str, str]) -> str:
    """``passed``, ``failed``, ``skipped`` or ``not run``, of all tests of a row."""
    stem = row.test if "[" in row.test else f"{row.test}["
    found = {outcome for test, outcome in outcomes.items() if test == row.test or test.startswith(stem)}
    return next((outcome for outcome in ("failed", "passed", "skipped") if outcome in found), "not run")


def cell(row: Row, outcomes: Mapping[str, str]) -> str:
    """What one environment says: the verdict where the tests passed."""
    outcome = outcomes.get(row.test, "not run")
    return ("refused" if row.refusal else "yes") if outcome == "passed" else {"failed": "fails"}.get(outcome, outcome)


def table(results: Iterable[Mapping[str, object]]) -> str:
    """The table of the page, from the results of :data:`RESULTS`."""
    runs = list(results)
    head = ["", *(str(run["name"]) for run in runs), "message, test"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    area = ""
    for row in ROWS:
        if row.area != area:
            area = row.area
            lines.append(f"| **{area}** |" + " |" * (len(head) - 1))
        said = (f"“{row.refusal}” " if row.refusal else "") + (f"({row.newer}) " if row.newer else "")
        cells = [cell(row, run["outcomes"]) for run in runs]  # type: ignore[arg-type]
        lines.append(f"| {row.what} | {' | '.join(cells)} | {said}`{row.test.partition('::')[2]}` |")
    lines += ["", "Run with:", ""]
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())  # type: ignore[attr-defined]
        lines.append(f"* {run['name']}: {versions}")
    return "\n".join(lines) + "\n"


def recorded() -> list[dict[str, object]]:
    """Results that were recorded: the oldest versions, the newest, and these under other Pythons."""
    return json.loads(RESULTS.read_text())


def page(text: str, results: Iterable[Mapping[str, object]]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"
