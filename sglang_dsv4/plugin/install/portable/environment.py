"""SGLang's own switches that keep its DeepSeek-V4 model on paths this machine can run.

SGLang reads some of them while its modules are imported, so they are set in the launcher, before those modules and
before the scheduler processes, which inherit them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install.portable.capabilities import Capabilities

_OFF = ("0", "false", "no", "n")


@dataclass(frozen=True)
class PortableSetting:
    """One environment variable of SGLang.

    Attributes:
        name (str): of the variable.
        value (str): what it must be where the need is not met.
        reason (str): what happens otherwise.
        needs (str): key of `capabilities.NEEDS`; the variable is left alone where that need is met.
    """

    name: str
    value: str
    reason: str
    needs: str

    def accepts(self, value: str) -> bool:
        """Whether a user's value means the same to SGLang."""
        if self.value == "0":
            return value.lower() in _OFF
        return value == self.value


PORTABLE_SETTINGS = (
    PortableSetting("SGLANG_USE_CPU_ENGINE", "1", "without it SGLang looks for GPU packages on a CPU", "cuda"),
    PortableSetting("SGLANG_OPT_FP8_WO_A_GEMM", "0", "the output projection would need DeepGEMM and FP8 weights", "deep_gemm"),
    PortableSetting(
        "SGLANG_OPT_BF16_FP32_GEMM_ALGO", "cublas", "the compressors' projections would need DeepGEMM", "deep_gemm"
    ),
    PortableSetting("SGLANG_OPT_DEEPGEMM_HC_PRENORM", "0", "mixing the residual streams would need DeepGEMM", "deep_gemm"),
    PortableSetting("SGLANG_OPT_USE_TILELANG_MHC_PRE", "0", "mixing the residual streams would need TileLang", "tilelang"),
    PortableSetting("SGLANG_OPT_USE_TILELANG_MHC_POST", "0", "mixing the residual streams would need TileLang", "tilelang"),
    PortableSetting("SGLANG_OPT_FUSE_MHC_POST_PRE", "0", "mixing the residual streams would need TileLang", "tilelang"),
    PortableSetting("SGLANG_OPT_USE_FUSED_HASH_TOPK", "0", "routing by token id would need a CUDA kernel", "cuda_sm90"),
    PortableSetting(
        "SGLANG_DSV4_USE_BF16_KV_QUANT_SOURCE", "0", "window rows would be normalised for SGLang's own pool", "native_pool"
    ),
)
PORTABLE_ENV: dict[str, str] = {setting.name: setting.value for setting in PORTABLE_SETTINGS}


def apply_environment(capabilities: Capabilities, settings: Iterable[PortableSetting] = PORTABLE_SETTINGS) -> dict[str, str]:
    """Set what this machine needs, for this process and those it starts. May be called again; then nothing changes.

    Args:
        capabilities (Capabilities): what can run.
        settings (Iterable[PortableSetting]): to choose from.

    Returns:
        dict[str, str]: the variables in force, by name.

    Raises:
        UnsupportedError: the user has set one of them to something else; nothing was set.
    """
    chosen = [setting for setting in settings if not capabilities.offers(setting.needs)]
    for setting in chosen:
        value = env.get(setting.name)
        if value is not None and not setting.accepts(value):
            raise UnsupportedError(
                f"{setting.name}={value}: expected {setting.value} or unset on this machine ({capabilities.device}), "
                f"because {setting.reason}"
            )
    for setting in chosen:
        if env.get(setting.name) is None:
            env.set_value(setting.name, setting.value)
    return {setting.name: str(env.get(setting.name)) for setting in chosen}
