"""Put our pool, backend and portable ops in their places."""

from typing import Any

import torch

from sglang_dsv4 import env
from sglang_dsv4.plugin.install import arguments, contract, hooks, machine, pools, ready, request_checks, warm_up
from sglang_dsv4.plugin.install.ending import Refuse
from sglang_dsv4.plugin.install.hooks import Hook
from sglang_dsv4.plugin.install.versions.interface import SGLangVersion
from sglang_dsv4.plugin.observe import metrics


def activate(device: str | None, version: SGLangVersion, early: tuple[Hook, ...]) -> None:
    """Register every hook; needs the flag or variable to be set.

    Args:
        device (str | None): what the server will run on; None takes what `machine.found_device` takes, or what a parent process
            took.
        version (SGLangVersion): the one installed.
        early (tuple[Hook, ...]): hooks that are there already.

    Raises:
        UnsupportedError: SGLang lacks a name that we touch, or did not apply a hook.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_dsv4.plugin.install.portable.capabilities import Capabilities
    from sglang_dsv4.plugin.install.portable.environment import apply_environment
    from sglang_dsv4.plugin.install.portable.install import install
    from sglang_dsv4.plugin.install.portable.table import portable_ops

    chosen = machine.found_device(device or env.get(env.DEVICE))
    machine.check_device(chosen, machine.compute_capability(chosen))
    env.set_value(env.DEVICE, torch.device(chosen).type)
    capabilities = Capabilities.detect(chosen)
    apply_environment(capabilities)
    contract.check_names(contract.names_of(version))
    install(capabilities, portable_ops(version))
    placed = (*version.hooks, *HOOKS)

    def check_start(result: Any, scheduler: Any) -> None:
        with Refuse(Exception):
            hooks.check_called((*early, *placed))
            ready.check_serving(scheduler)

    hooks.apply((*placed, Hook(contract.INIT_INFO, check_start, "AFTER")))
    register_attention_backend("dsv4")(_create_backend)
    warm_up.register()


def _check_server_args(server_args: Any) -> None:
    arguments.check_made_early(server_args)


def _create_backend(runner: Any) -> Any:
    from sglang_dsv4.plugin.install.backend import create_backend

    return create_backend(runner)


HOOKS = (
    Hook(contract.CHECK_ARGS, _check_server_args, "BEFORE", at_start=True),
    Hook(contract.BUILD_POOL, pools.build_pool, "AROUND", at_start=True),
    Hook(contract.POOL_SIZES, pools.size_pools, "AFTER", at_start=True),
    Hook(contract.FIT_POOLS, pools.fit_pools, "AROUND"),
    Hook(contract.INTERNAL_STATE, ready.internal_state, "AFTER"),
    Hook(contract.VALIDATE, request_checks.check_request, "AFTER"),
    Hook(contract.INIT_INFO, metrics.begin, "AFTER"),
    Hook(contract.RUN_BATCH, metrics.around_step, "AROUND"),
    Hook(contract.ON_IDLE, metrics.before_idle, "BEFORE"),
)
