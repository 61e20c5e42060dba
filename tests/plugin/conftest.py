"""Tests of the plug-in import SGLang the way a server without a GPU does."""

from sglang_dsv4 import env

# SGLang decides at import whether it is on a CPU.
env.set_default("SGLANG_USE_CPU_ENGINE", "1")
