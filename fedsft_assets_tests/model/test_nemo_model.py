import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf, open_dict
from torch.utils.data import DataLoader

from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.nemo_model import SFTModel


def test_nemo_restores_an_archive_and_writes_one_of_the_same_content(base, tmp_path):
    restored = SFTModel.load(base[0])
    restored.save(tmp_path / "by-nemo.nemo")
    assert content_digest(tmp_path / "by-nemo.nemo") == content_digest(base[0])
    assert LanguageModel.load(tmp_path / "by-nemo.nemo").tokenizer_files == LanguageModel.load(base[0]).tokenizer_files


def test_nemos_own_restore_names_this_class(base):
    config = SFTModel.restore_from(str(base[0]), return_config=True)
    assert OmegaConf.to_container(config)["target"] == "fedsft_assets.model.nemo_model.SFTModel"


def test_lightning_trains_it(base, tokens):
    model = SFTModel.load(base[0])
    language_model = model.language_model
    assert language_model.lm is model.lm
    batches = [language_model.answer_loss.batch(tokens[:8])] * 6
    with open_dict(model.cfg):
        model.cfg.optim = {"lr": 3e-3}
    before = model.training_step(batches[0]).item()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_dataloaders=DataLoader(batches, batch_size=None))
    assert model.training_step(batches[0]).item() < 0.9 * before


def test_training_without_a_learning_rate_says_where_to_set_it(base):
    with pytest.raises(ModelError, match=r"optim\.lr"):
        SFTModel.load(base[0]).configure_optimizers()


def test_a_damaged_archive_is_an_error_that_names_it(base, tmp_path):
    damaged = tmp_path / "damaged.nemo"
    damaged.write_bytes(base[0].read_bytes()[:-200_000])
    with pytest.raises(ModelError, match=r"damaged\.nemo"):
        SFTModel.load(damaged)
    assert SFTModel.load(base[0])._is_model_being_restored() is False
    assert torch.is_grad_enabled()
