"""What SGLang calls when it loads its plug-ins, in the launcher and in each scheduler process.

SGLang logs an exception of a plug-in and goes on without it. With the compressed cache asked for, that would serve
another cache under our name; so every failure becomes `SystemExit` then, which SGLang does not swallow. For the same
reason nothing but the standard library is imported at the top: SGLang would log what is missing, and go on.

Not asked for, a failure here is SGLang's to log. The flags are added last, so that after one they are unknown, and
SGLang refuses them.
"""

from sglang_dsv4.plugin.install.ending import Refuse


def register() -> None:
    """Add our flags, and take over where ``SGLANG_DSV4_COMPRESSED_KV=1`` asks for it."""
    with Refuse(Exception):  # an unusable value is neither on nor off
        from sglang_dsv4 import env

        is_enabled = env.is_enabled(env.COMPRESSED_KV)
    with Refuse(*([Exception] if is_enabled else [])):
        from sglang_dsv4.plugin.install import launch

        launch.register()
        if is_enabled:
            launch.activate()
