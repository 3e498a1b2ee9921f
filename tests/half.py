"""Workers that train prepared jobs in fp16 on a CPU: `python -m tests.half FOLDER`, as `tests.zero_matrix`.

DeepSpeed takes fp16 on a CPU only where oneDNN has fast kernels for it. torch has slow ones everywhere, which is enough to see that
overflows, the loss scale and resuming are right. `set_accelerator` is DeepSpeed's own door for another accelerator.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from tests import zero_matrix


class SlowHalf(CPU_Accelerator):  # type: ignore[misc]
    """A CPU that says what torch can do on it."""

    def is_fp16_supported(self) -> bool:
        return True


if __name__ == "__main__":
    set_accelerator(SlowHalf())
    zero_matrix.main()
