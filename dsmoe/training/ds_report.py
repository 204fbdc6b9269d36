"""DeepSpeed's own report (`ds_report`) with our compiled operations among its own.

DeepSpeed 0.19.8 lists builders from modules in its package folder alone, which we do not write into; `show` adds ours
to its tables in this process and calls its report.
"""

from types import ModuleType

import torch

from dsmoe.base.errors import ConfigError
from dsmoe.ops import native

NAME = "dsmoe_kernels"


def builder() -> object:
    """A DeepSpeed OpBuilder whose load() gives torch.ops.dsmoe; it builds nothing (`make kernels` does)."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    class KernelsBuilder(OpBuilder):
        """The compiled operations as DeepSpeed sees an op."""

        BUILD_VAR = "DS_BUILD_DSMOE_KERNELS"
        NAME = NAME

        def __init__(self) -> None:
            super().__init__(name=NAME)

        def absolute_name(self) -> str:
            return "dsmoe.ops.native"

        def sources(self) -> list[str]:
            return []

        def is_compatible(self, verbose: bool = False) -> bool:
            if verbose and not native.LIBRARY.loaded:
                self.warning(f"{NAME}: {native.LIBRARY.describe()}")
            return native.LIBRARY.loaded

        def load(self, verbose: bool = True) -> ModuleType:
            if not native.LIBRARY.loaded:
                raise ConfigError(f"compiled operations: {native.LIBRARY.describe()}.")
            return torch.ops.dsmoe

    return KernelsBuilder()


def show() -> None:
    """Print DeepSpeed's report. ConfigError where DeepSpeed is not installed or has another inside than 0.19.8."""
    try:
        from deepspeed import env_report
        from deepspeed.git_version_info import installed_ops
    except ImportError as error:
        raise ConfigError(
            f"--ds_report needs deepspeed, which does not import ({error}); leave the option out."
        ) from error
    env_report.ALL_OPS[NAME] = builder()
    installed_ops[NAME] = native.LIBRARY.loaded
    env_report.main()
