"""Server arguments before and after SGLang resolves them."""

from typing import Any

import torch

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import checkpoint, machine, options, refusals, versions, warm_up


def prepare(args: Any) -> None:
    """Check what a user asked for, before SGLang resolves it; fill in the device where none was named, and our warm-up.

    Args:
        args (Any): parsed flags or a ServerArgs; ``device`` is set where it is None, since SGLang looks for accelerators only,
            and on a GPU ``warmups``.

    Raises:
        UnsupportedError: an argument, a variable, the device or the checkpoint is not supported.
    """
    device = machine.found_device(args.device)
    refusals.check_arguments(args)
    refusals.check_environment()
    check_device(device)
    _check_checkpoint(args, device)
    if args.device is None:
        args.device = device
    if torch.device(device).type == "cuda":
        warm_up.ask_for(args)
    if checkpoint.is_unquantised(checkpoint.read_config(args.model_path)):
        # SGLang's output projection takes FP8 weights unless told otherwise, whatever the checkpoint has.
        env.set_default("SGLANG_OPT_FP8_WO_A_GEMM", "0")


def check_device(device: str) -> None:
    """Refuse a device that is not served, or for which this process has not been prepared.

    Raises:
        UnsupportedError: says which.
    """
    machine.check_device(device, machine.compute_capability(device))
    prepared = env.get(env.DEVICE)
    kind = torch.device(device).type
    if prepared is not None and prepared != kind:
        raise UnsupportedError(
            f"--device {device}: expected {prepared}, for which the plug-in was loaded; set {env.DEVICE}={kind}"
        )


def _check_checkpoint(args: Any, device: str) -> None:
    """Refuse a checkpoint, and an attention or a dtype for it, that is not possible, before the model is loaded."""
    config = checkpoint.read_config(args.model_path, getattr(args, "json_model_override_args", None))
    spec = checkpoint.check_config(config, args.model_path, options.read().formats())
    checkpoint.check_context(config, getattr(args, "context_length", None))
    heads = checkpoint.handed_heads(config["num_attention_heads"], getattr(args, "tp_size", None) or 1)
    attention = machine.check_attention(options.read().attention, spec, device, heads)
    machine.check_dtype(getattr(args, "dtype", None) or "auto", attention)


def check_resolved(server_args: Any) -> None:
    """Check what SGLang made of the arguments.

    Args:
        server_args (Any): a resolved ServerArgs.

    Raises:
        UnsupportedError: as in `prepare`, or the pool of window pages is too small.
    """
    version = versions.installed()
    args = version.view(server_args)
    refusals.check_arguments(args)
    if torch.device(args.device).type == "cuda":
        refusals.check_graphs(args.cuda_graph_config)
    tokens = version.asked_window_tokens(args)
    if tokens is not None:
        refusals.check_window_pool(tokens)


def check_made_early(server_args: Any) -> None:
    """Check arguments that may have been made before the plug-in was loaded.

    Raises:
        UnsupportedError: as in `prepare` and `check_resolved`.
    """
    args = versions.installed().view(server_args)
    device = machine.found_device(args.device)
    check_device(device)
    _check_checkpoint(args, device)
    check_resolved(server_args)
