"""mindspeed: acceleration for Megatron training on Ascend NPU, NVIDIA GPU and CPU.

In a Megatron-LM script: `import mindspeed.megatron_adaptor`. In any other program: `mindspeed.enable(...)`.
"""

# The module mindspeed.runtime and the function of that name live side by side: the function is the attribute.
from mindspeed.errors import ConfigError, ConflictError, LedgerError, MindspeedError, TargetError
from mindspeed.runtime import Handle, Runtime, enable, enabled, patches, repatch, revert, runtime

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "ConflictError",
    "Handle",
    "LedgerError",
    "MindspeedError",
    "Runtime",
    "TargetError",
    "__version__",
    "enable",
    "enabled",
    "patches",
    "repatch",
    "revert",
    "runtime",
]
