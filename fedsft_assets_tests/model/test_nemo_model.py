import hydra
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf, open_dict
from torch.utils.data import DataLoader

from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.nemo_model import SFTModel
from fedsft_assets_tests.model.quiet_trainer import quiet_trainer


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
    quiet_trainer().fit(model, train_dataloaders=DataLoader(batches, batch_size=None))
    assert model.training_step(batches[0]).item() < 0.9 * before


def test_nemos_configurations_work_with_newer_hydra_and_omegaconf_than_it_asks_for(tmp_path):
    """Those of `override-dependencies` in pyproject.toml; Dagster's antlr needs them."""
    (override,) = OverridesParser.create().parse_overrides(["optim.betas=[0.9,0.5]"])
    config = OmegaConf.create({"lr": 0.25, "optim": {"_target_": "torch.optim.AdamW", "lr": "${lr}"}})
    config.optim.betas = override.value()
    optimizer = hydra.utils.instantiate(config.optim, params=[torch.zeros(1, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], list(optimizer.defaults["betas"])) == (0.25, [0.9, 0.5])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    where = OmegaConf.create({"exp_dir": str(tmp_path), "name": "one", "create_tensorboard_logger": False})
    assert exp_manager(trainer, where).is_relative_to(tmp_path / "one")


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
