"""Ways of fine-tuning: one small file a method (or two that are alike), listed here. What users see of them is in hone.methods."""

from models.methods.bottleneck import Adapter
from models.methods.ia3 import Ia3
from models.methods.lora import Lora, quantisation
from models.methods.method import Applying, Method, State
from models.methods.prompt import Prefix, Prompt
from models.methods.whole import Freeze, Full

METHODS: dict[str, Method] = {method.name: method for method in (Lora(), Full(), Freeze(), Ia3(), Adapter(), Prompt(), Prefix())}

__all__ = ["METHODS", "Applying", "Method", "State", "quantisation"]
