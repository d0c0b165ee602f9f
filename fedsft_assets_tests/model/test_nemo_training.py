"""NeMo trains a checkpoint from its own configuration, as this package's trainer does."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf, open_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsft_assets.data.records import dump_records, read_records
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.nemo_data import Processes, training_loader, validation_loader
from fedsft_assets.model.nemo_model import SFTModel
from fedsft_assets.model.training.batches import evaluation_batches, training_batches
from fedsft_assets.model.training.local_training import mean_loss, split_tokens, train_round
from fedsft_assets.settings import PROJECT
from fedsft_assets.store import archive_file, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.model.quiet_trainer import quiet_trainer
from fedsft_assets_tests.prepared import made_current, prepare_home

FILES = ("training", "validation")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the home of a study of the sample, where a job has ended; its splits are some 120 records each."""
    store = prepare_home(tmp_path / ".fedsft")
    with made_current(store.checkpoint("fedavg")) as folder:
        LanguageModel.load(archive_file(current(store.base_model("tiny")))).save(folder / "model.nemo")
    whole = current(store.combined)
    with made_current(store.combined) as combined:
        for split in FILES:
            split_file(combined, split).write_bytes(dump_records(read_records(split_file(whole, split))[:120]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _scalars(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.essential
def test_the_lines_of_the_document_reach_the_losses_of_this_packages_own_trainer(study: Path, make_plan: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/nemo.md").read_text(encoding="utf-8"), re.DOTALL)
    said: dict[str, Any] = {}
    exec(code, said)
    trained, trainer = said["model"], said["trainer"]

    model = LanguageModel.load(study / said["checkpoint"])
    training, validation = (
        split_tokens(model, study / f".fedsft/combined/current/{split}.jsonl", 256) for split in FILES
    )
    plan = make_plan(
        batch_size=16,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        weight_decay=0.01,
        gradient_clip=1.0,
        rounds=1,
        local_epochs=2,
    )
    batches = [
        batch for epoch in (0, 1) for batch in training_batches(training, 16, 1234, epoch, model.answer_loss.packs)
    ]
    before = mean_loss(model, validation, plan.training).loss
    report = train_round(model, training, plan, 0, batches=batches)
    after = mean_loss(model, validation, plan.training).loss

    log = study / "experiments/after-fedavg"
    losses = _scalars(next(log.rglob("events.*")).parent, "train_loss")
    assert len(losses) == len(report.points) == 16
    assert losses == pytest.approx([point.loss for point in report.points], abs=1e-3)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(after, abs=1e-3)
    assert after < before - 0.1
    (archive,) = log.rglob("*.nemo")
    trained.save(study / "saved.nemo")
    assert content_digest(archive) == content_digest(study / "saved.nemo") != content_digest(study / said["checkpoint"])
    assert mean_loss(LanguageModel.load(archive), validation, plan.training).loss == pytest.approx(after, abs=1e-3)
    assert list(log.rglob("*.ckpt"))


@pytest.fixture
def file(tmp_path: Path, records: list[dict[str, str]]) -> Path:
    """18 records."""
    path = tmp_path / "records.jsonl"
    path.write_bytes(dump_records(records))
    return path


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    return quiet_trainer(default_root_dir=tmp_path)


def test_the_loss_is_the_same_in_micro_batches_and_the_trainer_is_left_as_it_was(
    base: Any, file: Path, trainer: Trainer
) -> None:
    found = []
    for micro in (8, 4, 1):
        model = SFTModel.load(base[0])
        model.setup_training_data({"file_names": str(file), "global_batch_size": 8, "micro_batch_size": micro})
        model.setup_validation_data({"file_names": [file.as_posix()], "micro_batch_size": micro})
        with open_dict(model.cfg):
            model.cfg.optim = {"lr": 3e-3}
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit_loop.epoch_loop.batch_progress.reset()
        trainer.fit(model)
        found.append((trainer.callback_metrics["train_loss"].item(), trainer.callback_metrics["val_loss"].item()))
        assert trainer.accumulate_grad_batches == 1
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


def test_an_accumulation_that_contradicts_the_batch_sizes_is_refused(base: Any, file: Path, trainer: Trainer) -> None:
    trainer.accumulate_grad_batches = 3
    model = SFTModel.load(base[0])
    model.setup_training_data({"file_names": str(file), "global_batch_size": 8, "micro_batch_size": 4})
    with pytest.raises(ModelError, match=r"accumulate_grad_batches: train_ds says 2 .*, the trainer 3; leave it out"):
        trainer.fit(model)


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_each_batch_and_keep_step(model: LanguageModel, file: Path, drop_last: bool) -> None:
    config = {"file_names": [str(file)], "global_batch_size": 8, "micro_batch_size": 2, "drop_last": drop_last}
    loaders = [training_loader(model, config, Processes(rank, 2)) for rank in (0, 1)]
    assert [parts for _loader, parts in loaders] == [2, 2]
    for epoch in (0, 1):
        for loader, _parts in loaders:
            loader.sampler.set_epoch(epoch)
        of_processes = [list(loader.sampler) for loader, _parts in loaders]
        assert [len(parts) for parts in of_processes] == [len(loader) for loader, _parts in loaders]
        seen: list[set[int]] = []
        for step in zip(*of_processes, strict=True):
            assert len({(part.targets, part.first) for part in step}) == 1
            if step[0].first:
                seen.append(set())
            for part in step:
                if part.weight:
                    assert not seen[-1] & set(part.indices)
                    seen[-1] |= set(part.indices)
        tokens = loaders[0][0].dataset.tokens
        expected = training_batches(tokens, 8, 1234, epoch, model.answer_loss.packs)[: 2 if drop_last else 3]
        assert seen == list(map(set, expected))
    assert len(loaders[0][0].dataset) == (16 if drop_last else 18)


def test_validation_takes_each_record_once_over_all_processes(model: LanguageModel, file: Path) -> None:
    config = {"file_names": [str(file), str(file)], "micro_batch_size": 4}
    loaders = [validation_loader(model, config, Processes(rank, 3)) for rank in range(3)]
    taken = [index for loader in loaders for part in loader.sampler if part.weight for index in part.indices]
    assert sorted(taken) == list(range(36))
    assert len({len(list(loader.sampler)) for loader in loaders}) == 1
    targets = sum(len(one.batch.targets) * one.weight for loader in loaders for one in loader)
    tokens = loaders[0].dataset.tokens
    assert targets == sum(
        one.targets() for batch in evaluation_batches(tokens, 4) for one in map(tokens.__getitem__, batch)
    )


def test_without_shuffling_records_are_taken_in_their_order(model: LanguageModel, file: Path) -> None:
    config = {"file_names": str(file), "global_batch_size": 4, "shuffle": False, "seed": None, "num_workers": 4}
    loader, _parts = training_loader(model, config, Processes())
    assert [index for part in loader.sampler for index in part.indices] == list(range(18))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"global_batch_size": None}, r"train_ds\.global_batch_size: say how many records"),
        ({"global_batch_size": 0}, r"train_ds\.global_batch_size: Input should be greater than 0, found 0"),
        ({"micro_batch_size": 3}, r"train_ds\.global_batch_size: 4 is no multiple of micro_batch_size \(3\)"),
        ({"max_seq_length": 2048}, r"train_ds\.max_seq_length: expected 2 to 256, .* found 2048"),
        ({"add_sep": True}, r"train_ds\.add_sep: Input should be False, found True"),
        ({"tokens_to_generate": 8}, r"train_ds\.tokens_to_generate: .* found 8; leave it out"),
        ({"prompt_template": "{input} {output}"}, r"train_ds\.prompt_template: the model's is '{input}\\n\\nAnswer"),
        ({"file_names": None}, r"train_ds\.file_names: Field required"),
        ({"file_names": []}, r"train_ds\.file_names: no records in no file"),
        ({"file_names": "none.jsonl"}, r"train_ds\.file_names: none\.jsonl: cannot be read"),
        ({"global_batch_size": 32, "drop_last": True}, r"train_ds\.drop_last: there are 18 records, less than"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_the_field(
    model: LanguageModel, file: Path, said: dict[str, Any], error: str
) -> None:
    config = OmegaConf.create({"file_names": str(file), "global_batch_size": 4, **said})
    with pytest.raises(ModelError, match=error):
        training_loader(model, config, Processes())


def test_what_an_archive_says_of_training_does_not_count_unless_it_is_handed_over(
    base: Any, file: Path, tmp_path: Path
) -> None:
    model = SFTModel.load(base[0])
    model.setup_training_data({"file_names": str(file), "global_batch_size": 8})
    model.save_to(str(tmp_path / "with-data.nemo"))
    assert "train_ds" not in SFTModel.restore_from(str(tmp_path / "with-data.nemo")).cfg
    config = SFTModel.restore_from(str(tmp_path / "with-data.nemo"), return_config=True)
    assert config.train_ds.global_batch_size == 8
    again = SFTModel.restore_from(str(tmp_path / "with-data.nemo"), override_config_path=config)
    assert again.cfg.train_ds.global_batch_size == 8
    assert LanguageModel.load(tmp_path / "with-data.nemo").tokenizer_files == again.language_model.tokenizer_files
