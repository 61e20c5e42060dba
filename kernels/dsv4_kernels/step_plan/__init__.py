"""Fill a step's tensors from what a serving engine has on the device: lengths, and tables of token slots."""

from dsv4_kernels.step_plan.naive import naive_step_plan, step_buffers, step_part

__all__ = ["naive_step_plan", "step_buffers", "step_part"]
