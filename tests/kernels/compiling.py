"""Machine code of a kernel for an architecture, without a GPU."""

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv4_kernels.step import StepPointers

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
STEP = StepPointers(*["*i64"] * 7)
KIND = {"WINDOW": 128, "RATIO": 4, "MOST": 512}


def _described(argument, path):
    """Signature, constants and attributes of one argument: a type, None, or a tuple of those.

    Every pointer is 16-byte aligned, as the launchers' tensors are.
    """
    if argument is None:
        return "constexpr", {path: None}, {}
    if isinstance(argument, str):
        return argument, {}, {path: [["tt.divisibility", 16]]} if argument.startswith("*") else {}
    signature, constants, attributes = [], {}, {}
    for number, part in enumerate(argument):
        kind, held, facts = _described(part, (*path, number))
        signature.append(kind)
        constants |= held
        attributes |= facts
    return type(argument)(*signature), constants, attributes


def machine_code(kernel, arguments, constants, architecture, warps, **options):
    """The code that a launch with these arguments and ``constexpr`` values would run."""
    signature, held, attributes = {}, dict(constants), {}
    for number, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr"
        if name in arguments:
            signature[name], inner, facts = _described(arguments[name], (number,))
            held |= inner
            attributes |= facts
    source = ASTSource(fn=kernel, signature=signature, constexprs=held, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = compile_kernel(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False, **options})
    return compiled.asm["cubin"]
