"""`ia3`: a learnt factor for each key, value and inner activation."""

from typing import Any, ClassVar

from hone.recipe import Ia3Method
from models.blocks import AFTER_ATTENTION, AFTER_FEEDFORWARD, KEYS_AND_VALUES, ending, is_conv1d
from models.methods.by_peft import PeftMethod, no_targets
from models.methods.method import Applying


class Ia3(PeftMethod):
    """PEFT's IA3Config, its modules found in any architecture."""

    name: ClassVar[str] = "ia3"

    def config(self, model: Any, settings: Ia3Method, how: Applying) -> Any:
        from peft import IA3Config

        feedforward = ending(model, settings.feedforward_modules or AFTER_FEEDFORWARD, but=AFTER_ATTENTION)
        outputs = ending(model, settings.target_modules or KEYS_AND_VALUES)
        if not feedforward and not outputs:
            raise no_targets(model, settings.target_modules)
        return IA3Config(
            task_type=how.task.peft_task_type,
            target_modules=[*outputs, *feedforward],
            feedforward_modules=feedforward,
            fan_in_fan_out=any(map(is_conv1d, model.modules())),
            modules_to_save=list(how.heads) or None,
        )
