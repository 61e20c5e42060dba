"""Installing portable ops: the right ones, everywhere, once; and the environment that goes with them."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest

from sglang_dsv4 import env
from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install import versions
from sglang_dsv4.plugin.install.portable import install as installer
from sglang_dsv4.plugin.install.portable.capabilities import NEEDS, Capabilities
from sglang_dsv4.plugin.install.portable.environment import PORTABLE_ENV, PORTABLE_SETTINGS, PortableSetting, apply_environment
from sglang_dsv4.plugin.install.portable.install import check_installed, choose, install
from sglang_dsv4.plugin.install.portable.table import PortableOp, portable_ops
from sglang_dsv4.plugin.observe import doctor

OPS = portable_ops(versions.installed())
CPU = Capabilities(device="cpu", sm=None, has_triton_gpu=False, has_tilelang=False, has_sgl_kernel=False, has_deep_gemm=False)
H200 = Capabilities(device="cuda", sm=90, has_triton_gpu=True, has_tilelang=True, has_sgl_kernel=True, has_deep_gemm=True)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (CPU, "torch"),
        (H200, "triton, scores of long prefills by DeepGEMM"),
        (replace(H200, sm=100), "triton"),
        (replace(H200, has_deep_gemm=False), "triton"),
    ],
)
def test_the_doctor_says_whose_kernels_would_run(machine, expected):
    assert doctor.kernels(machine) == expected


def names(found):
    return {op.name for op in found}


class TestChoice:
    def test_a_cpu_gets_all(self):
        assert choose(CPU, OPS) == list(OPS)

    def test_a_gpu_with_everything_gets_none(self):
        assert choose(H200, OPS) == []

    def test_an_older_gpu_gets_what_is_compiled_for_newer_ones(self):
        found = names(choose(replace(H200, sm=80), OPS))
        assert found == {"q_norm_rope", "rope_inplace", "silu_and_mul_clamp", "hc_split_sinkhorn"}

    def test_a_missing_package_counts(self):
        assert names(choose(replace(H200, has_tilelang=False), OPS)) == {"hc_split_sinkhorn"}

    def test_every_op_and_setting_is_complete(self):
        for entry in (*OPS, *PORTABLE_SETTINGS):
            assert entry.needs in NEEDS and entry.reason
        assert len({op.name for op in OPS}) == len({op.target for op in OPS}) == len(OPS)
        assert len(PORTABLE_ENV) == len(PORTABLE_SETTINGS)

    def test_an_unknown_need_is_refused(self):
        with pytest.raises(ValueError, match="need: expected one of .* got 'warp'"):
            CPU.offers("warp")


class TestDetection:
    def test_a_cpu_has_no_gpu_whatever_is_installed(self):
        found = Capabilities.detect("cpu")
        assert (found.device, found.sm, found.has_triton_gpu) == ("cpu", None, False)
        assert not found.offers("cuda") and not found.offers("tilelang") and not found.offers("deep_gemm")

    def test_another_machine_has_the_same_packages(self):
        assert H200.on("sm_80") == replace(H200, sm=80)
        assert H200.on("cpu") == replace(H200, device="cpu", sm=None, has_triton_gpu=False)
        assert replace(CPU, has_deep_gemm=True).on("sm_90").offers("deep_gemm")
        assert not replace(CPU, has_deep_gemm=True).on("sm_86").offers("deep_gemm")

    @pytest.mark.parametrize("device", ["cuda", "sm80", "sm_75", "sm_", "mps"])
    def test_another_machine_must_be_named_by_its_architecture(self, device):
        with pytest.raises(UnsupportedError, match=f"device '{device}': expected cpu, or sm_80"):
            H200.on(device)

    def test_another_device_is_refused(self):
        with pytest.raises(UnsupportedError, match="device xpu: expected cpu or cuda"):
            Capabilities.detect("xpu")

    def test_an_absent_gpu_is_refused(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(UnsupportedError, match="device cuda: expected a CUDA device"):
            Capabilities.detect("cuda")


def stock():
    return "stock"


def ours():
    return "ours"


class Layer:
    """Where class attributes are replaced."""

    def score(self):
        return "stock"

    @staticmethod
    def mask(logits):
        return f"stock {logits}"


@pytest.fixture
def toys(monkeypatch):
    """Two modules of SGLang's, the second of which imported from the first; nothing of SGLang is changed."""
    monkeypatch.setattr(installer, "_installed", {})
    home, user = ModuleType("sglang._toy_home"), ModuleType("sglang._toy_user")
    home.kernel = user.kernel = user.alias = stock
    home.Layer = type("Layer", (Layer,), {"score": Layer.score, "mask": vars(Layer)["mask"]})
    for module in (home, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return home, user


def op(**changes):
    values = {
        "name": "kernel",
        "target": "sglang._toy_home.kernel",
        "reason": "a test",
        "replacement": ours,
        "needs": "cuda",
        "seen_as": ("sglang._toy_user.kernel",),
    }
    return PortableOp(**{**values, **changes})


@pytest.mark.sglang
class TestInstall:
    def test_rebinds_every_name_in_loaded_modules(self, toys):
        home, user = toys
        (done,) = install(CPU, [op()])
        assert home.kernel is user.kernel is user.alias is ours
        assert done.name == "kernel" and done.stock is stock
        assert done.rebound == ("sglang._toy_user.alias", "sglang._toy_user.kernel")

    def test_leaves_other_packages_alone(self, toys):
        install(CPU, [op()])
        assert stock() == "stock" and sys.modules[__name__].stock is stock

    def test_changes_nothing_the_second_time(self, toys):
        assert install(CPU, [op()]) == install(CPU, [op()])

    def test_changes_nothing_where_the_need_is_met(self, toys):
        assert install(H200, [op()]) == [] and toys[0].kernel is stock

    def test_a_class_keeps_methods_and_static_methods_apart(self, toys):
        home, _ = toys
        method = op(
            name="score", target="sglang._toy_home.Layer.score", replacement=lambda self: type(self).__name__, seen_as=()
        )
        static = op(name="mask", target="sglang._toy_home.Layer.mask", replacement=lambda logits: f"ours {logits}", seen_as=())
        install(CPU, [method, static])
        layer = home.Layer()
        assert layer.score() == "Layer" and layer.mask(1) == "ours 1" and home.Layer.mask(logits=2) == "ours 2"

    def test_a_missing_target_is_named_and_nothing_is_changed(self, toys):
        with pytest.raises(UnsupportedError, match=r"sglang\._toy_home\.gone: expected in SGLang, but missing"):
            install(CPU, [op(), op(name="gone", target="sglang._toy_home.gone")])
        assert toys[0].kernel is stock

    def test_a_path_that_leads_elsewhere_is_named(self, toys):
        _, user = toys
        done = install(CPU, [op()])
        check_installed(done)
        user.kernel = stock
        with pytest.raises(UnsupportedError, match=r"sglang\._toy_user\.kernel is <function stock"):
            check_installed(done)

    def test_a_stale_name_that_nobody_listed_is_found(self, toys):
        home, user = toys
        done = install(CPU, [op(seen_as=())])
        user.alias = stock
        with pytest.raises(UnsupportedError, match=r"sglang\._toy_user\.alias is the stock one"):
            check_installed(done)

    def test_a_module_that_is_not_loaded_is_looked_at_later(self, toys):
        missing = op(seen_as=("sglang._toy_absent.kernel",))
        done = install(CPU, [missing])
        with pytest.raises(UnsupportedError, match=r"sglang\._toy_absent\.kernel"):
            check_installed(done)


@pytest.fixture(scope="module")
def sglang_with_ops():
    """SGLang in this process with every op, and as it was afterwards."""
    done = install(CPU, OPS)
    yield done
    for installed in done:
        owner = installer._owner(installed.op.target)
        replacement = installed.op.replacement
        for _, module, attribute in installer._bindings([replacement])[id(replacement)]:
            setattr(module, attribute, installed.stock)
        installer._set(*owner, installed.stock)
    installer._installed.clear()


@pytest.mark.sglang
@pytest.mark.slow
class TestSGLang:
    def test_the_model_and_the_scheduler_reach_every_op(self, sglang_with_ops):
        check_installed(sglang_with_ops)
        assert names(sglang_with_ops) == names(OPS)
        assert install(CPU, OPS) == sglang_with_ops

    def test_modules_imported_later_take_the_replacement(self, sglang_with_ops):
        from sglang.kernels.ops.attention.dsv4 import fused_rope_inplace
        from sglang.srt.models import deepseek_v4

        from sglang_dsv4.plugin.install.portable import model_ops

        assert deepseek_v4.fused_rope_inplace is fused_rope_inplace is model_ops.rope_inplace
        find = getattr(deepseek_v4, "_get_mhc_ops", None) or deepseek_v4.get_mhc_ops
        find.cache_clear()
        assert find().hc_split_sinkhorn is model_ops.hc_split_sinkhorn
        find.cache_clear()

    def test_positions_come_from_sglangs_torch_function(self, sglang_with_ops):
        import torch
        from sglang.srt.model_executor.forward_batch_info import compute_position

        positions, starts = compute_position("dsv4", torch.tensor([0, 512]), torch.tensor([3, 2]), 5)
        assert positions.tolist() == [0, 1, 2, 512, 513] and starts.tolist() == [0, 3]

    def test_the_paged_allocator_runs(self, sglang_with_ops):
        import torch
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        allocator = PagedTokenToKVPoolAllocator(1024, 256, torch.bfloat16, "cpu", None, need_sort=False)
        lens = torch.tensor([300])
        first = allocator.alloc_extend(torch.tensor([0]), torch.tensor([0]), lens, lens, torch.tensor([-1]), 300)
        assert first.tolist() == list(range(256, 556))
        step = allocator.alloc_decode(lens + 1, lens + 1, first[-1:])
        assert step.tolist() == [556] and allocator.available_size() == 512
        many = torch.tensor([900])
        assert allocator.alloc_extend(torch.tensor([0]), torch.tensor([0]), many, many, torch.tensor([-1]), 900) is None
        assert allocator.available_size() == 512
        allocator.free(torch.cat([first, step]))
        assert allocator.available_size() == 1024


class TestEnvironment:
    NAMES = ("DSV4_TEST_OFF", "DSV4_TEST_ALGORITHM")
    SETTINGS = (
        PortableSetting(NAMES[0], "0", "a kernel is missing", "cuda"),
        PortableSetting(NAMES[1], "cublas", "another is missing", "cuda"),
    )

    @pytest.fixture(autouse=True)
    def unset(self, monkeypatch):
        for name in self.NAMES:
            monkeypatch.setenv(name, "")  # restored afterwards, whatever a test sets
            monkeypatch.delenv(name)

    def test_sets_what_is_needed_and_again_nothing(self):
        expected = {self.NAMES[0]: "0", self.NAMES[1]: "cublas"}
        assert apply_environment(CPU, self.SETTINGS) == expected
        assert apply_environment(CPU, self.SETTINGS) == expected
        assert {name: env.get(name) for name in self.NAMES} == expected

    def test_sets_nothing_where_the_need_is_met(self):
        assert apply_environment(H200, self.SETTINGS) == {}
        assert env.get(self.NAMES[0]) is None

    @pytest.mark.parametrize("value", ["0", "false", "False", "no", "n"])
    def test_a_users_value_that_means_the_same_stays(self, value):
        env.set_value(self.NAMES[0], value)
        assert apply_environment(CPU, self.SETTINGS)[self.NAMES[0]] == value

    @pytest.mark.parametrize("value", ["1", "true", "yes", "maybe"])
    def test_a_contrary_value_is_refused_and_nothing_is_set(self, value):
        env.set_value(self.NAMES[0], value)
        message = rf"DSV4_TEST_OFF={value}: expected 0 or unset on this machine \(cpu\), because a kernel is missing"
        with pytest.raises(UnsupportedError, match=message):
            apply_environment(CPU, self.SETTINGS)
        assert env.get(self.NAMES[1]) is None
