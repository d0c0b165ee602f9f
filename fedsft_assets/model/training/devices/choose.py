"""Choice of a site's devices: one, or several through Lightning."""

from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.devices.interface import Devices, OneDevice
from fedsft_assets.specs.plan import ResolvedTraining


def devices_for(model: LanguageModel, training: ResolvedTraining) -> Devices:
    """The devices in the plan. Raises ModelError if torchrun started another number of processes."""
    if training.devices == 1:
        return OneDevice(model, training.precision)
    from fedsft_assets.model.training.devices.multi_device import ManyDevices

    return ManyDevices(model, training)
